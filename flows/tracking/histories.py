"""Scores over time in MLflow: one run for each model and suite, with every score by time and its interval."""

from collections.abc import Mapping, Sequence

from mlflow.entities import Metric, Run, RunTag

from flows.tracking.client import BATCH
from flows.tracking.registry import Registry, Result
from vectorclm.evaluation.statistics import Figure, score_interval

HISTORIES = "scores over time"  # MLflow's experiment
SERIES = "history"  # the tag with the id of the series that a run shows
LOGGED = "results"  # the tag with the number of results that a run has, also of those that were removed since
NEWEST = "newest_result"  # the tag with the time of the newest of them, in milliseconds
PICTURE = "scores-over-time.svg"
MOST = 1000  # results of a series; MLflow returns no more at once


def record_history(registry: Registry, series: str, title: str, results: Sequence[Result], picture: str) -> str:
    """Add new results, of which the newest is the first, to the run of a series; returns the URL of its page.

    A metric is a score by time; its interval is beside it, as `interval/SCORE.low` and `interval/SCORE.high`.
    """
    ordered = results[::-1]
    with registry.asked():
        run = _run(registry, series, title)
        newest = int(run.data.tags.get(NEWEST, 0))  # a count would not do: results are removed with their model
        known = int(run.data.tags.get(LOGGED, 0)) if newest else 0
        added = [result for result in ordered if _time(result) > newest]
        metrics = [
            Metric(name, value, _time(result), step)
            for step, result in enumerate(added, known)
            for name, value in _values(result.figures).items()
        ]
        for start in range(0, len(metrics), BATCH):
            registry.client.log_batch(run.info.run_id, metrics=metrics[start : start + BATCH])
        registry.client.log_text(run.info.run_id, picture, PICTURE)
        if added:
            tags = [RunTag(LOGGED, str(known + len(added))), RunTag(NEWEST, str(_time(added[-1])))]
            registry.client.log_batch(run.info.run_id, tags=tags)
    return registry.page(str(run.info.experiment_id), run.info.run_id)


def histories(registry: Registry, fingerprint: str) -> dict[str, list[Result]]:
    """The results of a registered model over time, by subject and suite; of series with more than one result.

    `fingerprint` is that of one of its versions. Empty if the model is not registered.
    """
    with registry.asked():
        versions = registry.client.search_model_versions(f"tags.fingerprint = '{fingerprint}'", max_results=1)
    if not versions:
        return {}
    name = versions[0].name
    found: dict[str, list[Result]] = {}
    titles: dict[str, str] = {}
    for tags, result in registry.results(f"tags.title LIKE '{name} %'", MOST):
        if (series := tags.get("series")) is None:
            continue
        found.setdefault(series, []).append(result)
        titles.setdefault(series, f"{tags.get('subject', name)} on {tags['suite']}")
    shown: dict[str, list[Result]] = {}
    for series, results in found.items():
        if len(results) > 1:
            title = titles[series]
            again = sum(other.partition(", settings ")[0] == title for other in shown)
            shown[f"{title}, settings {again + 1}" if again else title] = results
    return shown


def _run(registry: Registry, series: str, title: str) -> Run:
    """The run of a series, also after a person deleted the one before."""
    experiment_id = registry.experiment_id(HISTORIES)
    found = registry.client.search_runs([experiment_id], f"tags.{SERIES} = '{series}'", max_results=1)
    if found:
        return found[0]
    made = registry.client.create_run(experiment_id, tags={SERIES: series}, run_name=title)
    registry.client.set_terminated(made.info.run_id)
    return made


def _time(result: Result) -> int:
    """The time of a result in milliseconds, as MLflow keeps it."""
    return round(result.when.timestamp() * 1000)


def _values(figures: Mapping[str, Figure]) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, figure in figures.items():
        low, high = score_interval(name, figure)
        values |= {name: figure.value, f"interval/{name}.low": low, f"interval/{name}.high": high}
    return values
