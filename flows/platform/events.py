"""Send an event of the platform to Prefect's server, whose automation notifies the operator of it."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from prefect.client.orchestration import SyncPrefectClient
from prefect.events import Event, RelatedResource, Resource
from prefect.settings import PREFECT_UI_URL
from prefect.utilities.urls import url_for

from flows.net import without_password

# Prefect's server drops an event beyond its limit of bytes, and answers as if it kept it.
TEXT_LETTERS = 2000
VALUE_LETTERS = 20_000  # of a value with parts, as JSON
RUN = "prefect.flow-run."  # begins the id of a run as a resource


def emit(
    client: SyncPrefectClient,
    event: str,
    resources: Sequence[Mapping[str, str]],
    lines: Sequence[str],
    about: Mapping[str, Any],
    event_id: UUID | None = None,
) -> None:
    """Send an event about the first of the resources, with a link to the page of the run that is one of them.

    The first of the lines is the title. The server keeps one event of each id, so an id that follows from the
    incident keeps the event from being sent twice.
    """
    first, *related = [{key: value[:TEXT_LETTERS] for key, value in each.items()} for each in resources]
    sent = Event(
        id=event_id or uuid4(),
        occurred=datetime.now(UTC),
        event=event,
        resource=Resource(first),
        related=[RelatedResource(each) for each in related],
        payload=payload(lines, _page(client, resources), about),
    )
    client.request("POST", "/events", json=[sent.model_dump(mode="json")])


def payload(lines: Sequence[str], page: str | None, about: Mapping[str, Any]) -> dict[str, Any]:
    """The title, text and links of a message to the operator, and further values; what is very long is cut."""
    links = [page] if page else []
    title = " ".join(lines[0].split())[:TEXT_LETTERS]  # it becomes a header of a mail
    text = "\n".join([title, *(line[:TEXT_LETTERS] for line in lines[1:]), *links])
    return {"title": title, "text": text, "links": links, **{name: _cut(value) for name, value in about.items()}}


def _cut(value: Any) -> Any:
    """A value, or the beginning of its text where it is very long."""
    if isinstance(value, str):
        return value[:TEXT_LETTERS]
    text = json.dumps(value, default=str)
    return value if len(text) <= VALUE_LETTERS else text[:TEXT_LETTERS]


def _page(client: SyncPrefectClient, resources: Sequence[Mapping[str, str]]) -> str | None:
    """The page of the run that is one of the resources, else the dashboard."""
    base = PREFECT_UI_URL.value() or str(client.api_url).rstrip("/").removesuffix("/api")
    ids = [each["prefect.resource.id"] for each in resources]
    runs = [found.removeprefix(RUN) for found in ids if found.startswith(RUN)]
    page = url_for("flow-run", runs[0], default_base_url=base) if runs else f"{base.rstrip('/')}/dashboard"
    return without_password(page) if page else None
