"""The Prefect deployment `evaluate`: score any model on any suite, compare it with earlier results, report a fall."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast

from prefect import Task, flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_UI_URL
from prefect.states import Completed
from pydantic import Field

from flows.deployments import explained, opened_store
from flows.execution.labels import name_of_this_run
from flows.execution.launch import Launcher
from flows.execution.progress import live, show_waiting
from flows.execution.stage_tasks import RETRY_DELAY, may_help
from flows.execution.watch import watched
from flows.form import SuiteName
from flows.handle import FELL
from flows.net import without_password
from flows.paths import local_folder
from flows.platform.events import payload
from flows.platform.schedules import schedule_of_this_run
from flows.reports.score_history import as_image, as_markdown, history_chart, history_page
from flows.tracking.histories import MOST, record_history
from flows.tracking.registry import SHOWN, Registry, RegistryError, Result, Subject, series
from vectorclm.comparison.config import Limits
from vectorclm.comparison.measurement import left_out, measure_plan
from vectorclm.config import load_suite
from vectorclm.errors import ConfigError, DataError, StoreError
from vectorclm.evaluation.statistics import Change, changes, figures
from vectorclm.lineage.pinning import pin_suite
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.temporary import temporary_folder
from vectorclm.store.artifact import Artifact, StageSpec, Store
from vectorclm.store.layout import MEASURE
from vectorclm.store.model_ref import Model, find_model

Address = Annotated[str, Field(pattern=r"^(models:/[^/@:]+(@[^/@]+|/[0-9]+)|/.+|[a-z0-9]+://[^@]+)$")]


@flow(name="evaluate", flow_run_name=name_of_this_run, persist_result=False)
def evaluate_run(
    model: Address = "models:/vectorclm-chat@candidate",
    suite: SuiteName = "tiny",
    limits: Limits = Limits(),
    data: str = "",
    runtime: Runtime = Runtime(),
) -> State[Any]:
    """Evaluate any model on a suite and compare it with its earlier results. Finished results are reused.

    Args:
        model: `models:/NAME@ALIAS` or `models:/NAME/VERSION` of MLflow's registry; `<store>/<stage>/<fingerprint>` of
            any store; or the absolute path of a model's folder on the worker.
        suite: A file of benchmarks (`standard`, `generation`), or an experiment whose evaluation is used: its tasks,
            and its held-out text and conversations if the store has them.
        limits: How much is measured. Results with different limits are not compared.
        data: Folder on the worker that mirrors the sources in the hub's schemas. Empty: they are read from the hub.
        runtime: How the machine runs it. Never part of a result.
    """
    return cast(State[Any], explained(lambda: _evaluate(model, suite, limits, data, runtime)))


def _evaluate(model: str, suite: str, limits: Limits, data: str, runtime: Runtime) -> State[Any]:
    store = opened_store(runtime)
    registry = Registry(store)
    subject, found = _model(registry, model)
    mirror = Path(data) if data else None
    asked, path = load_suite(suite)
    locks = local_folder(store) / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    pinned, notes = pin_suite(asked, locks / path.name, mirror)
    spec = measure_plan(pinned, limits, found, store, runtime)
    for line in [*notes, *left_out(spec, pinned, limits, runtime)]:
        get_run_logger().warning(line)
    with temporary_folder() as folder:
        (folder / "suite.json").write_text(pinned.model_dump_json(), encoding="utf-8")
        (folder / "runtime.json").write_text(runtime.model_dump_json(), encoding="utf-8")
        options = ["--suite", str(folder / "suite.json"), "--runtime", str(folder / "runtime.json")]
        options += ["--data", data] if data else []
        for key, value in limits.model_dump(exclude_defaults=True).items():
            options += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
        with watched():
            state = _measured(spec, found, [found.address, *options, "--store", store.uri], store, runtime)
    artifact = store.find(spec.stage, spec.fingerprint)
    assert artifact is not None
    _compare(registry, subject, artifact, needed=model.startswith("models:/"))
    return Completed(name=state.name, message=state.message, data={"uri": artifact.uri, "scores": artifact.summary})


def _model(registry: Registry, address: str) -> tuple[Subject, Model]:
    """Find the model; where it is gone, an error of a scheduled run also names how to end the schedule."""
    try:
        subject = registry.find(address)
        return subject, find_model(subject.address)
    except (ConfigError, DataError) as error:
        if (schedule := schedule_of_this_run()) is None:
            raise
        advice = f"end the schedule that evaluates it with `vectorclm schedule remove {shlex.quote(schedule)}`"
        raise ConfigError(f"{error}; {advice}") from error


def _measured(spec: StageSpec, model: Model, arguments: Sequence[str], store: Store, runtime: Runtime) -> State[Any]:
    """Run the task that builds the artifact of `spec` in a child process, or reuses it; returns its final state."""

    def measure() -> State[Any]:
        if (found := store.find_whole(spec)) is not None:
            model.verify(store)
            return Completed(name="Reused", message=f"measured already: {found.uri}")
        command = [sys.executable, "-m", "vectorclm", "evaluate", *arguments, "--relay"]
        log = get_run_logger().info
        name = flow_run.name or "an evaluation"
        with Launcher(local_folder(store) / "locks", name) as launcher, live(MEASURE, log):
            launcher.take_turn(show_waiting)
            launcher.run(command, log)
        if (artifact := store.find(spec.stage, spec.fingerprint)) is None:
            raise StoreError(f"measured, but {store.uri_of(spec.stage)} lacks {spec.fingerprint}")
        return Completed(message=f"measured: {artifact.uri}")

    task: Task[[], Any] = Task(
        measure,
        name=MEASURE,
        task_run_name=MEASURE,
        retries=runtime.retries,
        retry_delay_seconds=RETRY_DELAY,
        retry_condition_fn=may_help,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    state: State[Any] = task(return_state=True)
    if not state.is_completed():
        state.result()  # raises the task's error
    return state


def _compare(registry: Registry, subject: Subject, artifact: Artifact, *, needed: bool) -> None:
    """Compare the result with earlier ones in a table; record a new one in MLflow and report scores that fell.

    A result is new if it differs from the newest one. It is recorded last, so that a report that a crash interrupts is
    sent again rather than never. Raises RegistryError where MLflow is `needed` and does not answer.
    """
    settings = artifact.manifest["config"]
    this = Result(subject.title, datetime.now(UTC), artifact.fingerprint, figures(artifact.summary))
    recorded = True
    try:
        before = registry.history(subject, settings)
        if before and before[0].fingerprint == this.fingerprint:
            results = [replace(before[0], title=subject.title), *before[1:]]
        else:
            results = [this, *before][:SHOWN]
            _tell(subject, settings["suite"], results)
            page = registry.record(subject, artifact, str(flow_run.id) if flow_run.id else None)
            get_run_logger().info("recorded in MLflow: %s", page)
    except RegistryError as error:
        if needed:
            raise
        get_run_logger().warning("%s; the result is in the store but not in MLflow, and is not compared", error)
        results, recorded = [this], False
    about = f"`{subject.title}` on `{settings['suite']}`, newest first; each score ± its standard error"
    rows = table(results, artifact.summary.get("not_run", ()))
    create_table_artifact(rows, key=_key("evaluation", subject.name, settings["suite"]), description=about)
    if recorded:
        _show_history(registry, subject, settings)


def _show_history(registry: Registry, subject: Subject, settings: Mapping[str, Any]) -> None:
    """Show the scores over time as one chart: under the run's artifacts, as a page of the platform, and in MLflow.

    The evaluation is done and recorded, so a store or an MLflow that fails now is a warning.
    """
    title, id_of_series = f"{subject.name} on {settings['suite']}", series(subject.name, settings)
    key = f"reports/{id_of_series}.html"
    ui = PREFECT_UI_URL.value() if deployment.id is not None else None  # of a platform, whose server shows reports
    link = f"{without_password(ui).rstrip('/')}/{key}" if ui else None
    try:
        results = registry.history(subject, settings, MOST)
        registry.store.write(key, history_page(title, results).encode())
        text = as_markdown(title, results, link)
        about = f"`{title}`: every result with its 95 % interval"
        create_markdown_artifact(text, key=_key("scores", subject.name, settings["suite"]), description=about)
        picture = as_image(history_chart(title, results))
        page = record_history(registry, id_of_series, title, results, picture)
        get_run_logger().info("scores over time in MLflow: %s", page)
    except (RegistryError, StoreError, OSError) as error:
        get_run_logger().warning("%s; the next evaluation adds this result to the scores over time", error)


def table(results: Sequence[Result], not_run: Sequence[str] = ()) -> list[dict[str, str]]:
    """One row for each result, newest first: every score and its difference from the result before.

    All results of a table have the same settings, so a task that needs a missing sandbox is missing in all.
    """
    rows = []
    for number, result in enumerate(results):
        row = {"model": result.title, "measured": f"{result.when:%Y-%m-%d %H:%M} UTC"}
        before = results[number + 1].figures if number + 1 < len(results) else {}
        found = {change.name: change for change in changes(before, result.figures)}
        for name, figure in result.figures.items():
            row[name] = f"{figure.value:.4f} ± {figure.stderr:.4f}"
            if (change := found.get(name)) is not None:
                row[name] += f" ({change.difference:+.4f}, {_verdict(change)})"
        rows.append(row | {f"acc.{label}": "not run" for label in not_run})
    return rows


def _verdict(change: Change) -> str:
    if not change.beyond_noise:
        return "within noise"
    return "worse, beyond noise" if change.fell else "better, beyond noise"


def _tell(subject: Subject, suite: str, results: Sequence[Result]) -> None:
    """Emit one event if scores fell by more than the noise since the result before; an automation forwards it."""
    if len(results) < 2:
        return
    this, before = results[:2]
    fallen = [change for change in changes(before.figures, this.figures) if change.fell]
    if not fallen:
        return
    lines = [
        f"{change.name}: {change.before.value:.4f} -> {change.after.value:.4f} (noise {change.noise:.4f})"
        for change in fallen
    ]
    title = f"{this.title} scores worse than {before.title} on {suite}"
    get_run_logger().warning("%s: %s", title, "; ".join(lines))
    page = str(flow_run.ui_url) if flow_run.ui_url else None
    falls = [
        {"task": change.name, "before": change.before.value, "after": change.after.value, "noise": change.noise}
        for change in fallen
    ]
    about = {"model": this.title, "before": before.title, "suite": suite, "falls": falls}
    emit_event(
        FELL,
        resource={
            "prefect.resource.id": f"vectorclm.{_key('evaluation', subject.name, suite)}",
            "prefect.resource.name": f"{subject.name} on {suite}",
        },
        payload=payload([title, *lines], page, about),
    )


def _key(kind: str, name: str, suite: str) -> str:
    """The key of a Prefect artifact: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{kind} {name} {suite}".lower()).strip("-")
