"""One Prefect task a stage: find the artifact, or have the core make it.

The skip lives here and in the core, never in Prefect's cache, so the UI's Retry, a new run and a run after a
crash all carry on alike.
"""

import logging
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import prefect.runtime
from prefect import Task, get_run_logger
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture, wait
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.execution.launch import (
    Launcher,
    StageCancelledError,
    StageFailedError,
    StageInterruptedError,
    under_torchrun,
)
from flows.execution.placement import run_in_pool
from flows.execution.progress import live, show_waiting
from flows.execution.watch import is_cancelled
from flows.handle import Handle, duration, stage_handle
from flows.paths import local_folder
from flows.reports.report import report
from flows.tracking.tracker import Tracker
from vectorclm.config import ExperimentConfig
from vectorclm.errors import CorruptArtifactError, DataError, InUseError, StoreError, VectorCLMError
from vectorclm.lineage.chain import lineage
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.library_calls import ending
from vectorclm.stages import BY_NAME, plans, rebuild_stage, run_stage, summary_lines
from vectorclm.store.artifact import Artifact, Store, rebuilt_because

RETRY_DELAY = 5  # seconds
LINK_SECONDS = 15  # how long the link to MLflow is waited for, while the stages run
CHAMPION_SECONDS = 30  # how long the name of the champion is waited for
WAIT_SECONDS = 3  # between two looks at what another run makes

logger = logging.getLogger(__name__)


class Stages:
    """The stages of one curriculum as tasks: `with Stages(...) as stage: sample = stage("sample")`."""

    def __init__(
        self,
        experiment: ExperimentConfig,
        runtime: Runtime,
        store: str,
        data: Path | None,
        again_from: str | None = None,
    ) -> None:
        self.experiment, self.runtime, self.data = experiment, runtime, data
        self.store = Store(store)
        self.plans = plans(experiment)
        self.again = {again_from} if again_from else set[str]()  # made again and compared, and all that is made from it
        for name, plan in self.plans.items():
            if self.again & set(plan.inputs):
                self.again.add(name)
        self.launcher = Launcher(local_folder(self.store) / "locks")
        self._futures: dict[str, PrefectFuture[Any]] = {}
        context = FlowRunContext.get()
        flow_run = context.flow_run if context is not None else None
        own = str(flow_run.id) if flow_run is not None else None
        self.tracker = Tracker(self.store, experiment, self.plans, own, prefect.runtime.flow_run.root_flow_run_id)
        self.tracker.common["device"] = runtime.torch_device().type
        if own is not None and (page := prefect.runtime.flow_run.ui_url):
            self.tracker.common["prefect.flow_run_url"] = str(page)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            elsewhere = len(self.plans) if self.runtime.placement == "pools" else None
            workers = self.runtime.parallel_stages or elsewhere or default_workers()
            self._runner: ThreadPoolTaskRunner[Any] = stack.enter_context(ThreadPoolTaskRunner(max_workers=workers))
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vectorclm-")))
            (self.folder / "experiment.json").write_text(self.experiment.model_dump_json(), encoding="utf-8")
            (self.folder / "runtime.json").write_text(self.runtime.model_dump_json(), encoding="utf-8")
            stack.enter_context(self.tracker)
            stack.enter_context(self.launcher)  # the last in, so that children end before their run is closed
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = kind is not None and issubclass(kind, TerminationSignal | SystemExit)
        self.launcher.preempted = ended and not is_cancelled()
        try:
            if kind is not None:
                ending.set()  # for stages that are made in threads of this process
            self._stack.__exit__(kind, error, trace)
        finally:
            ending.clear()

    def __call__(self, name: str, *after: PrefectFuture[Any]) -> PrefectFuture[Any]:
        """Submit the stage `name`, to start when the stages `after` are done.

        In topological order every stage's inputs are submitted before it, so even one worker cannot deadlock.
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
        """Wait for all submitted stages and return what each gave.

        Raises StageFailedError naming the first that failed, once those beside it have ended.
        """
        if (page := self.tracker.page(LINK_SECONDS)) is not None:
            create_link_artifact(page, link_text="this run in MLflow", key="mlflow")
        wait(list(self._futures.values()))
        handles: dict[str, Handle] = {}
        for name, future in self._futures.items():
            result = future.result(raise_on_failure=False)
            if isinstance(result, BaseException):
                raise _failure(name, result) from result
            handles[name] = result
        if "export" in handles:
            self._report(handles)
        return handles

    def _report(self, handles: dict[str, Handle]) -> None:
        """Write the curriculum's page into the store, and tell MLflow and Prefect of it.

        What fails here costs the page, never the curriculum: its artifacts are made.
        """
        try:
            champion = self.tracker.champion(CHAMPION_SECONDS)
            page = report(
                lineage(handles["finetune"]["uri"], self.store),
                self.store,
                lineage(champion, self.store) if champion is not None else None,
                self.experiment.name,
            )
            key = f"reports/{handles['export']['fingerprint']}.html"
            self.store.write(key, page.encode())
            place = self.tracker.report(page) or self.store.uri_of(key)
            create_link_artifact(place, link_text="the report", key="page")
            logger.info("report: %s", self.store.uri_of(key))
        except Exception as error:
            logger.warning("no report: %s: %s", type(error).__name__, error)

    def _run(self, name: str) -> State[Handle]:
        began = time.monotonic()
        found = self._found(name)
        if found is not None and name not in self.again:
            self.tracker.reused(name, found)
            logger.info("%s reused", name)
            handle = stage_handle(name, found, "reused", began)
            return Completed(name="Reused", message=f"{found.uri} was there already", data=handle)
        artifact = self._in_pool(name) if self.runtime.placement == "pools" else self._here(name)
        if found is not None:
            logger.info("%s made again, the same to the byte", name)
            return Completed(
                name="Reproduced",
                message=f"made again, the same to the byte: {found.uri}",
                data=stage_handle(name, found, "reused", began),
            )
        handle = stage_handle(name, artifact, "built", began)
        logger.info("%s built in %s", name, duration(handle["seconds"]))
        for line in summary_lines(name, artifact.summary):
            logger.info("%s", line)
        return Completed(message=f"built {artifact.uri} in {duration(handle['seconds'])}", data=handle)

    def _found(self, name: str) -> Artifact | None:
        """The artifact of a stage, or None, also where it is damaged, so that it is made again."""
        plan = self.plans[name]
        try:
            return self.store.find(plan.stage, plan.fingerprint)
        except CorruptArtifactError as error:
            if BY_NAME[name].own_process or self.runtime.placement == "pools":  # the other process warns in its own log
                logger.warning("%s", rebuilt_because(plan, error))
            return None

    def _here(self, name: str) -> Artifact:
        """Make the artifact on this machine, seen in MLflow and Prefect."""
        context = TaskRunContext.get()
        attempt = context.task_run.run_count if context is not None else 1
        folder = self.store.work_folder(self.plans[name], self.runtime.work_dir)
        with self.tracker.stage(name, attempt, folder) as tracked, live(name, get_run_logger().info):
            artifact = self._make_or_wait(name)
            tracked.finished(artifact)
        return artifact

    def _in_pool(self, name: str) -> Artifact:
        """Have a worker of the stage's pool make the artifact, from this very experiment with its pinned sources."""
        parameters = {
            "stage": name,
            "experiment": self.experiment.name,
            "changes": {"settings": self.experiment.model_dump(mode="json", exclude={"name"})},
            "data": str(self.data or ""),
            "runtime": self.runtime.model_copy(update={"placement": "inline"}).model_dump(),
            "again": name in self.again,
        }
        run_in_pool(name, parameters, self.launcher.closed, get_run_logger().info)
        return self._made(name)

    def _make_or_wait(self, name: str) -> Artifact:
        """The artifact, made here or by another run that is at it already."""
        told = False
        while True:
            try:
                return self._make(name)
            except InUseError as error:
                if not told:
                    logger.warning("%s: another run makes it already, so this one waits (%s)", name, error)
                told = True
            if self.launcher.closed.wait(WAIT_SECONDS):
                raise StageCancelledError("ended with the curriculum")

    def _make(self, name: str) -> Artifact:
        if not BY_NAME[name].own_process:
            again = name in self.again
            build = rebuild_stage if again else run_stage
            return build(name, self.experiment, self.store, self.runtime, self.data)[0]
        self.launcher.take_turn(show_waiting)
        processes = self.runtime.training_processes() if BY_NAME[name].trains else 1
        command = [sys.executable, "-m", "vectorclm", name, str(self.folder / "experiment.json"), "--relay"]
        command += ["--store", self.store.uri, "--runtime", str(self.folder / "runtime.json")]
        command += ["--data", str(self.data)] if self.data is not None else []
        command += ["--again"] if name in self.again else []
        if processes > 1:
            command = under_torchrun(command, processes, self.runtime.threads_each(processes))
        self.launcher.run(command, get_run_logger().info)
        return self._made(name)

    def _made(self, name: str) -> Artifact:
        plan = self.plans[name]
        if (made := self.store.find(plan.stage, plan.fingerprint)) is None:
            raise StoreError(f"{name} ended well, but {self.store.uri_of(plan.stage)} lacks {plan.fingerprint}")
        return made


def default_workers() -> int:
    """How many stages run side by side where the runtime leaves it open: one for each two cores."""
    return max(1, (os.cpu_count() or 1) // 2)


def may_help(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether another attempt can mend it: it was the store's or the machine's fault, not the settings'."""
    error = state.data
    if isinstance(error, CorruptArtifactError | StageCancelledError):
        return False
    helps = isinstance(error, StoreError | OSError | StageInterruptedError)
    if helps:
        logger.warning("%s: %s; trying again", run.name, str(error).partition("\n")[0])
    return helps


def _failure(name: str, error: BaseException) -> StageFailedError:
    """What went wrong, where, and what to do."""
    if isinstance(error, DataError | CorruptArtifactError | StageCancelledError | StageInterruptedError):
        todo = "mend that and run the same command again"
    elif isinstance(error, VectorCLMError | OSError):
        todo = "mend that and run again"
    else:
        todo = "this is a fault of the program; with --verbose it shows where"
    what = str(error) if isinstance(error, VectorCLMError) else f"{type(error).__name__}: {error}"
    return StageFailedError(f"stage {name} failed: {what}\nFinished stages are kept and will be reused; {todo}.")
