"""What an event holds: a title in one line, a link to its run, values of a bounded size; on a real server."""

from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_UI_URL, get_current_settings, temporary_settings

from flows.handle import MISSED, RUN_FAILED
from flows.platform.events import TEXT_LETTERS, emit, payload
from tests.services.platform import until


def resource(kind: str, number: UUID) -> dict[str, str]:
    return {"prefect.resource.id": f"{kind}.{number}", "prefect.resource.name": "a run", "prefect.resource.role": "a"}


def kept(client: SyncPrefectClient, number: UUID, count: int = 1) -> list[dict[str, Any]]:
    """The events about a resource with this number, once there are so many."""

    def found() -> list[dict[str, Any]]:
        wanted = {"event": {"prefix": ["vectorclm."]}, "resource": {"id_prefix": [f"test.{number}"]}}
        events: list[dict[str, Any]] = client.request("POST", "/events/filter", json={"filter": wanted}).json()[
            "events"
        ]
        return events if len(events) >= count else []

    return until(found, "the event is kept", 60)


def test_an_event_links_the_page_of_its_run_and_has_its_title_in_one_line(prefect_client: SyncPrefectClient) -> None:
    mine, run_id = uuid4(), uuid4()
    resources = [resource("test", mine), resource("prefect.flow-run", run_id)]
    emit(prefect_client, RUN_FAILED, resources, ["no\nworker  took\r\nit", "for long"], {"count": 1})
    (event,) = kept(prefect_client, mine)
    base = str(prefect_client.api_url).rstrip("/").removesuffix("/api")
    page = f"{base}/runs/flow-run/{run_id}"
    assert event["event"] == RUN_FAILED and [each["prefect.resource.id"] for each in event["related"]] == [
        f"prefect.flow-run.{run_id}"
    ]
    assert event["payload"] == {
        "title": "no worker took it",
        "text": f"no worker took it\nfor long\n{page}",
        "links": [page],
        "count": 1,
    }


def test_an_event_without_a_run_links_the_dashboard_without_a_password(prefect_client: SyncPrefectClient) -> None:
    mine = uuid4()
    with temporary_settings({PREFECT_UI_URL: "http://user:secret@platform.example:4200"}):
        emit(prefect_client, MISSED, [resource("test", mine)], ["a disk is full"], {})
    (event,) = kept(prefect_client, mine)
    assert event["payload"]["links"] == ["http://platform.example:4200/dashboard"]


@pytest.mark.parametrize("place", ["a name", "the title", "a line", "a value", "a part of a value"])
def test_an_event_about_something_very_long_is_kept(prefect_client: SyncPrefectClient, place: str) -> None:
    mine, long = uuid4(), "é" * get_current_settings().server.events.maximum_size_bytes
    named = resource("test", mine) | ({"prefect.resource.name": long} if place == "a name" else {})
    lines = [long if place == "the title" else "it failed", long if place == "a line" else "today"]
    value: Any = long if place == "a value" else {"settings": [long if place == "a part of a value" else "short"]}
    emit(prefect_client, RUN_FAILED, [named], lines, {"value": value})
    (event,) = kept(prefect_client, mine)
    assert event["payload"]["title"] == (long[:TEXT_LETTERS] if place == "the title" else "it failed")


def test_an_event_that_is_sent_twice_with_one_id_is_kept_once(prefect_client: SyncPrefectClient) -> None:
    mine, event_id = uuid4(), uuid4()
    for _ in range(2):
        emit(prefect_client, RUN_FAILED, [resource("test", mine)], ["it failed"], {}, event_id)
    emit(prefect_client, RUN_FAILED, [resource("test", mine)], ["it failed again"], {})
    assert len(kept(prefect_client, mine, 2)) == 2


def test_a_short_value_keeps_its_parts() -> None:
    assert payload(["title"], None, {"parameters": {"model": "m", "items": [1, None]}}) == {
        "title": "title",
        "text": "title",
        "links": [],
        "parameters": {"model": "m", "items": [1, None]},
    }
