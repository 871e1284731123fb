"""Send a message to the operator again that its receiver did not take, as Prefect tries each message once.

A copy of the event, under a name of its own, makes the automation send again, so Prefect records the outcome as of any
message. While nothing arrives, one message is tried at a time, at growing intervals; once one has arrived, the others
follow at once. What is older than KEPT is not sent any more.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any
from uuid import UUID, uuid5

from prefect.client.orchestration import SyncPrefectClient
from prefect.events import Event, Resource

from flows.handle import SENT_AGAIN
from flows.platform.notify import ACTED, FAILED_TO_ACT, NOTIFICATION

KEPT = timedelta(days=1)
FIRST, LONGEST = timedelta(seconds=5), timedelta(hours=1)  # between two tries
UNKNOWN = timedelta(minutes=2)  # after which a try without an outcome has failed, as where the server was killed
OVERLAP = timedelta(seconds=30)  # between the periods of two looks, as events are written some seconds late
PAGE = 50  # events in one answer, Prefect's most
MESSAGE = "vectorclm.message."  # begins the resource of a copy, before the id of the event that it is of
CAUSE = "prefect.event."  # begins the resource of the event that an action followed

logger = logging.getLogger(__name__)


@dataclass
class Lost:
    """A message that has not arrived."""

    since: datetime  # of the first failure
    tried: datetime | None = None  # while the outcome of a copy is not known


class Resender:
    """Looks for messages that were not delivered, and has them sent again."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client = client
        self._since = datetime.now(UTC) - KEPT
        self._seen: dict[str, datetime] = {}  # events, with their times
        self._copies: dict[str, str] = {}  # the original of a copy, both by the ids of their events
        self._lost: dict[str, Lost] = {}  # by the id of the first event
        self._is_down = False  # the last message did not arrive
        self._failed_tries = 0  # since a message arrived
        self._last = datetime.now(UTC) - KEPT  # failure

    def look(self) -> None:
        """Look once at the outcomes since the last look, and have sent again what is due."""
        found = self.client.read_automations_by_name(NOTIFICATION)
        if not found:
            return
        now = datetime.now(UTC)
        for event in self._events(f"prefect.automation.{found[0].id}"):
            self.note(event)
        self._since = max(self._since, now - OVERLAP)
        self._seen = {event: when for event, when in self._seen.items() if when >= self._since - OVERLAP}
        for key in self.due(now):
            self._send(key, now)

    def _events(self, automation: str) -> list[Mapping[str, Any]]:
        """The outcomes of the automation, and the copies of messages, that were not seen yet, oldest first."""
        new: list[Mapping[str, Any]] = []
        since, page = self._since, True
        while page:
            wanted = {
                "occurred": {"since": since.isoformat(), "until": (since + 2 * KEPT).isoformat()},
                "event": {"name": [ACTED, FAILED_TO_ACT, SENT_AGAIN]},
                "resource": {"id_prefix": [automation, MESSAGE]},
                "order": "ASC",
            }
            answer = self.client.request("POST", "/events/filter", json={"filter": wanted, "limit": PAGE})
            found = answer.json()["events"]
            unseen = [event for event in found if event["id"] not in self._seen]
            self._seen |= {event["id"]: datetime.fromisoformat(event["occurred"]) for event in unseen}
            new += unseen
            page = len(found) == PAGE and bool(unseen)
            since = datetime.fromisoformat(found[-1]["occurred"]) if found else since
        return new

    def note(self, event: Mapping[str, Any]) -> None:
        """Take note of a copy, or of the outcome of a message."""
        when = datetime.fromisoformat(event["occurred"])
        if event["event"] == SENT_AGAIN:
            self._copies[event["id"]] = event["resource"]["prefect.resource.id"].removeprefix(MESSAGE)
            return
        causes = [
            each["prefect.resource.id"]
            for each in event["related"]
            if each.get("prefect.resource.role") == "triggering-event"
        ]
        if not causes:
            return
        cause = causes[0].removeprefix(CAUSE)
        key = self._copies.get(cause, cause)
        if arrived(event):
            self._lost.pop(key, None)
            self._is_down, self._failed_tries = False, 0
        else:
            self._fails(self._lost.setdefault(key, Lost(when)), when, is_try=key != cause)

    def _fails(self, lost: Lost, when: datetime, *, is_try: bool) -> None:
        lost.tried = None
        self._is_down = True
        self._failed_tries += is_try
        self._last = max(self._last, when)

    def due(self, now: datetime) -> list[str]:
        """The messages to send again now: one to try whether anything arrives, or all once something has."""
        self._lost = {key: lost for key, lost in self._lost.items() if now - lost.since < KEPT}
        for lost in self._lost.values():
            if lost.tried is not None and now - lost.tried > UNKNOWN:
                self._fails(lost, now, is_try=True)
        if any(lost.tried is not None for lost in self._lost.values()):
            return []
        waiting = sorted(self._lost, key=lambda key: self._lost[key].since)
        if not self._is_down:
            return waiting
        pause = min(FIRST * 2 ** min(self._failed_tries, 20), LONGEST)
        return waiting[:1] if now - self._last >= pause else []

    def _send(self, key: str, now: datetime) -> None:
        """Emit a copy of the event, for which the automation sends the message again."""
        lost = self._lost[key]
        asked = {"filter": {"id": {"id": [key]}, "occurred": {"since": (now - 2 * KEPT).isoformat()}}, "limit": 1}
        found = self.client.request("POST", "/events/filter", json=asked).json()["events"]
        if not found:
            del self._lost[key]  # retention has removed it
            return
        original = found[0]
        lost.tried = now
        when = datetime.fromisoformat(original["occurred"]).astimezone(UTC)
        text = f"{original['payload'].get('text', '')}\n(Sent again: it happened at {when:%Y-%m-%d %H:%M} UTC.)"
        copy = Event(
            id=uuid5(UUID(key), f"{now.isoformat()}"),
            occurred=now,
            event=SENT_AGAIN,
            resource=Resource({"prefect.resource.id": f"{MESSAGE}{key}", "prefect.resource.role": "message"}),
            payload={**original["payload"], "text": text, "event": original["event"]},
        )
        self._copies[str(copy.id)] = key
        self.client.request("POST", "/events", json=[copy.model_dump(mode="json")])


def arrived(outcome: Mapping[str, Any]) -> bool:
    """Whether the event of an action says that the message was delivered."""
    status = outcome["payload"].get("status_code", HTTPStatus.OK)
    return bool(outcome["event"] == ACTED and status < HTTPStatus.BAD_REQUEST)
