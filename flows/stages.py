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
from typing import Any, Self, TypedDict

from prefect import Task, get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.futures import PrefectFuture, wait
from prefect.states import Completed

from flows.launch import Launcher, StageCancelledError, StageFailedError, StageInterruptedError
from flows.tracking import Tracker
from vectorclm.artifact import Artifact, Store
from vectorclm.config import ExperimentConfig
from vectorclm.errors import CorruptArtifactError, DataError, StoreError, VectorCLMError
from vectorclm.runtime import Runtime
from vectorclm.stages import plans, run_stage

TORCH_STAGES = frozenset({"pretrain", "finetune", "evaluate", "evaluate_base"})  # each in a process of its own
RETRY_DELAY = 5  # seconds

logger = logging.getLogger(__name__)


class Handle(TypedDict):
    """What a stage leaves in Prefect: where its artifact is, and whether it was made now."""

    stage: str
    fingerprint: str
    uri: str
    state: str  # built, reused
    seconds: float


class Stages:
    """The stages of one curriculum as tasks: `with Stages(...) as stage: sample = stage("sample")`."""

    def __init__(self, experiment: ExperimentConfig, runtime: Runtime, store: str, data: Path | None) -> None:
        self.experiment, self.runtime, self.data = experiment, runtime, data
        self.store = Store(store)
        self.plans = plans(experiment)
        self.launcher = Launcher()
        self._futures: dict[str, PrefectFuture[Any]] = {}
        context = FlowRunContext.get()
        flow_run = context.flow_run if context is not None else None
        self.tracker = Tracker(self.store, experiment, self.plans, str(flow_run.id) if flow_run else None)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
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
        self._stack.__exit__(kind, error, trace)

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
            retry_condition_fn=_may_help,
            cache_policy=NO_CACHE,
            persist_result=False,
            result_serializer="json",
        )
        self._futures[name] = task.submit(return_state=False, wait_for=list(after))
        return self._futures[name]

    def handles(self) -> dict[str, Handle]:
        """Wait for all submitted stages and return what each gave.

        Raises StageFailedError naming the first that failed, once those beside it have ended.
        """
        wait(list(self._futures.values()))
        handles: dict[str, Handle] = {}
        for name, future in self._futures.items():
            result = future.result(raise_on_failure=False)
            if isinstance(result, BaseException):
                raise _failure(name, result) from result
            handles[name] = result
        return handles

    def _run(self, name: str) -> State[Handle]:
        plan, began = self.plans[name], time.monotonic()
        if (found := self.store.find(plan.stage, plan.fingerprint)) is not None:
            self.tracker.reused(name, found)
            logger.info("%s reused", name)
            handle = _handle(name, found, "reused", began)
            return Completed(name="Reused", message=f"{found.uri} was there already", data=handle)
        context = TaskRunContext.get()
        attempt = context.task_run.run_count if context is not None else 1
        folder = self.store.work_folder(plan, self.runtime.work_dir)
        with self.tracker.stage(name, attempt, folder) as tracked:
            artifact = self._make(name)
            tracked.finished(artifact)
        handle = _handle(name, artifact, "built", began)
        logger.info("%s built in %s", name, duration(handle["seconds"]))
        return Completed(message=f"built {artifact.uri} in {duration(handle['seconds'])}", data=handle)

    def _make(self, name: str) -> Artifact:
        if name not in TORCH_STAGES:
            return run_stage(name, self.experiment, self.store, self.runtime, self.data)[0]
        command = [sys.executable, "-m", "vectorclm", name, str(self.folder / "experiment.json"), "--relay"]
        command += ["--store", self.store.uri, "--runtime", str(self.folder / "runtime.json")]
        command += ["--data", str(self.data)] if self.data is not None else []
        self.launcher.run(command, get_run_logger().info)
        plan = self.plans[name]
        if (made := self.store.find(plan.stage, plan.fingerprint)) is None:
            raise StoreError(f"{name} ended well, but {self.store.uri_of(plan.stage)} lacks {plan.fingerprint}")
        return made


def default_workers() -> int:
    """How many stages run side by side where the runtime leaves it open: one for each two cores."""
    return max(1, (os.cpu_count() or 1) // 2)


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _handle(name: str, artifact: Artifact, state: str, began: float) -> Handle:
    seconds = round(time.monotonic() - began, 2)
    return Handle(stage=name, fingerprint=artifact.fingerprint, uri=artifact.uri, state=state, seconds=seconds)


def _may_help(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
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
