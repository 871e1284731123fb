"""Run stages on other machines: each as a run of its own deployment, in the work pool `cpu` or `gpu`.

The machines share only the store: a stage's run reads its inputs there and publishes its artifact there.
"""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from threading import Event
from typing import Any
from uuid import UUID

from httpx import HTTPError
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling

from flows.execution.launch import StageCancelledError, StageFailedError, StageInterruptedError
from flows.net import PROVISION
from vectorclm.errors import ConfigError

POLL_SECONDS = 2
CANCEL_TRIES = 5
CRASH_SECONDS = 90  # within which the platform starts a crashed run again; after that it is lost
EVALUATE_CHAT = "evaluate_chat"  # the deployment of the stage `evaluate`: another deployment has the stage's name
UNFINISHED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CRASHED]


def deployment_of(stage: str) -> str:
    """The name of a stage's deployment."""
    return EVALUATE_CHAT if stage == "evaluate" else stage


def run_in_pool(stage: str, parameters: Mapping[str, Any], closed: Event, log: Callable[[str], None]) -> None:
    """Run the deployment of `stage` and wait until its artifact is built.

    A run that an earlier attempt of this flow run started is waited for, not started twice. Once `closed` is set, the
    stage's run is cancelled. Raises ConfigError where the deployment is missing, StageFailedError with the message of
    a run that failed, StageCancelledError for a run that was cancelled, and StageInterruptedError for a run that
    crashed and was not started again.
    """
    tags = [f"part of {flow_run.id}", f"stage {stage}"]
    with get_client(sync_client=True) as client:
        run = _unfinished(client, tags) or _start(stage, parameters, tags)
        log(f"{stage} is the run {run.name} ({run.id})")
        _wait(client, run, stage, closed, log)


def _start(stage: str, parameters: Mapping[str, Any], tags: list[str]) -> FlowRun:
    name = f"stage/{deployment_of(stage)}"
    try:
        started: Any = run_deployment(
            name,
            parameters=dict(parameters),
            flow_run_name=f"{stage} of {parameters['experiment']}",
            tags=tags,
            timeout=0,
        )
    except ObjectNotFound as error:
        raise ConfigError(f"Prefect has no deployment {name}: {PROVISION}; or set placement to inline") from error
    return FlowRun.model_validate(started.model_dump())


def _unfinished(client: SyncPrefectClient, tags: list[str]) -> FlowRun | None:
    wanted = FlowRunFilter.model_validate({"tags": {"all_": tags}, "state": {"type": {"any_": UNFINISHED}}})
    for run in client.read_flow_runs(flow_run_filter=wanted):
        if run.state is not None and not (run.state.is_crashed() and _is_lost(run.state)):
            return run
    return None


def _is_lost(state: State[Any]) -> bool:
    """Whether a run crashed more than CRASH_SECONDS ago: the platform does not start it again."""
    return (datetime.now(UTC) - state.timestamp).total_seconds() > CRASH_SECONDS


def _wait(client: SyncPrefectClient, run: FlowRun, stage: str, closed: Event, log: Callable[[str], None]) -> None:
    shown = ""
    while True:
        if closed.wait(POLL_SECONDS):
            _cancel(client, run.id)
            raise StageCancelledError("ended with the curriculum")
        try:
            state = client.read_flow_run(run.id).state
        except HTTPError:
            continue  # a server that is away comes back; the stage does not need it
        if state is None:
            continue
        if state.name != shown:
            shown = state.name or ""
            log(f"{stage}: {shown}")
        match state.type:
            case StateType.COMPLETED:
                return
            case StateType.FAILED:
                raise StageFailedError(state.message or "its run failed")
            case StateType.CANCELLED:
                raise StageCancelledError(f"its run {_link(run.id)} was cancelled")
            case StateType.CRASHED if _is_lost(state):
                raise StageInterruptedError(f"its run {_link(run.id)} crashed: {state.message}")


def _cancel(client: SyncPrefectClient, run_id: UUID) -> None:
    """Cancel a stage's run, also a crashed one, so that it is not started again without its curriculum."""
    for _ in range(CANCEL_TRIES):
        try:
            state = client.read_flow_run(run_id).state
            crashed = state is not None and state.is_crashed()
            wanted: State[Any] = (Cancelled if crashed else Cancelling)(message="ended with its curriculum")
            client.set_flow_run_state(run_id, wanted, force=crashed)
            return
        except HTTPError:
            time.sleep(POLL_SECONDS)


def _link(run_id: UUID) -> str:
    return f"runs/flow-run/{run_id}"
