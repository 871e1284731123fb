"""What becomes an event, once each: ends of runs, and disks that fill up or have room again; on a real server."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from httpx import ConnectError
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Completed, Crashed, Failed

from flows.handle import DISK_FULL, DISK_RECOVERED, DRY_RUN, RUN_FAILED, RUN_RECOVERED
from flows.platform import incidents as module
from flows.platform import machine_checks
from flows.platform.incidents import FULL_DISKS, Incidents
from flows.platform.machine_checks import Disk
from tests.services.platform import until
from tests.services.rows import rows_read
from vectorclm.store.artifact import Store

FAR = "a run for the end"  # after whose event no other one is on its way


@pytest.fixture
def deployment(prefect_client: SyncPrefectClient) -> Iterator[UUID]:
    made = prefect_client.create_deployment(prefect_client.create_flow_from_name("watched"), f"watched-{uuid4()}")
    yield made
    for run in prefect_client.read_flow_runs():
        if run.deployment_id == made:
            prefect_client.delete_flow_run(run.id)
    prefect_client.delete_deployment(made)


@pytest.fixture
def incidents(prefect_client: SyncPrefectClient, tmp_path: Path) -> Incidents:
    if prefect_client.read_variable_by_name(FULL_DISKS) is not None:
        prefect_client.delete_variable_by_name(FULL_DISKS)
    return Incidents(prefect_client, Store(str(tmp_path)), tmp_path)


def ended(client: SyncPrefectClient, deployment: UUID, name: str, state: State[Any], **parameters: Any) -> UUID:
    run_id = client.create_flow_run_from_deployment(deployment, name=name, parameters=parameters).id
    client.set_flow_run_state(run_id, state, force=True)
    return run_id


def events(client: SyncPrefectClient, resource: str, last: str) -> list[tuple[str, str]]:
    """The events about resources of this kind, each with its title, once the one with the title `last` is there."""

    def found() -> list[tuple[str, str]]:
        wanted = {"event": {"prefix": ["vectorclm."]}, "resource": {"id_prefix": [f"vectorclm.{resource}"]}}
        answer = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 50}).json()["events"]
        pairs = [
            (each["event"], each["payload"]["title"]) for each in sorted(answer, key=lambda each: each["occurred"])
        ]
        return pairs if any(title == last for _, title in pairs) else []

    return until(found, f"the event {last!r} is kept", 60)


def test_each_failure_is_one_event_and_the_next_success_about_the_same_is_another(
    prefect_client: SyncPrefectClient, deployment: UUID, incidents: Incidents
) -> None:
    client, subject = prefect_client, {"model": "models:/m@candidate", "suite": "tiny"}
    first = ended(client, deployment, "first", Failed(message="no space left"), **subject)
    incidents.look_at_runs()
    incidents.look_at_runs()
    Incidents(client, incidents.store, incidents.home).look_at_runs()  # the server starts again
    ended(client, deployment, "unwanted", Cancelled(), **subject)
    ended(client, deployment, "another model", Completed(), **subject | {"model": "models:/n@candidate"})
    ended(client, deployment, "looked up", Completed(name=DRY_RUN), **subject)
    incidents.look_at_runs()
    ended(client, deployment, "second", Completed(name="Reused"), **subject)
    incidents.look_at_runs()
    ended(client, deployment, "third", Completed(), **subject)
    incidents.look_at_runs()
    Incidents(client, incidents.store, incidents.home).look_at_runs()
    client.set_flow_run_state(first, Failed(message="retried in vain"), force=True)
    incidents.look_at_runs()
    client.set_flow_run_state(first, Completed(), force=True)
    incidents.look_at_runs()
    ended(client, deployment, FAR, Failed())
    incidents.look_at_runs()
    again = f"{client.read_deployment(deployment).name} runs again"
    assert [pair for pair in events(client, "flow-run.", f"{FAR} failed") if pair[1] in (again, "first failed")] == [
        (RUN_FAILED, "first failed"),
        (RUN_RECOVERED, again),
        (RUN_FAILED, "first failed"),
        (RUN_RECOVERED, again),
    ]


def test_what_is_read_of_a_run_that_ended_does_not_grow_with_older_runs(
    prefect_client: SyncPrefectClient, deployment: UUID, incidents: Incidents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OVERLAP", timedelta(0))
    monkeypatch.setattr(module, "FEW", 2)

    def read() -> int:
        ended(prefect_client, deployment, "another", Completed(), model="models:/m/1")
        return rows_read(prefect_client, incidents.look_at_runs)

    counts = [read() for _ in range(6)]
    assert counts[2:] == [counts[2]] * 4  # it, and FEW runs before it
    ended(prefect_client, deployment, "of another model", Completed(), model="models:/m/2")
    first = ended(prefect_client, deployment, "failed", Failed(), model="models:/m/3")
    incidents.look_at_runs()
    for _ in range(5):
        ended(prefect_client, deployment, "another", Completed(), model="models:/m/1")
    run = prefect_client.read_flow_run(ended(prefect_client, deployment, "again", Completed(), model="models:/m/3"))
    before = incidents._failure_before(run)
    assert before is not None and before.id == first  # also where it is on a later page


def test_a_failure_with_a_message_without_end_is_reported(
    prefect_client: SyncPrefectClient, deployment: UUID, incidents: Incidents
) -> None:
    """Prefect's server drops an event beyond its limit, and answers as if it kept it."""
    last = f"{FAR} {uuid4()}"
    most = get_current_settings().server.events.maximum_size_bytes
    ended(prefect_client, deployment, "verbose", Failed(message="no space left " + "." * most))
    incidents.look_at_runs()
    ended(prefect_client, deployment, last, Failed())
    incidents.look_at_runs()
    titles = [title for _, title in events(prefect_client, "flow-run.", f"{last} failed")]
    assert "verbose failed" in titles


def test_a_failure_whose_label_was_not_written_is_one_event(
    prefect_client: SyncPrefectClient, deployment: UUID, incidents: Incidents, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = f"{FAR} {uuid4()}"

    def fails(*_: Any) -> None:
        raise ConnectError("the server ends")

    run_id = ended(prefect_client, deployment, "unlabelled", Failed())
    with monkeypatch.context() as patch, pytest.raises(ConnectError):
        patch.setattr(prefect_client, "update_flow_run_labels", fails)
        incidents.look_at_runs()
    Incidents(prefect_client, incidents.store, incidents.home).look_at_runs()  # the server starts again
    ended(prefect_client, deployment, last, Failed())
    incidents.look_at_runs()
    events(prefect_client, "flow-run.", f"{last} failed")
    assert len(events(prefect_client, f"flow-run.{run_id}", "unlabelled failed")) == 1


def test_a_crash_is_an_event_only_once_nothing_starts_the_run_again(
    prefect_client: SyncPrefectClient, deployment: UUID, incidents: Incidents, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(prefect_client, deployment, "crashes", Crashed(message="killed"))
    incidents.look_at_runs()
    ended(prefect_client, deployment, "fails meanwhile", Failed())
    incidents.look_at_runs()
    monkeypatch.setattr(module, "FINAL", timedelta(0))
    incidents.look_at_runs()
    incidents.look_at_runs()
    title = "crashes crashed, and does not start again by itself"
    found = events(prefect_client, "flow-run.", title)
    mine = [pair for pair in found if pair[1] in ("fails meanwhile failed", title)]
    assert mine == [(RUN_FAILED, "fails meanwhile failed"), (RUN_FAILED, title)]


def test_a_run_without_a_deployment_or_of_long_ago_is_none(
    prefect_client: SyncPrefectClient, deployment: UUID, incidents: Incidents, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(prefect_client, deployment, "of long ago", Failed())
    monkeypatch.setattr(module, "RECENT", timedelta(0))
    later = Incidents(prefect_client, incidents.store, incidents.home)
    later.look_at_runs()
    ended(prefect_client, deployment, "of today", Failed())
    later.look_at_runs()
    titles = [title for _, title in events(prefect_client, "flow-run.", "of today failed")]
    assert "of long ago failed" not in titles


def test_a_full_disk_is_one_event_also_where_the_next_disk_does_not_answer(
    prefect_client: SyncPrefectClient, incidents: Incidents, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/full/{uuid4()}"

    def found(*_: Any) -> Iterator[Disk]:
        yield Disk(path, f"home {path}", 0, None, "remove something")
        raise OSError("stale file handle")

    monkeypatch.setattr(module, "disks", found)
    for _ in range(2):  # the server starts again
        with pytest.raises(OSError, match="stale"):
            Incidents(prefect_client, incidents.store, incidents.home).look_at_disks()
    machine = module.socket.gethostname()
    title = f"{machine}: a disk of the platform is almost full"
    last = f"/full/{uuid4()}"
    monkeypatch.setattr(module, "disks", lambda *_: [Disk(last, f"home {last}", 0, None, "remove something")])
    incidents.look_at_disks()
    events(prefect_client, f"disk.{machine}.{last}", title)
    assert events(prefect_client, f"disk.{machine}.{path}", title) == [(DISK_FULL, title)]


def test_a_full_disk_and_its_recovery_are_an_event_each(
    prefect_client: SyncPrefectClient, incidents: Incidents, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (disk,) = {disk.free for disk in machine_checks.disks(incidents.store, tmp_path) if disk.path == str(tmp_path)}
    free = disk / 1e9
    incidents.look_at_disks()
    for least in (1.1, 1.1, 0.9, 1.1):  # between the least room and 1.2 times that, nothing is said anew
        monkeypatch.setattr(machine_checks, "FREE_GIGABYTES", least * free)
        incidents.look_at_disks()
    restarted = Incidents(prefect_client, incidents.store, incidents.home)
    restarted.look_at_disks()
    monkeypatch.setattr(machine_checks, "FREE_GIGABYTES", 0.5 * free)
    restarted.look_at_disks()
    restarted.look_at_disks()
    name = f"disk.{module.socket.gethostname()}.{tmp_path}"
    found = events(prefect_client, name, f"{module.socket.gethostname()}: a disk of the platform has room again")
    assert [event for event, _ in found] == [DISK_FULL, DISK_RECOVERED]
