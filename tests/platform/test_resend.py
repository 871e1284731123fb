"""A message that its receiver did not take arrives once the receiver is back: a real server, a real web address."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Failed
from pydantic import SecretStr

from flows.handle import RUN_FAILED, SENT_AGAIN
from flows.net import free_port
from flows.platform.config import PlatformConfig
from flows.platform.notify import ACTED, FAILED_TO_ACT, undelivered
from flows.platform.provision import _notification
from flows.platform.resend import LONGEST, Resender, arrived
from tests.services.inbox import Inbox, open_inbox
from tests.services.platform import Platform, until


@pytest.fixture(scope="module")
def inbox() -> Iterator[Inbox]:
    with open_inbox() as kept:
        yield kept


@pytest.fixture(scope="module")
def platform(inbox: Inbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The Prefect server of a platform, without MLflow and workers."""
    config = PlatformConfig(
        vectorclm_store=str(tmp_path_factory.mktemp("resend") / "store"),
        prefect_port=free_port(),
        prefect_auth=SecretStr("me:of-this-test"),
        vectorclm_notify=SecretStr(f"webhook:{inbox.url}/a-t0ken"),
        vectorclm_url="https://prefect.example.org",
    )
    made, (server, _) = Platform(config, []), config.servers()
    server.start()
    try:
        server.wait()
        with SyncPrefectClient(f"{config.prefect_url}/api", auth_string="me:of-this-test") as client:
            made.client = client
            with made.addressed():
                assert _notification(client, config, lambda line: None) is None
            yield made
    finally:
        server.stop()


def test_messages_arrive_once_each_when_their_receiver_is_back_also_after_a_restart(
    platform: Platform, inbox: Inbox
) -> None:
    client = platform.client
    deployment = client.create_deployment(client.create_flow_from_name("curriculum"), "tiny-by-night")

    def failed(name: str) -> UUID:
        run_id = client.create_flow_run_from_deployment(deployment, name=name).id
        client.set_flow_run_state(run_id, Failed(message=f"why of {name}"), force=True)
        return run_id

    def failures() -> int:
        wanted: dict[str, Any] = {"filter": {"event": {"name": [ACTED, FAILED_TO_ACT]}}, "limit": 50}
        events = client.request("POST", "/events/filter", json=wanted).json()["events"]
        return sum(not arrived(event) for event in events)

    inbox.is_full = True
    runs = {name: failed(name) for name in ("first", "second")}
    until(lambda: failures() >= 2, "both were refused", 60)
    platform.config.servers()[0].stop()  # what was not delivered outlives the server
    platform.config.servers()[0].start()
    platform.config.servers()[0].wait()
    until(lambda: failures() >= 3, "one of them was tried again", 120)
    inbox.is_full = False
    until(lambda: len(inbox.messages) >= 2, "both arrive", 180)
    last = failed("third")
    until(lambda: len(inbox.messages) >= 3, "a new one arrives", 60)
    until(lambda: undelivered(client) is None, "the doctor has nothing to say", 60)
    assert sorted(message["run"] for message in inbox.messages) == ["first", "second", "third"]
    for message in inbox.messages:
        assert message["event"] == RUN_FAILED and message["title"] == f"{message['run']} failed"
        assert ("(Sent again: it happened at " in message["text"]) == (message["run"] != "third")
        run_id = {**runs, "third": last}[message["run"]]
        assert message["links"] == [f"https://prefect.example.org/runs/flow-run/{run_id}"]


def test_tries_become_rare_and_end_after_a_day(platform: Platform) -> None:
    """For all messages together: a receiver that is away for a day is not asked more often for more of them."""
    begun = datetime.now(UTC)
    resender, messages = Resender(platform.client), [str(uuid4()) for _ in range(3)]

    def fails(message: str, when: datetime, again: bool = True) -> None:
        cause = {"prefect.resource.id": f"prefect.event.{message}", "prefect.resource.role": "triggering-event"}
        if again:  # of a copy
            copy = {"id": str(uuid4()), "event": SENT_AGAIN, "occurred": when.isoformat()}
            resender.note({**copy, "resource": {"prefect.resource.id": f"vectorclm.message.{message}"}})
            cause["prefect.resource.id"] = f"prefect.event.{copy['id']}"
        outcome = {"id": str(uuid4()), "event": FAILED_TO_ACT, "occurred": when.isoformat(), "payload": {}}
        resender.note({**outcome, "related": [cause]})

    for message in messages:
        fails(message, begun, again=False)
    tries: list[datetime] = []
    for minutes in range(2 * 24 * 60):
        now = begun + timedelta(minutes=minutes)
        for message in resender.due(now):
            fails(message, now)
            tries.append(now)
    pauses = [after - before for before, after in pairwise(tries)]
    assert pauses == sorted(pauses) and pauses[-1] == LONGEST and 24 <= len(tries) <= 36
    assert timedelta(hours=22) < tries[-1] - begun <= timedelta(days=1)


def test_an_answer_of_the_receiver_with_an_error_is_no_arrival() -> None:
    outcome: dict[str, Any] = {"event": ACTED, "payload": {}}
    assert arrived(outcome) and arrived({**outcome, "payload": {"status_code": 204}})
    assert not arrived({**outcome, "payload": {"status_code": 507}}) and not arrived(
        {**outcome, "event": FAILED_TO_ACT}
    )
