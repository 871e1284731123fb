"""The attendant on a real server: names new runs, says for whom one waits, closes and revives the dead."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import LogFilter
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, Pending, Running, Scheduled

from flows.execution.labels import PROCESS, record_process
from flows.experiments import FOLDER
from flows.handle import CURRICULA, RESCUED
from flows.platform import attendant as module
from flows.platform import incidents
from flows.platform.attendant import Attendant, ExperimentForms, attend
from tests.services.platform import until
from tests.services.rows import rows_read
from vectorclm.runtime.processes import process_identity
from vectorclm.store.artifact import Store

Start = Callable[[], None]


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv(FOLDER, raising=False)


@pytest.fixture
def deployment(prefect_client: SyncPrefectClient) -> Iterator[UUID]:
    """A deployment in the queue of curricula; its runs are gone in the end."""
    prefect_client.create_work_pool(WorkPoolCreate(name="cpu", type="process"), overwrite=True)
    with suppress(ObjectAlreadyExists):
        prefect_client.create_work_queue(CURRICULA, concurrency_limit=1, work_pool_name="cpu")
    made = prefect_client.create_deployment(
        prefect_client.create_flow_from_name("attended"),
        "attended",
        work_pool_name="cpu",
        work_queue_name=CURRICULA,
        parameters={"experiment": "tiny"},
    )
    yield made
    for run in prefect_client.read_flow_runs():
        if run.deployment_id == made:
            prefect_client.delete_flow_run(run.id)


def started(client: SyncPrefectClient, deployment: UUID, state: Any = None, **options: Any) -> UUID:
    parameters = {"experiment": "tiny"}
    return client.create_flow_run_from_deployment(deployment, state=state, parameters=parameters, **options).id


def log(client: SyncPrefectClient, run_id: UUID) -> list[str]:
    mine = LogFilter.model_validate({"flow_run_id": {"any_": [run_id]}})
    return [line.message for line in client.read_logs(log_filter=mine)]


def test_runs_wait_in_order_and_say_for_whom(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    attendant = Attendant(prefect_client)
    first = started(prefect_client, deployment, Pending(), name="the first")
    second, third = started(prefect_client, deployment), started(prefect_client, deployment)
    attendant.look()
    for place, run_id in ((1, second), (2, third)):
        run = prefect_client.read_flow_run(run_id)
        assert run.name.startswith("tiny, ") and "experiment: tiny" in run.tags
        message = f"waits for the first to end; place {place} in the queue"
        assert run.state is not None and (run.state_name, run.state.message) == ("Queued", message)
        until(lambda run_id=run_id, message=message: message in log(prefect_client, run_id), "the log says so", 30)
    before = prefect_client.read_flow_run(second).state
    attendant.look()
    assert prefect_client.read_flow_run(second).state == before  # nothing new to say
    prefect_client.delete_flow_run(first)
    prefect_client.set_flow_run_state(second, Running(), force=True)
    attendant.look()
    state = prefect_client.read_flow_run(third).state
    assert state is not None and str(state.message).startswith("waits for tiny, ") and "place 1" in str(state.message)
    due = prefect_client.read_flow_run(third).next_scheduled_start_time
    assert due is not None and due <= datetime.now(UTC)  # a worker may take it at any time


def test_a_run_that_a_worker_takes_during_a_look_is_not_put_back(
    prefect_client: SyncPrefectClient, deployment: UUID
) -> None:
    """Put back among those that wait, it would be started a second time."""
    attendant = Attendant(prefect_client)
    started(prefect_client, deployment, Pending(), name="the first")
    second = started(prefect_client, deployment, name="the second")
    seen = attendant._runs()
    prefect_client.set_flow_run_state(second, Pending())
    attendant._queue(seen)
    assert prefect_client.read_flow_run(second).state_name == "Pending"
    assert log(prefect_client, second) == []


def test_the_end_of_a_run_renews_only_the_first_places_of_a_long_queue(
    prefect_client: SyncPrefectClient, deployment: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PLACES", 2)
    monkeypatch.setattr(module, "PAGE", 3)  # so that the queue is read in several pages
    attendant = Attendant(prefect_client)
    active = started(prefect_client, deployment, Pending(), name="run 0")
    waiting = [started(prefect_client, deployment, name=f"run {number}") for number in range(1, 7)]

    def states() -> list[State[Any]]:
        attendant.look()
        found = [prefect_client.read_flow_run(run_id).state for run_id in waiting]
        return [state for state in found if state is not None]

    before = states()
    assert [state.name for state in before] == ["Queued"] * 6
    assert [str(state.message).rpartition("; ")[2] for state in before] == [
        "place 1 in the queue", "place 2 in the queue", *["place 3 or later in the queue"] * 4
    ]  # fmt: skip
    prefect_client.set_flow_run_state(active, Completed(), force=True)
    prefect_client.set_flow_run_state(waiting.pop(0), Pending())
    after = states()
    assert [str(state.message).rpartition("; ")[2] for state in after[:3]] == [
        "place 1 in the queue", "place 2 in the queue", "place 3 or later in the queue"
    ]  # fmt: skip
    assert [state.id for state in after[2:]] == [state.id for state in before[3:]]


def test_a_run_that_crashed_and_starts_again_is_the_next_one_of_its_queue(
    prefect_client: SyncPrefectClient, deployment: UUID
) -> None:
    """A person's retry is a new wish, and takes its turn."""
    crashed, failed, active, waiting = (started(prefect_client, deployment, name=f"run {n}") for n in range(4))
    prefect_client.set_flow_run_state(active, Pending())
    for run_id, end, again in (
        (crashed, Crashed(), Scheduled(name=RESCUED)),
        (failed, Failed(), Scheduled(name="AwaitingRetry")),
    ):
        prefect_client.set_flow_run_state(run_id, Running(), force=True)
        prefect_client.set_flow_run_state(run_id, end, force=True)
        prefect_client.set_flow_run_state(run_id, again)
    Attendant(prefect_client).look()
    due = {
        run_id: prefect_client.read_flow_run(run_id).next_scheduled_start_time for run_id in (crashed, waiting, failed)
    }
    assert list(due) == sorted(due, key=lambda run_id: due[run_id])  # as workers take them
    states = [prefect_client.read_flow_run(run_id).state for run_id in due]
    assert [str(state and state.message).rpartition("; ")[2] for state in states] == [
        f"place {place} in the queue" for place in (1, 2, 3)
    ]


def test_a_look_reads_no_run_that_ended_long_ago(
    prefect_client: SyncPrefectClient, deployment: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RECENT", module.timedelta(0))
    attendant = Attendant(prefect_client)
    started(prefect_client, deployment)
    before = rows_read(prefect_client, attendant.look)
    for state in (Completed(), Crashed(), Failed(), Crashed(), Cancelled()):
        started(prefect_client, deployment, state)
    assert rows_read(prefect_client, attendant.look) == before > 0


@pytest.fixture
def process() -> Iterator[psutil.Popen]:
    found = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
    yield found
    if found.is_running():
        found.kill()
    found.wait()


def test_a_cancelled_run_is_cancelled_and_no_crash_when_its_process_ends(
    prefect_client: SyncPrefectClient, deployment: UUID, process: psutil.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = started(prefect_client, deployment, Running())
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(run_id))
    record_process()
    known = json.loads(str(prefect_client.read_flow_run(run_id).labels[PROCESS]))
    prefect_client.update_flow_run_labels(run_id, {PROCESS: json.dumps(known | process_identity(process))})
    prefect_client.set_flow_run_state(run_id, Cancelling())
    process.kill()
    process.wait()
    attendant = Attendant(prefect_client)
    for _ in range(module.DEAD_LOOKS):
        assert prefect_client.read_flow_run(run_id).state_name == "Cancelling"
        attendant.look()
    assert prefect_client.read_flow_run(run_id).state_name == "Cancelled"


def test_a_cancelled_run_is_closed_in_mlflow_also_where_its_process_could_not(
    prefect_client: SyncPrefectClient, deployment: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(module, "close_runs", closed.append)  # of MLflow, which has a test of its own
    monkeypatch.setattr(module, "CLOSE_AFTER", module.timedelta(0))
    cancelled, done, removed = (started(prefect_client, deployment, Running()) for _ in range(3))
    attendant = Attendant(prefect_client)
    attendant.look()
    assert closed == []
    prefect_client.set_flow_run_state(cancelled, Cancelled(), force=True)
    prefect_client.set_flow_run_state(done, Completed(), force=True)
    prefect_client.delete_flow_run(removed)
    for _ in range(2):
        attendant.look()
        assert closed == [str(cancelled)]


def test_a_dead_run_is_noticed_closed_and_starts_again(
    prefect_client: SyncPrefectClient, deployment: UUID, process: psutil.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(module, "close_runs", closed.append)  # of MLflow, which has a test of its own
    run_id = started(prefect_client, deployment, Running())
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(run_id))
    record_process()
    known = json.loads(str(prefect_client.read_flow_run(run_id).labels[PROCESS]))
    prefect_client.update_flow_run_labels(run_id, {PROCESS: json.dumps(known | process_identity(process))})
    attendant = Attendant(prefect_client)

    def name() -> str | None:
        attendant.look()
        return prefect_client.read_flow_run(run_id).state_name

    assert name() == name() == name() == "Running"
    process.kill()
    process.wait()
    assert name() == "Running" and name() == "Crashed"  # its worker, if it lives, has the time of one look
    assert closed == [] and name() == "Crashed" and closed == [str(run_id)]
    until(lambda: log(prefect_client, run_id), "the log says so", 30)
    (line,) = log(prefect_client, run_id)
    assert line.startswith("crashed: its process is gone") and line.endswith("and finished work is kept")
    assert name() == "Crashed" and len(closed) == 1
    monkeypatch.setattr(module, "RESCUE_SECONDS", 0)
    assert name() == RESCUED


def test_an_old_crash_is_left_alone(
    prefect_client: SyncPrefectClient, deployment: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESCUE_SECONDS", 0)
    monkeypatch.setattr(module, "RECENT", module.timedelta(0))
    run_id = started(prefect_client, deployment, Running())
    prefect_client.set_flow_run_state(run_id, Crashed(), force=True)
    Attendant(prefect_client).look()
    assert prefect_client.read_flow_run(run_id).state_name == "Crashed"


def test_a_scheduled_run_of_tomorrow_waits_unnamed(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    tomorrow = datetime.now(UTC) + module.timedelta(days=1)
    later = started(prefect_client, deployment, Scheduled(scheduled_time=tomorrow), name="brave-otter")
    Attendant(prefect_client).look()
    assert prefect_client.read_flow_run(later).name == "brave-otter"


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_change_in_the_folder_fills_the_forms_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_slow: bool
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        ran.append(command)
        if is_slow:
            raise subprocess.TimeoutExpired(command, 300)
        return subprocess.CompletedProcess(command, 0, "filled", "")

    monkeypatch.setattr(module.subprocess, "run", run)  # the command has a test of its own
    forms = ExperimentForms()
    forms.look()
    assert ran == []
    (tmp_path / "own.toml").write_text("")
    with pytest.raises(subprocess.TimeoutExpired) if is_slow else nullcontext():
        forms.look()
    forms.look()
    assert ran == [[sys.executable, "-m", "flows.platform.experiment_forms"]]


@pytest.fixture
def beside(prefect_client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start the attendant beside the server; it ends with the test."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    auth = get_current_settings().api.auth_string
    secret = auth.get_secret_value() if auth is not None else None
    started: list[threading.Event] = []
    yield lambda: started.append(attend(str(prefect_client.api_url), secret, Store(str(tmp_path))))
    for ended in started:
        ended.set()


def test_it_works_beside_the_server_and_outlives_errors(
    prefect_client: SyncPrefectClient, deployment: UUID, monkeypatch: pytest.MonkeyPatch, beside: Start
) -> None:
    looks: list[Attendant] = []
    look = Attendant.look

    def fails_once(self: Attendant) -> None:
        looks.append(self)
        if len(looks) == 1:
            raise ConnectionError("the server is starting")
        look(self)

    monkeypatch.setattr(Attendant, "look", fails_once)
    run_id = started(prefect_client, deployment)
    beside()
    until(lambda: prefect_client.read_flow_run(run_id).name.startswith("tiny, "), "the run has its name", 60)
    assert looks[0] is looks[1]  # what it had seen is not forgotten


@pytest.mark.parametrize("place", ["a disk", "the folder of experiments"])
def test_a_place_that_does_not_answer_keeps_no_run_waiting(
    prefect_client: SyncPrefectClient, deployment: UUID, monkeypatch: pytest.MonkeyPatch, beside: Start, place: str
) -> None:
    answers, asked = threading.Event(), threading.Event()

    def hangs(*_: Any) -> Any:
        asked.set()
        answers.wait()
        return {}

    if place == "a disk":
        monkeypatch.setattr(incidents, "disks", hangs)
    else:
        monkeypatch.setattr(module, "known_files", hangs)
    try:
        beside()
        assert asked.wait(60)
        run_id = started(prefect_client, deployment)
        until(lambda: prefect_client.read_flow_run(run_id).name.startswith("tiny, "), "the run has its name", 60)
    finally:
        answers.set()


def test_an_error_that_stays_is_a_warning_once(
    monkeypatch: pytest.MonkeyPatch,
    beside: Start,
    caplog: pytest.LogCaptureFixture,
) -> None:
    looks: list[str] = []

    def fails(*_: Any) -> Any:
        looks.append("stale" if len(looks) < 9 else "broken")
        raise OSError(f"{looks[-1]} file handle")

    monkeypatch.setattr(incidents, "disks", fails)
    beside()
    until(lambda: any("broken" in line for line in warned(caplog)), "the second error is a warning", 60)
    seen = len(looks)
    until(lambda: len(looks) > seen + 3, "others follow", 60)
    assert [line.rpartition(": ")[2] for line in warned(caplog)] == ["stale file handle", "broken file handle"]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == module.__name__]
