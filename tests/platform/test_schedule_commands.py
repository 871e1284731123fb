"""`vectorclm schedule …` as a person types it, on a real server, and what it says where something is wrong."""

import json
import os
from collections.abc import Iterator, Mapping
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient

from flows import cli
from tests.platform.test_schedules import CHAT, NAME, evaluate
from tests.services.curricula import Recorded

__all__ = ["evaluate"]  # a fixture


@pytest.fixture
def typed(evaluate: UUID, recorded: Recorded, shared_prefect: Mapping[str, str]) -> Iterator[None]:
    """The environment of a command beside a server that PREFECT_API_URL names, as in a container."""
    before = dict(os.environ)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ |= {"PREFECT_AUTH": shared_prefect["PREFECT_API_AUTH_STRING"], "VECTORCLM_STORE": recorded.store.uri}
    yield
    os.environ.clear()
    os.environ.update(before)


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert cli.main(["schedule", *words]) == code, capsys.readouterr().err
    found = capsys.readouterr()
    return found.err if code else found.out


SET = ["evaluate", "vectorclm-chat@candidate", "--suite", "small", "--cron", "30 2 * * *"]


@pytest.mark.usefixtures("typed")
def test_a_schedule_from_its_beginning_to_its_end(
    prefect_client: SyncPrefectClient, evaluate: UUID, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "list") == "there is no schedule: `vectorclm schedule evaluate` sets one\n"
    made = said(capsys, *SET, "--timezone", "Europe/Berlin", "--items", "5", "--template")
    assert made.startswith(f"{NAME}: next runs ") and made.count(" 02:30") == 3 and "Europe/Berlin" in made
    assert made.endswith(f"/deployments/deployment/{evaluate}\n")
    (schedule,) = prefect_client.read_deployment(evaluate).schedules
    assert schedule.slug == NAME and schedule.parameters == {**CHAT, "limits": {"items": 5, "template": True}}

    assert said(capsys, "pause", NAME) == f"{NAME}: paused\n"
    (row,) = json.loads(said(capsys, "list", "--json"))
    assert row["id"] == str(schedule.id) and row["next"] is None
    assert (row["name"], row["when"], row["state"]) == (NAME, "30 2 * * * Europe/Berlin", "paused")
    assert said(capsys, "resume", NAME).startswith(f"{NAME}: next runs ")
    shown = said(capsys, "list")
    assert NAME in shown and " on " in shown and str(schedule.id)[:8] in shown
    assert said(capsys, "remove", str(schedule.id)[:8]) == f"{NAME} is removed\n"
    assert prefect_client.read_deployment(evaluate).schedules == []


@pytest.mark.usefixtures("typed")
def test_every_hour_of_a_zone_is_kept_in_utc_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    made = said(capsys, *SET[:-1], "0 * * * *", "--timezone", "Europe/Berlin", "--name", "each hour")
    assert made.startswith("each hour: next runs ") and "its times are kept in UTC" in made
    assert said(capsys, "remove", "each hour") == "each hour is removed\n"


@pytest.mark.usefixtures("typed")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SET[:-1], "61 * * * *"], 'error: Invalid cron string: "61 * * * *"'),
        ([*SET, "--timezone", "Berlin"], 'error: Invalid timezone: "Berlin"'),
        ([*SET[:3], "huge", *SET[4:]], 'error: Invalid value "huge" for --suite'),
        (["evaluate", "vectorclm-chat@nobody", *SET[2:]], "has no models:/vectorclm-chat@nobody"),
        ([*SET, "--documents", "1"], "error: --documents 1: Input should be greater than or equal to 2"),
        (SET[:-2], "--cron"),
        (["pause", "owl"], "error: there is no schedule 'owl': there is none at all"),
        (["remove", "owl"], "error: there is no schedule 'owl': there is none at all"),
    ],
)
def test_a_wrong_word_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, *words, code=2)
    assert message in line and line.count("\n") == 1 and "Traceback" not in line
