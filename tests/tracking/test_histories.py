"""Scores over time in MLflow: one run for a series, which grows, and the histories of a registered model."""

from datetime import UTC, datetime, timedelta

import pytest

from flows.tracking.histories import HISTORIES, PICTURE, histories, record_history
from flows.tracking.lookup import score_histories
from flows.tracking.registry import Registry, Result, series
from tests.services.curricula import Recorded, copied
from tests.tracking.test_registry import measured
from vectorclm.evaluation.statistics import Figure
from vectorclm.store.artifact import Store

NOW = datetime(2026, 3, 30, 3, tzinfo=UTC)


@pytest.fixture(scope="module")
def store(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return copied(recorded, tmp_path_factory.mktemp("histories"))


def result(day: int, accuracy: float) -> Result:
    return Result(f"m {day}", NOW + timedelta(days=day), "f" * 64, {"acc.world": Figure(accuracy, 0.1)})


def points(registry: Registry, run_id: str, name: str) -> list[tuple[int, float, int]]:
    found = registry.client.get_metric_history(run_id, name)
    return sorted((point.step, round(point.value, 4), point.timestamp) for point in found)


def test_a_run_of_a_series_grows_by_time_with_its_intervals(store: Store) -> None:
    registry = Registry(store)
    results = [result(1, 0.5), result(0, 0.95)]
    first = record_history(registry, "s1", "m on s", results, "<svg>1</svg>")
    results = [result(2, 0.4), *results]
    assert record_history(registry, "s1", "m on s", results, "<svg>2</svg>") == first
    assert record_history(registry, "s1", "m on s", results, "<svg>2</svg>") == first  # nothing new
    place = registry.experiment_id(HISTORIES)
    (run,) = registry.client.search_runs([place], "tags.history = 's1'")
    assert run.info.run_name == "m on s" and run.info.status == "FINISHED"
    milliseconds = [round(found.when.timestamp() * 1000) for found in results[::-1]]
    known = points(registry, run.info.run_id, "acc.world")
    assert known == list(zip((0, 1, 2), (0.95, 0.5, 0.4), milliseconds, strict=True))
    assert [value for _, value, _ in points(registry, run.info.run_id, "interval/acc.world.high")] == [
        1.0,
        0.696,
        0.596,
    ]
    assert [value for _, value, _ in points(registry, run.info.run_id, "interval/acc.world.low")] == [
        0.754,
        0.304,
        0.204,
    ]
    assert [file.path for file in registry.client.list_artifacts(run.info.run_id)] == [PICTURE]

    registry.client.delete_run(run.info.run_id)  # by a person, in MLflow's page
    record_history(registry, "s1", "m on s", results, "<svg>2</svg>")
    (again,) = registry.client.search_runs([place], "tags.history = 's1'")
    assert again.info.run_id != run.info.run_id and points(registry, again.info.run_id, "acc.world") == known


def test_a_new_result_is_added_after_older_ones_were_removed(store: Store) -> None:
    """Removed with their model, or beyond the number of results that MLflow returns."""
    registry = Registry(store)
    results = [result(2, 0.6), result(1, 0.5), result(0, 0.4)]
    record_history(registry, "s2", "m on s", results, "<svg>1</svg>")
    for day in (3, 4):
        results = [result(day, 0.7), results[0], results[-1]]
        record_history(registry, "s2", "m on s", results, "<svg>2</svg>")
    record_history(registry, "s2", "m on s", results[1:], "<svg>2</svg>")  # the newest was removed
    record_history(registry, "s2", "m on s", [result(5, 0.8)], "<svg>2</svg>")
    (run,) = registry.client.search_runs([registry.experiment_id(HISTORIES)], "tags.history = 's2'")
    known = [(step, value) for step, value, _ in points(registry, run.info.run_id, "acc.world")]
    assert known == list(enumerate((0.4, 0.5, 0.6, 0.7, 0.7, 0.8)))


def test_the_histories_of_a_model_are_those_with_several_results(recorded: Recorded, store: Store) -> None:
    registry = Registry(store)
    subject, fingerprint = (
        registry.find("models:/vectorclm-base@candidate"),
        recorded.handles["pretrain"]["fingerprint"],
    )
    before = histories(registry, fingerprint)
    for accuracy, digit in ((0.4, "5"), (0.5, "6")):
        registry.record(subject, measured(recorded, accuracy, digit), "a flow run")
    found = histories(registry, fingerprint)
    assert found == score_histories(fingerprint, store)
    (title,) = found.keys() - before.keys()
    assert title.startswith("vectorclm-base@candidate on s")
    assert [one.figures["acc.world"].value for one in found[title]][:2] == [0.5, 0.4]
    assert series(subject.name, {"suite": "s"}) != series("vectorclm-base", {"suite": "s"})
    assert histories(registry, "0" * 64) == {}


def test_without_mlflow_there_is_no_history(
    recorded: Recorded, store: Store, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = recorded.handles["pretrain"]["fingerprint"]
    assert score_histories(fingerprint, Store(str(tmp_path_factory.mktemp("none")))) == {}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert score_histories(fingerprint, store) == {}
