"""What the platform's rules of states refuse, on a real server: a run that a worker took is not put back or ended."""

from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.responses import SetStateStatus
from prefect.states import Cancelled, Completed, Crashed, Pending, Running, Scheduled

from flows.handle import QUEUED, RESCUED, SKIPPED

WAITS, RESCUE, SKIP = Scheduled(name=QUEUED), Scheduled(name=RESCUED), Cancelled(name=SKIPPED)
REFUSED: list[tuple[Any, Any]] = [
    (Pending(), WAITS),
    (Running(), WAITS),
    (Completed(), WAITS),
    (Pending(), RESCUE),
    (Running(), RESCUE),
    (Scheduled(name="AwaitingRetry"), RESCUE),
    (Pending(), SKIP),
]
ACCEPTED: list[tuple[Any, Any]] = [
    (Scheduled(), WAITS),
    (Scheduled(name=QUEUED), Scheduled(name=QUEUED, message="another place")),
    (Crashed(), RESCUE),
    (Scheduled(), SKIP),
    (Running(), SKIP),
    (Pending(), Scheduled(name="AwaitingConcurrencySlot")),
    (Pending(), Cancelled()),
]


def set_after(client: SyncPrefectClient, before: Any, wanted: Any) -> tuple[SetStateStatus, str | None]:
    """The answer to the wish for a state after `before`, and the name of the state that the run has then."""
    flow_id = client.create_flow_from_name("ruled")
    run_id = client.create_flow_run_from_deployment(client.create_deployment(flow_id, "ruled"), state=before).id
    try:
        answer = client.set_flow_run_state(run_id, wanted)
        return answer.status, client.read_flow_run(run_id).state_name
    finally:
        client.delete_flow_run(run_id)


@pytest.mark.parametrize(("before", "wanted"), REFUSED, ids=lambda state: state.name)
def test_a_state_that_a_run_has_outrun_is_refused(prefect_client: SyncPrefectClient, before: Any, wanted: Any) -> None:
    assert set_after(prefect_client, before, wanted) == (SetStateStatus.REJECT, before.name)


@pytest.mark.parametrize(("before", "wanted"), ACCEPTED, ids=lambda state: state.name)
def test_a_state_of_a_run_that_has_not_gone_on_is_accepted(
    prefect_client: SyncPrefectClient, before: Any, wanted: Any
) -> None:
    assert set_after(prefect_client, before, wanted) == (SetStateStatus.ACCEPT, wanted.name)
