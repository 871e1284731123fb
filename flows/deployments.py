"""The Prefect deployments `curriculum` and `stage`, each with a run form."""

import os
import socket
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Crashed

from flows.curriculum import curriculum
from flows.execution.launch import StageFailedError
from flows.execution.stage_tasks import CURRICULUM, Stages
from flows.execution.watch import watched
from flows.form import Again, Changes, Name, chosen
from flows.handle import MAX_RESCUES, RESCUED, Handle
from flows.paths import local_folder
from flows.reports.summary import Summary
from vectorclm.config import ExperimentConfig
from vectorclm.errors import ConfigError
from vectorclm.lineage.pinning import check_sources, pin
from vectorclm.runtime.devices import Runtime
from vectorclm.store.artifact import Store
from vectorclm.store.layout import StageName


@flow(name=CURRICULUM, flow_run_name="{experiment}", persist_result=False)
def curriculum_run(
    experiment: Name = "tiny",
    changes: Changes = Changes(),
    data: str = "",
    runtime: Runtime = Runtime(),
    again_from: Again = "nothing",
) -> dict[str, Handle]:
    """Run a whole curriculum: from raw text to an evaluated, instruction-tuned model.

    Finished stages are reused, so Retry continues where a run stopped; a training continues from its last checkpoint.

    Args:
        experiment: tiny: a generated world, minutes on two cores. small: 8.6M parameters, an hour or two on a
            laptop. base: 50M parameters and 3.5 billion tokens, for GPUs.
        changes: What to change of the experiment, in the order of the pipeline. An empty field changes nothing.
        data: Folder on the worker that mirrors the sources in the hub's schemas. Empty: they are read from the hub.
        runtime: How the machine runs it. Never part of a result's fingerprint.
        again_from: Rebuild this finished stage and all stages that depend on it, and compare every byte.
    """
    pinned, store = _prepared(experiment, changes, data, runtime)
    again = None if again_from == "nothing" else again_from
    with watched():
        handles = curriculum.fn(pinned, runtime, store.uri, data or None, again)
    create_markdown_artifact(Summary(pinned, store, handles).as_markdown(), key="report", description=pinned.name)
    return handles


@flow(name="stage", flow_run_name="{stage} of {experiment}", persist_result=False)
def stage_run(
    stage: StageName,
    experiment: Name = "tiny",
    changes: Changes = Changes(),
    data: str = "",
    runtime: Runtime = Runtime(),
    again: bool = False,
) -> dict[str, Handle]:
    """Run one stage of an experiment alone; a finished stage is reused.

    Args:
        stage: The stages before it must be finished, for the same experiment and changes.
        experiment: The experiment of the stage.
        changes: What to change of the experiment, in the order of the pipeline. An empty field changes nothing.
        data: Folder on the worker that mirrors the sources in the hub's schemas. Empty: they are read from the hub.
        runtime: How the machine runs it. Never part of a result's fingerprint.
        again: Rebuild the stage beside its finished artifact, and compare every byte.
    """
    runtime = runtime.model_copy(update={"placement": "inline"})  # the stage is already placed: it runs here
    pinned, store = _prepared(experiment, changes, data, runtime)
    again_from = stage if again else None
    with watched(), Stages(pinned, runtime, store.uri, Path(data) if data else None, again_from) as stages:
        stages(stage)
        return stages.handles()


def _prepared(name: str, changes: Changes, data: str, runtime: Runtime) -> tuple[ExperimentConfig, Store]:
    """Return the pinned experiment and the store, both checked. Raises a VectorCLMError that says what to change."""
    store = opened_store(runtime)
    experiment, path = chosen(name, changes)
    mirror = Path(data) if data else None
    pinned = pinned_here(experiment, path, mirror, store)
    check_sources(pinned, mirror, hub=True)
    _warn_of_idle_gpus(runtime)
    return pinned, store


def _warn_of_idle_gpus(runtime: Runtime) -> None:
    """Log a warning if torch will run on this machine's CPU although another machine serves the pool `gpu`."""
    if runtime.placement == "pools" or runtime.device != "auto" or runtime.torch_device().type == "cuda":
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

    Raises ConfigError where the worker has no store, and StageFailedError after too many crashes of this run.
    """
    _give_up_after_rescues()
    _end_lost_tasks()
    if not (uri := os.environ.get("VECTORCLM_STORE")):
        raise ConfigError("this worker has no store: set VECTORCLM_STORE in its environment and restart it")
    runtime.check()
    store = Store(uri)
    store.check_writable()
    return store


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
    """Mark the unfinished tasks of an earlier attempt of this run as crashed: their process is gone."""
    if flow_run.id is None or flow_run.run_count < 2:
        return
    with get_client(sync_client=True) as client:
        mine = FlowRunFilter.model_validate({"id": {"any_": [flow_run.id]}})
        for task in client.read_task_runs(flow_run_filter=mine):
            stands_for_a_run = task.task_key.startswith("prefect.")  # a stage in a pool, which may still run
            if task.state is not None and not task.state.is_final() and not stands_for_a_run:
                lost: State[Any] = Crashed(message="its process ended with the attempt before this one")
                client.set_task_run_state(task.id, lost, force=True)
