"""The Prefect deployments `curriculum` and `stage`, each with a run form."""

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Crashed, Failed

from flows.curriculum import curriculum
from flows.execution.labels import name_of_this_run, record_process
from flows.execution.launch import StageFailedError
from flows.execution.stage_tasks import CURRICULUM, Stages, leave_out
from flows.execution.watch import watched
from flows.form import Again, Changes, Name, chosen
from flows.handle import DRY_RUN, MAX_RESCUES, RESCUED, SKIPPED, Handle
from flows.paths import local_folder
from flows.platform.experiment_forms import refresh_description
from flows.platform.missed_runs import SkippedRunError, check_is_newest
from flows.reports.plan import plan_of
from vectorclm.config import ExperimentConfig
from vectorclm.errors import ConfigError, VectorCLMError
from vectorclm.lineage.pinning import check_sources, pin
from vectorclm.runtime.devices import Runtime
from vectorclm.store.artifact import Store
from vectorclm.store.layout import StageName


@flow(name=CURRICULUM, flow_run_name=name_of_this_run, persist_result=False)
def curriculum_run(  # noqa: PLR0913 - its parameters are the fields of the form
    experiment: Name = "tiny",
    dry_run: bool = False,
    changes: Changes = Changes(),
    settings: dict[str, Any] = {},  # noqa: B006
    data: str = "",
    again_from: Again = "nothing",
    runtime: Runtime = Runtime(),
) -> Any:
    """Run a whole curriculum: from raw text to an evaluated, instruction-tuned model.

    Finished stages are reused, so Retry continues where a run stopped; a training continues from its last checkpoint.
    """
    if dry_run:
        return explained(lambda: _dry_run(experiment, changes, settings, data))

    def run() -> dict[str, Handle]:
        pinned, store = _prepared(experiment, changes, settings, data, runtime)
        with watched():
            return curriculum.fn(
                pinned, runtime, store.uri, data or None, None if again_from == "nothing" else again_from
            )

    result = explained(run)
    refresh_description(experiment)
    return result


@flow(name="stage", flow_run_name=name_of_this_run, persist_result=False)
def stage_run(
    stage: StageName,
    experiment: Name = "tiny",
    changes: Changes = Changes(),
    data: str = "",
    again: bool = False,
    runtime: Runtime = Runtime(),
) -> Any:
    """Run one stage of an experiment alone; the stages before it must be finished, and are reused."""
    here = runtime.model_copy(update={"placement": "inline"})  # the stage is already placed: it runs here

    def run() -> dict[str, Handle]:
        pinned, store = _prepared(experiment, changes, {}, data, here)
        again_from = stage if again else None
        with watched(), Stages(pinned, here, store.uri, Path(data) if data else None, again_from) as stages:
            stages(stage)
            return stages.handles()

    return explained(run)


def explained(run: Callable[[], Any]) -> Any:
    """The result of `run`; for an expected error, a failed state, whose message ends the log in one line."""
    try:
        return run()
    except SkippedRunError as skipped:
        return Cancelled(name=SKIPPED, message=str(skipped))
    except (VectorCLMError, OSError) as error:
        leave_out("prefect.flow_runs", "Engine execution exited with unexpected exception")
        what = str(error) if isinstance(error, VectorCLMError) else f"{type(error).__name__}: {error}"
        return Failed(message=" ".join(what.split("\n")), data=error)


def _dry_run(name: str, changes: Changes, settings: Mapping[str, Any], data: str) -> State[Any]:
    """Show what a run would reuse, build and cost as an artifact; no network is used and nothing is built."""
    store = _store()
    experiment, path = chosen(name, changes, settings)
    plan = plan_of(experiment, local_folder(store) / "locks" / path.name, Path(data) if data else None, store)
    create_markdown_artifact(plan, key="plan", description=f"What a run of {name} with these settings does")
    return Completed(name=DRY_RUN, message="nothing was run: the plan is under Artifacts")


def _prepared(
    name: str, changes: Changes, settings: Mapping[str, Any], data: str, runtime: Runtime
) -> tuple[ExperimentConfig, Store]:
    """Return the pinned experiment and the store, both checked. Raises a VectorCLMError that says what to change."""
    store = opened_store(runtime)
    experiment, path = chosen(name, changes, settings)
    mirror = Path(data) if data else None
    pinned = pinned_here(experiment, path, mirror, store)
    check_sources(pinned, mirror, hub=True)
    _warn_of_idle_gpus(runtime)
    return pinned, store


def _warn_of_idle_gpus(runtime: Runtime) -> None:
    """Log a warning if torch will run on this machine's CPU although another machine serves the pool `gpu`."""
    if runtime.placement == "pools" or runtime.device != "auto" or runtime.device_type() == "cuda":
        return
    with get_client(sync_client=True) as client:
        workers = [worker.name for worker in client.read_workers_for_work_pool("gpu") if worker.status == "ONLINE"]
    if others := [name for name in workers if not name.startswith(socket.gethostname())]:
        get_run_logger().warning(
            "torch runs on this machine's CPU, because placement is inline; with placement pools it runs on %s",
            ", ".join(others),
        )


def opened_store(runtime: Runtime) -> Store:
    """Open the worker's store at the beginning of a run, and check that it is writable.

    Raises ConfigError where the worker has no store, StageFailedError after too many crashes of this run, and
    SkippedRunError where a newer run of the same schedule is due.
    """
    check_is_newest()
    record_process()
    _give_up_after_rescues()
    _end_lost_tasks()
    store = _store()
    runtime.check()
    store.check_writable()
    return store


def _store() -> Store:
    if not (uri := os.environ.get("VECTORCLM_STORE")):
        raise ConfigError("this worker has no store: set VECTORCLM_STORE in its environment and restart it")
    return Store(uri)


def pinned_here(experiment: ExperimentConfig, path: Path, mirror: Path | None, store: Store) -> ExperimentConfig:
    """Pin the experiment's sources, with a lock file beside the store; log what the mirror lacks."""
    locks = local_folder(store) / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    pinned, notes = pin(experiment, locks / path.name, mirror, resolve=True)
    for note in notes:
        get_run_logger().warning(note)
    return pinned


def _give_up_after_rescues() -> None:
    """Fail a run that crashed again after its last rescue, so that it is not restarted for ever.

    Raises StageFailedError, which sets the run to `Failed`; Retry in the UI still works.
    """
    if flow_run.id is None:
        return
    with get_client(sync_client=True) as client:
        states = sorted(client.read_flow_run_states(flow_run.id), key=lambda state: state.timestamp)
    names = [state.name for state in states]
    last_retry = max((place for place, name in enumerate(names) if name == "AwaitingRetry"), default=0)
    if names[last_retry:].count(RESCUED) > MAX_RESCUES:
        raise StageFailedError(
            f"this run crashed {MAX_RESCUES + 1} times and was started again each time: check the machine "
            "(memory, disk, the worker's log), then press Retry; finished stages are kept"
        )


def _end_lost_tasks() -> None:
    """End the unfinished tasks of an earlier attempt of this run, whose process is gone.

    A task that had begun has crashed; one that had not, such as a stage after a failed one, is cancelled.
    """
    if flow_run.id is None or flow_run.run_count < 2:
        return
    with get_client(sync_client=True) as client:
        mine = FlowRunFilter.model_validate({"id": {"any_": [flow_run.id]}})
        for task in client.read_task_runs(flow_run_filter=mine):
            stands_for_a_run = task.task_key.startswith("prefect.")  # a stage in a pool, which may still run
            if task.state is not None and not task.state.is_final() and not stands_for_a_run:
                ended: State[Any] = Cancelled(message="it had not begun when the attempt before this one ended")
                if task.state.is_running() or task.run_count > 0:
                    ended = Crashed(message="its process ended with the attempt before this one")
                client.set_task_run_state(task.id, ended, force=True)
