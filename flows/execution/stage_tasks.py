"""Stages as Prefect tasks: reuse the artifact from the store, or have the core build it.

Reuse is decided here and in the core, never by Prefect's cache, so Retry in the UI, a new run and a run after a
crash all behave alike.
"""

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import prefect.runtime
from prefect import Task, get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture, wait
from prefect.settings import PREFECT_UI_URL
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.execution.engines.choice import check_engine, on_nodes, with_workers
from flows.execution.engines.node import RUNTIME
from flows.execution.launch import (
    Launcher,
    StageCancelledError,
    StageFailedError,
    StageInterruptedError,
    under_torchrun,
)
from flows.execution.overview import BUILT, FAILED, REUSED, Overview, show
from flows.execution.placement import run_in_pool
from flows.execution.progress import live, show_waiting
from flows.execution.watch import is_cancelled
from flows.handle import Handle, duration, stage_handle
from flows.net import without_password
from flows.paths import local_folder
from flows.reports.report import report
from flows.reports.summary import Summary
from flows.tracking.client import REGISTERED, TRAINING_VIEW, page_url, run_page
from flows.tracking.tracker import Tracker
from vectorclm.config import ExperimentConfig
from vectorclm.errors import CorruptArtifactError, InUseError, StoreError, VectorCLMError, disk_error
from vectorclm.lineage.chain import lineage
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.library_calls import ending
from vectorclm.runtime.temporary import temporary_folder
from vectorclm.stages import BY_NAME, last_model, plans, rebuild_stage, run_stage, summary_lines
from vectorclm.store.artifact import Artifact, rebuilt_because
from vectorclm.store.layout import EXPORT
from vectorclm.store.patience import PatientStore
from vectorclm.store.removal import protected

CURRICULUM = "curriculum"  # the name of its flow
EXPERIMENT = "experiment.json"
RETRY_DELAY = 5  # seconds
LINK_SECONDS = 15  # to wait for the link to MLflow, while the stages run
CHAMPION_SECONDS = 30  # to wait for the name of the champion
WAIT_SECONDS = 3  # between two checks of a stage that another run builds

logger = logging.getLogger(__name__)


class Stages:
    """The stages of one curriculum as Prefect tasks: `with Stages(...) as stage: sample = stage("sample")`."""

    def __init__(
        self,
        experiment: ExperimentConfig,
        runtime: Runtime,
        store: str,
        data: Path | None,
        again_from: str | None = None,
    ) -> None:
        self.experiment, self.runtime, self.data = experiment, runtime, data
        if runtime.placement == "inline":
            check_engine(runtime)
        self.store = PatientStore(store)
        self.plans = plans(experiment)
        self.again = {again_from} if again_from else set[str]()  # rebuilt and compared, with all that depends on it
        for name, spec in self.plans.items():
            if self.again & set(spec.inputs):
                self.again.add(name)
        name = prefect.runtime.flow_run.name or experiment.name
        self.launcher = Launcher(local_folder(self.store) / "locks", name)
        self._futures: dict[str, PrefectFuture[Any]] = {}
        context = FlowRunContext.get()
        flow_run = context.flow_run if context is not None else None
        own = str(flow_run.id) if flow_run is not None else None
        root = prefect.runtime.flow_run.root_flow_run_id
        self.tracker = Tracker(self.store, experiment, self.plans, own, root, None if name == experiment.name else name)
        self.tracker.common["device"] = runtime.device_type()
        if own is not None and (page := prefect.runtime.flow_run.ui_url):
            self.tracker.common["prefect.flow_run_url"] = str(page)
        self.served = prefect.runtime.deployment.id is not None  # by a platform, whose server shows reports
        self.overview = Overview(name, list(self.plans))

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            elsewhere = len(self.plans) if self.runtime.placement == "pools" else None
            workers = self.runtime.parallel_stages or elsewhere or default_workers()
            self._runner: ThreadPoolTaskRunner[Any] = stack.enter_context(ThreadPoolTaskRunner(max_workers=workers))
            self.folder = stack.enter_context(temporary_folder())
            (self.folder / EXPERIMENT).write_text(self.experiment.model_dump_json(), encoding="utf-8")
            (self.folder / RUNTIME).write_text(self.runtime.model_dump_json(), encoding="utf-8")
            stack.enter_context(protected(self.store, list(self.plans.values())))
            stack.enter_context(self.overview)
            stack.enter_context(self.tracker)
            stack.enter_context(self.launcher)  # entered last: children end before their MLflow run is closed
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = kind is not None and issubclass(kind, TerminationSignal | SystemExit)
        self.launcher.preempted = ended and not is_cancelled()
        try:
            if kind is not None:
                ending.set()  # for stages that run in threads of this process
            self._stack.__exit__(kind, error, trace)
        finally:
            ending.clear()

    def __call__(self, name: str, *after: PrefectFuture[Any]) -> PrefectFuture[Any]:
        """Submit the stage `name`, to start when the stages `after` are done.

        Submit stages in topological order: then even one worker cannot deadlock.
        """

        def stage() -> State[Handle]:
            return self._run(name)

        task: Task[[], Any] = Task(
            stage,
            name=name,
            task_run_name=name,
            retries=self.runtime.retries,
            retry_delay_seconds=RETRY_DELAY,
            retry_condition_fn=may_help,
            cache_policy=NO_CACHE,
            persist_result=False,
            result_serializer="json",
        )
        self._futures[name] = self._runner.submit(task, {}, wait_for=list(after))
        return self._futures[name]

    def handles(self) -> dict[str, Handle]:
        """Wait for all submitted stages and return the handle of each.

        Raises StageFailedError naming the first stage that failed, after the stages beside it have ended.
        """
        if (page := self.tracker.page(LINK_SECONDS)) is not None:
            show("mlflow", f"[this run in MLflow]({page})", "Curves and lineage")
            self.overview.links["run in MLflow"] = page
        wait(list(self._futures.values()))
        handles: dict[str, Handle] = {}
        for name, future in self._futures.items():
            result = future.result(raise_on_failure=False)
            if isinstance(result, BaseException):
                raise _failure(name, result) from result
            handles[name] = result
        if EXPORT in handles:
            self._report(handles)
        return handles

    def _report(self, handles: dict[str, Handle]) -> None:
        """Write the curriculum's report into the store, and link it in MLflow and Prefect.

        An error here costs the report, never the curriculum: its artifacts are built.
        """
        try:
            self.overview.results = Summary(self.experiment, self.store, handles).as_markdown()
            champion = self.tracker.champion(CHAMPION_SECONDS)
            page = report(
                lineage(handles[last_model(handles)]["uri"], self.store),
                self.store,
                lineage(champion, self.store) if champion is not None else None,
                self.experiment.name,
            )
            key = f"reports/{handles[EXPORT]['fingerprint']}.html"
            self.store.write(key, page.encode())
            place = self.tracker.report(page) or self.store.uri_of(key)
            show("page", f"[the report]({place})", "Curves, scores, samples, data")
            self._link(f"/{key}")
        except Exception as error:
            logger.warning("no report: %s: %s", type(error).__name__, error)

    def _link(self, report: str) -> None:
        """Link the report, the models and the data in the overview, where a server shows them in a browser."""
        links = self.overview.links
        if self.served and (ui := PREFECT_UI_URL.value()):
            links["report"] = without_password(ui).rstrip("/") + report
        if (mlflow := self.tracker.uri).startswith("http"):
            links["chat model"] = page_url(mlflow, f"#/models/{REGISTERED['finetune']}{TRAINING_VIEW}")
            links["base model"] = page_url(mlflow, f"#/models/{REGISTERED['pretrain']}{TRAINING_VIEW}")
            if (run_id := self.tracker.run_ids.get("shards")) is not None:
                links["data"] = page_url(mlflow, run_page(self.tracker.experiment_id, run_id))

    def _run(self, name: str) -> State[Handle]:
        """Build or reuse a stage, and show it; an error that a retry cannot help ends the task in one line."""
        try:
            return self._build(name)
        except (VectorCLMError, OSError) as error:
            self.overview.ends(name, FAILED, note=str(error).partition("\n")[0])
            context = TaskRunContext.get()
            last = context is None or context.task_run.run_count > self.runtime.retries
            if not last and helps(error):
                raise
            leave_out("prefect.task_runs", "Task run failed with state")
            return Failed(message="failed: the end of the run's log says why", data=error)

    def _build(self, name: str) -> State[Handle]:
        began = time.monotonic()
        found = self._found(name)
        if found is not None and name not in self.again:
            BY_NAME[name].check(self.experiment, found.summary)
            self.tracker.reused(name, found)
            logger.info("%s reused", name)
            self.overview.ends(name, REUSED)
            handle = stage_handle(name, found, "reused", began)
            return Completed(name="Reused", message=f"reused {found.fingerprint[:16]}", data=handle)
        self.overview.begins(name, self.store.work_folder(self.plans[name], self.runtime.work_dir))
        artifact = self._in_pool(name) if self.runtime.placement == "pools" else self._here(name)
        if found is not None:
            logger.info("%s rebuilt, identical to the byte", name)
            self.overview.ends(name, REUSED, note="rebuilt, identical to the byte")
            return Completed(
                name="Reproduced",
                message=f"rebuilt, identical to the byte: {found.fingerprint[:16]}",
                data=stage_handle(name, found, "reused", began),
            )
        handle = stage_handle(name, artifact, "built", began)
        self.overview.ends(name, BUILT, handle["seconds"])
        logger.info("%s built in %s", name, duration(handle["seconds"]))
        for line in summary_lines(name, artifact.summary):
            logger.info("%s", line)
        return Completed(message=f"built in {duration(handle['seconds'])}", data=handle)

    def _found(self, name: str) -> Artifact | None:
        """The artifact of a stage; None if it is missing or damaged, so that it is built again."""
        spec = self.plans[name]
        try:
            return self.store.find(spec.stage, spec.fingerprint)
        except CorruptArtifactError as error:
            if BY_NAME[name].own_process or self.runtime.placement == "pools":  # else the builder warns
                logger.warning("%s", rebuilt_because(spec, error))
            return None

    def _here(self, name: str) -> Artifact:
        """Build the artifact on this machine, with its progress in MLflow and Prefect."""
        context = TaskRunContext.get()
        attempt = context.task_run.run_count if context is not None else 1
        folder = self.store.work_folder(self.plans[name], self.runtime.work_dir)
        with self.tracker.stage(name, attempt, folder) as tracked, live(name, get_run_logger().info):
            artifact = self._make_or_wait(name)
            tracked.finished(artifact)
        return artifact

    def _in_pool(self, name: str) -> Artifact:
        """Have a worker of the stage's pool build the artifact, from this experiment with its pinned sources."""
        settings: dict[str, Any] = dict.fromkeys(set(ExperimentConfig.model_fields) - {"name"})
        settings |= self.experiment.model_dump(mode="json", exclude={"name"})  # leaves out what is absent
        parameters = {
            "stage": name,
            "experiment": self.experiment.name,
            "changes": {"settings": settings},
            "data": str(self.data or ""),
            "runtime": self.runtime.model_copy(update={"placement": "inline"}).model_dump(),
            "again": name in self.again,
        }
        run_in_pool(name, parameters, self.launcher.closed, get_run_logger().info)
        return self._made(name)

    def _make_or_wait(self, name: str) -> Artifact:
        """Build the artifact, or wait for another run that builds it already."""
        warned = False
        while True:
            try:
                return self._make(name)
            except InUseError as error:
                if not warned:
                    logger.warning("%s: another run builds it already, so this one waits (%s)", name, error)
                warned = True
            if self.launcher.closed.wait(WAIT_SECONDS):
                raise StageCancelledError("ended with the curriculum")

    def _make(self, name: str) -> Artifact:
        by_ray = self.runtime.engine == "ray" and BY_NAME[name].sliced
        if not BY_NAME[name].own_process and not by_ray:
            again = name in self.again
            build = rebuild_stage if again else run_stage
            return build(name, self.experiment, self.store, self.runtime, self.data)[0]
        if self.runtime.engine != "ray" or not (
            BY_NAME[name].trains or by_ray
        ):  # Ray shares its machines out by itself
            self.launcher.take_turn(show_waiting)
        self.launcher.run(self._command(name), get_run_logger().info)
        return self._made(name)

    def _command(self, name: str) -> list[str]:
        """The command that builds a stage in a process of its own, or on the processes and nodes of the runtime."""
        elsewhere = BY_NAME[name].trains and self.runtime.engine != "local"
        folder = Path() if elsewhere else self.folder  # each node has these files in its working folder
        stage = ["-m", "vectorclm", name, str(folder / EXPERIMENT), "--relay", "--store", self.store.uri]
        stage += ["--runtime", str(folder / RUNTIME)]
        stage += ["--data", str(self.data)] if self.data is not None else []
        stage += ["--again"] if name in self.again else []
        if BY_NAME[name].sliced:
            return with_workers(self.runtime, stage)
        if elsewhere:
            return on_nodes(self.runtime, stage, self.folder / EXPERIMENT)
        processes = self.runtime.training_processes() if BY_NAME[name].trains else 1
        command = [sys.executable, *stage]
        return command if processes == 1 else under_torchrun(command, processes, self.runtime.threads_each(processes))

    def _made(self, name: str) -> Artifact:
        spec = self.plans[name]
        if (artifact := self.store.find(spec.stage, spec.fingerprint)) is None:
            place = self.store.uri_of(spec.stage)
            raise StoreError(f"{name} ended without an error, but {place} lacks {spec.fingerprint}")
        return artifact


def leave_out(name: str, begins: str) -> None:
    """Leave out Prefect's tracebacks about an expected error, which is one line at the end of the log."""
    logging.getLogger(name).addFilter(_others(begins))


@cache
def _others(begins: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(begins)


def default_workers() -> int:
    """The default number of stages that run in parallel: one for each two cores."""
    return max(1, (os.cpu_count() or 1) // 2)


def may_help(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a retry may help, which is then said in the log."""
    if useful := helps(state.data):
        logger.warning("%s: %s; trying again", run.name, str(state.data).partition("\n")[0])
    return useful


def helps(error: object) -> bool:
    """Whether a retry may help: the store or the machine failed, not the settings or the data."""
    if isinstance(error, CorruptArtifactError | StageCancelledError):
        return False
    return isinstance(error, StoreError | OSError | StageInterruptedError)


def _failure(name: str, error: BaseException) -> StageFailedError:
    """The error of a curriculum whose stage failed: what is wrong, where, and what to do."""
    error = disk_error(error) or error
    what = str(error) if isinstance(error, VectorCLMError) else f"{type(error).__name__}: {error}"
    todo = _how_to_continue(is_bug=not isinstance(error, VectorCLMError | OSError))
    return StageFailedError(f"stage {name} failed: {what}\nFinished stages are kept and will be reused; {todo}.")


def _how_to_continue(*, is_bug: bool) -> str:
    """What continues this run after its failure: the button in Prefect's page and the command, or the command."""
    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    by_deployment = run is not None and run.deployment_id is not None
    if is_bug:
        return f"this is a bug of the program; {'the log of this run' if by_deployment else '--verbose'} shows where"
    if context is None or run is None or not by_deployment:  # Prefect's page cannot start `vectorclm run`
        return "fix it and run the same command again"
    button = "fix it, then press Retry on the page of this run in Prefect"
    if context.flow is None or context.flow.name != CURRICULUM:
        return f"{button}, or start a custom run of its deployment with other settings"
    store = os.environ.get("VECTORCLM_STORE")  # set by the platform, so that the command works in any folder
    command = f"vectorclm retry {run.id}{f' --store {shlex.quote(store)}' if store else ''}"
    return f"{button}, or run `{command}`; with another setting, run `{command} --set KEY=VALUE`"
