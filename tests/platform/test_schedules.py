"""Schedules on a real server: their times over a change of the clocks, their names, and what each command does."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.states import Completed, Running, Scheduled

from flows.handle import RESCUED
from flows.platform import deployment_file
from flows.platform.deployment_file import entries, fields_of, put
from flows.platform.schedules import (
    add_evaluation,
    cron_times,
    find,
    known_schedules,
    next_runs,
    overview,
    remove,
    schedulable_model,
    schedule_of,
    switch,
)
from tests.services.curricula import Recorded
from tests.services.rows import rows_read
from vectorclm.errors import ConfigError, VectorCLMError

CHAT = {"model": "models:/vectorclm-chat@candidate", "suite": "small"}
NAME = "vectorclm-chat@candidate on small"
NIGHTLY = CronSchedule(cron="0 3 * * *", timezone="UTC")
BERLIN = ZoneInfo("Europe/Berlin")


@pytest.fixture
def evaluate(prefect_client: SyncPrefectClient) -> Iterator[UUID]:
    """The platform's deployment for evaluations, without the schedules of its file, and no other deployment."""
    for found in prefect_client.read_deployments():
        prefect_client.delete_deployment(found.id)
    prefect_client.create_work_pool(WorkPoolCreate(name="gpu", type="process"), overwrite=True)
    (entry,) = (entry for entry in entries() if entry["name"] == "evaluate")
    flow_id, fields = fields_of(prefect_client, entry)
    put(prefect_client, flow_id, "evaluate", fields, None)
    made = prefect_client.read_deployment_by_name("evaluate/evaluate").id
    yield made
    for run in runs(prefect_client, made):
        prefect_client.delete_flow_run(run.id)
    prefect_client.delete_deployment(made)


def runs(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    mine = FlowRunFilter.model_validate({"deployment_id": {"any_": [deployment]}})
    return client.read_flow_runs(flow_run_filter=mine)


def planned(client: SyncPrefectClient, deployment: UUID, times: CronSchedule, begin: str, hours: int) -> list[datetime]:
    """The runs that the server plans for a schedule, in twelve looks one after another, as its scheduler makes them."""
    (made,) = client.create_deployment_schedules(deployment, [(times, True)])
    start = datetime.fromisoformat(begin)
    end = start + timedelta(hours=hours)
    for look in range(12):
        now = start + look * (end - start) / 12
        window = {"start_time": now.isoformat(), "end_time": min(end, now + (end - start) / 4).isoformat()}
        client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment}, json=window)
    found = sorted(run.expected_start_time for run in runs(client, deployment) if run.expected_start_time)
    client.delete_deployment_schedule(deployment, made.id)
    return [when for when in found if when < end]


@pytest.mark.parametrize("begin", ["2027-03-27T21:00:00+00:00", "2027-10-30T21:00:00+00:00"])
def test_every_hour_has_one_run_when_clocks_change(
    prefect_client: SyncPrefectClient, evaluate: UUID, begin: str
) -> None:
    found = planned(prefect_client, evaluate, cron_times("0 * * * *", "Europe/Berlin"), begin, 8)
    assert found == [datetime.fromisoformat(begin) + timedelta(hours=hours) for hours in range(8)]


@pytest.mark.parametrize("begin", ["2027-03-26T12:00:00+00:00", "2027-10-29T12:00:00+00:00"])
def test_every_night_has_one_run_when_clocks_change(
    prefect_client: SyncPrefectClient, evaluate: UUID, begin: str
) -> None:
    """Also of a time that is left out in spring, and that there is twice in autumn."""
    found = planned(prefect_client, evaluate, cron_times("30 2 * * *", "Europe/Berlin"), begin, 72)
    local = [when.astimezone(BERLIN) for when in found]
    first = datetime.fromisoformat(begin).date()
    assert [when.date() for when in local] == [first + timedelta(days=day) for day in (1, 2, 3)]
    assert [f"{when:%H:%M}" for when in (local[0], local[2])] == ["02:30", "02:30"]
    assert f"{local[1]:%H:%M}" in (("01:30", "03:30") if "-03-" in begin else ("02:30",))


def test_a_schedule_of_the_page_for_every_hour_leaves_out_the_hour_that_repeats(
    prefect_client: SyncPrefectClient, evaluate: UUID
) -> None:
    """What Prefect's cron does in such a zone, for which the command keeps UTC."""
    own = CronSchedule(cron="0 * * * *", timezone="Europe/Berlin")
    found = planned(prefect_client, evaluate, own, "2027-10-30T22:30:00+00:00", 4)
    assert [f"{when.astimezone(BERLIN):%H:%M}" for when in found] == ["01:00", "02:00", "03:00"]


@pytest.mark.parametrize(
    ("cron", "zone", "kept"),
    [
        ("*/15 * * * *", "Europe/Berlin", "UTC"),
        ("@hourly", "America/New_York", "UTC"),
        ("0 * * * *", "Asia/Tokyo", "Asia/Tokyo"),  # no change of clocks
        ("0 * * * *", "Australia/Adelaide", "Australia/Adelaide"),  # half an hour beside UTC
        ("0 8-18 * * *", "Europe/Berlin", "Europe/Berlin"),
        ("0 3 * * 7", "Europe/Berlin", "Europe/Berlin"),
    ],
)
def test_only_a_schedule_for_every_hour_is_kept_in_utc(cron: str, zone: str, kept: str) -> None:
    assert cron_times(cron, zone) == CronSchedule(cron=cron, timezone=kept)


@pytest.mark.parametrize(
    ("cron", "zone", "message"),
    [
        ("nonsense", "UTC", r'Invalid cron string: "nonsense": write minute, hour, day, month and weekday'),
        ("", "UTC", "write minute, hour, day, month and weekday"),
        ("0 0 3 * * *", "UTC", "has 6 fields: write minute, hour"),
        ("0 3 30 2 *", "UTC", "names no day that ever comes"),
        ("R 3 * * *", "UTC", "unsupported"),
        ("0 3 * * *", "Mars/Olympus", 'Invalid timezone: "Mars/Olympus"'),
        ("0 3 * * *", "", "timezone"),
        ("0 3 * * *", "../etc/passwd", "timezone"),
    ],
)
def test_wrong_times_are_refused_in_one_line(cron: str, zone: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        cron_times(cron, zone)
    assert "\n" not in str(refused.value)


def test_a_schedule_is_named_after_what_it_does_and_starts_runs(
    prefect_client: SyncPrefectClient, evaluate: UUID
) -> None:
    made = add_evaluation(prefect_client, {**CHAT, "limits": {"items": 5}}, NIGHTLY, None)
    assert made.name == NAME == made.schedule.slug
    times = next_runs(prefect_client, made)
    assert times.startswith("next runs ") and times.count(" 03:00") == 3 and times.endswith("UTC")
    first = min(runs(prefect_client, evaluate), key=lambda run: str(run.expected_start_time))
    assert {**CHAT, "limits": {"items": 5}}.items() <= first.parameters.items() and schedule_of(
        prefect_client, first
    ) == NAME
    with pytest.raises(ConfigError, match=f"there is a schedule '{NAME}' already: give another --name, or remove it"):
        add_evaluation(prefect_client, CHAT, NIGHTLY, None)
    assert add_evaluation(prefect_client, CHAT, NIGHTLY, "another").name == "another"
    (row,) = (row for row in overview(prefect_client) if row["name"] == NAME)
    assert (row["runs"], row["when"], row["state"], row["last"]) == (NAME, "0 3 * * * UTC", "on", None)
    assert str(row["next"]).endswith("03:00 UTC")


def test_pause_and_remove_leave_the_other_schedules_their_runs(
    prefect_client: SyncPrefectClient, evaluate: UUID
) -> None:
    kept = add_evaluation(prefect_client, CHAT, NIGHTLY, "kept")
    other = add_evaluation(prefect_client, CHAT, NIGHTLY, "other")
    before = next_runs(prefect_client, kept)
    switch(prefect_client, "other", active=False)
    assert next_runs(prefect_client, other) == "no run is planned" and next_runs(prefect_client, kept) == before
    states = {row["name"]: row["state"] for row in overview(prefect_client)}
    assert states == {"kept": "on", "other": "paused"}
    switch(prefect_client, "other", active=True)
    assert next_runs(prefect_client, other) == before
    remove(prefect_client, "other")
    assert [known.name for known in known_schedules(prefect_client)] == ["kept"]
    assert next_runs(prefect_client, other) == "no run is planned" and next_runs(prefect_client, kept) == before


def test_a_paused_schedule_skips_its_run_that_no_worker_has_taken(
    prefect_client: SyncPrefectClient, evaluate: UUID
) -> None:
    made = add_evaluation(prefect_client, CHAT, NIGHTLY, None)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    window = {"start_time": yesterday.isoformat(), "end_time": datetime.now(UTC).isoformat()}
    prefect_client.request("POST", "/deployments/{id}/schedule", path_params={"id": evaluate}, json=window)
    late = min(runs(prefect_client, evaluate), key=lambda run: str(run.expected_start_time))
    switch(prefect_client, NAME, active=False)
    state = prefect_client.read_flow_run(late.id).state
    assert state is not None and (state.name, state.message) == ("Skipped", f"the schedule {made.name} was paused")
    (row,) = overview(prefect_client)
    assert str(row["last"]).startswith("Skipped, ")


def test_the_last_run_of_a_schedule_is_found_behind_any_number_of_other_runs(
    prefect_client: SyncPrefectClient, evaluate: UUID
) -> None:
    """Of its deployment; what is read does not grow with them."""
    add_evaluation(prefect_client, CHAT, NIGHTLY, None)
    own = min(runs(prefect_client, evaluate), key=lambda run: str(run.expected_start_time))
    prefect_client.set_flow_run_state(own.id, Completed(), force=True)
    counts = []
    for _ in range(3):
        prefect_client.create_flow_run_from_deployment(evaluate, state=Completed(), parameters=CHAT)
        counts.append(rows_read(prefect_client, lambda: overview(prefect_client)))
    (row,) = overview(prefect_client)
    assert str(row["last"]).startswith("Completed, ") and counts == [counts[0]] * 3


@pytest.mark.parametrize("end", ["pause", "remove"])
def test_a_run_that_waits_to_start_again_outlives_the_end_of_its_schedule(
    prefect_client: SyncPrefectClient, evaluate: UUID, end: str
) -> None:
    """Else its finished tasks would be lost."""
    add_evaluation(prefect_client, CHAT, NIGHTLY, None)
    crashed, retried, following, *_ = sorted(
        runs(prefect_client, evaluate), key=lambda run: str(run.expected_start_time)
    )
    again: dict[UUID, State[Any]] = {
        crashed.id: Scheduled(name=RESCUED),
        retried.id: Scheduled(name="Late"),  # as the server calls any run that is late
    }
    for run_id, state in again.items():
        prefect_client.set_flow_run_state(run_id, Running(), force=True)
        prefect_client.set_flow_run_state(run_id, state, force=True)
    (row,) = overview(prefect_client)
    assert row["next"] == f"{following.expected_start_time:%Y-%m-%d %H:%M} UTC"
    if end == "remove":
        remove(prefect_client, NAME)
    else:
        switch(prefect_client, NAME, active=False)
    left = [prefect_client.read_flow_run(run_id).state_name for run_id in again]
    assert left == [RESCUED, "Late"]
    waiting = [run for run in runs(prefect_client, evaluate) if run.state_name == "Scheduled"]
    assert waiting == []


def test_a_schedule_of_the_page_is_listed_found_paused_and_removed(
    prefect_client: SyncPrefectClient, evaluate: UUID
) -> None:
    """The page needs no name, and leaves out the values that the form has by itself."""
    every = IntervalSchedule(interval=timedelta(hours=6))
    bare: dict[str, Any] = {"suite": "standard"}
    (made,) = prefect_client.create_deployment_schedules(evaluate, [(every, True)], parameters=bare)
    title = "vectorclm-chat@candidate on standard"
    (row,) = overview(prefect_client)
    assert (row["name"], row["runs"], row["when"]) == (title, title, "every 6:00:00")
    assert find(prefect_client, title).schedule.id == find(prefect_client, str(made.id)[:8]).schedule.id == made.id
    (twin,) = prefect_client.create_deployment_schedules(evaluate, [(every, True)], parameters=bare)
    with pytest.raises(ConfigError, match=f"2 schedules are called '{title}': give the id of one"):
        remove(prefect_client, title)
    assert remove(prefect_client, str(twin.id)).schedule.id == twin.id
    switch(prefect_client, title, active=False)
    assert [known.schedule.active for known in known_schedules(prefect_client)] == [False]
    remove(prefect_client, title)
    with pytest.raises(ConfigError, match=f"there is no schedule '{title}': there is none at all"):
        switch(prefect_client, title, active=True)


def test_schedules_of_other_deployments_are_listed_too(
    prefect_client: SyncPrefectClient, evaluate: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_file, "PAGE", 1)  # the server's limit, with fewer deployments
    flow_id = prefect_client.create_flow_from_name("curriculum")
    curriculum = prefect_client.create_deployment(flow_id, "tiny", paused=True)
    prefect_client.create_deployment_schedules(curriculum, [(NIGHTLY, True)], slug="each night")
    (row,) = overview(prefect_client)
    assert (row["name"], row["runs"]) == ("each night", "the deployment tiny")
    assert row["state"] == "paused with its deployment" and row["next"] is None
    with pytest.raises(ConfigError, match="there is no schedule 'owl': there are 'each night'"):
        find(prefect_client, "owl")
    prefect_client.delete_deployment(curriculum)


def test_without_its_deployment_no_schedule_is_set(prefect_client: SyncPrefectClient) -> None:
    for found in prefect_client.read_deployments():
        prefect_client.delete_deployment(found.id)
    with pytest.raises(ConfigError, match="Prefect has no deployment evaluate/evaluate: run `vectorclm up`"):
        add_evaluation(prefect_client, CHAT, NIGHTLY, None)


def test_a_model_is_named_as_the_form_takes_it(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    chat, store = recorded.handles["finetune"], recorded.store
    for name in ("vectorclm-chat@candidate", "models:/vectorclm-chat@candidate"):
        assert schedulable_model(name, store) == "models:/vectorclm-chat@candidate"
    assert schedulable_model("vectorclm-chat/1", store) == "models:/vectorclm-chat/1"
    for name in (chat["uri"], f"finetune/{chat['fingerprint'][:12]}", recorded.experiment.name):
        assert schedulable_model(name, store) == chat["uri"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vectorclm-chat@nobody", "has no models:/vectorclm-chat@nobody"),
        ("vectorclm-owl@candidate", "has no models:/vectorclm-owl@candidate"),
        ("vectorclm-chat", "of a registered model, write the alias, too"),
        ("vectorclm-chat/99", "has no models:/vectorclm-chat/99"),
        ("finetune/000000", "finetune/000000"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("owl", "has no model 'owl'"),
    ],
)
def test_an_unknown_model_is_named_in_one_line(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(VectorCLMError, match=message) as refused:
        schedulable_model(name, recorded.store)
    assert "\n" not in str(refused.value)
