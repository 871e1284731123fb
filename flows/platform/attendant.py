"""The attendant of the runs, threads beside Prefect's server: names new runs, says for whom one waits, finds the dead.

Of several missed runs of a schedule it keeps the newest, and it reports scheduled runs that no worker takes.
It also looks for what the operator must know of (see `flows.platform.incidents`).
Every action can be repeated, and a lost server or a run that changes meanwhile does no harm: the next look decides.
"""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed, Scheduled

from flows.execution.labels import EVALUATES, TAGGED, is_dead, label
from flows.experiments import known_files
from flows.handle import CURRICULA, QUEUED, RESCUED
from flows.paths import local_folder
from flows.platform.config import POOLS
from flows.platform.deployment_file import PAGE
from flows.platform.incidents import Incidents
from flows.platform.missed_runs import ACTIVE, MISSED_AFTER, report_missed, skip_older
from flows.platform.mlflow_runs import close_runs
from flows.platform.resend import Resender
from flows.platform.retention import Retention
from vectorclm.store.artifact import Store

LOOK_SECONDS = 2.0
DEAD_LOOKS = 2  # a run is dead if this many looks find no process: its worker, if there is one, reports it first
CLOSE_AFTER = timedelta(seconds=10)  # from the end of a cancelled run: its processes close it themselves until then
RESCUE_SECONDS = 35  # after which a crashed run starts again, where no automation has started it
ASLEEP = timedelta(seconds=60)  # between two looks: the machine was suspended, and workers need time as after a start
RECENT = timedelta(hours=6)  # older crashes are left alone
FILL_SECONDS = 300  # at most, for the forms of all experiments
PLACES = 10  # of the queue, each of which is said; with further ones, each end of a run would renew every other run

Look = Callable[[], None]

logger = logging.getLogger(__name__)


class Attendant:
    """Looks at the runs of the platform again and again, until the process ends."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client = client
        self._missed: dict[UUID, int] = {}  # looks that found no process of a run
        self._crashed: set[UUID] = set()  # states whose run was closed in MLflow
        self._active: set[UUID] = set()  # runs of the look before
        self._left: dict[UUID, datetime] = {}  # runs that are active no more, since when
        self._awake_since = self._last_look = datetime.now(UTC)

    def look(self) -> None:
        """Look once at all unfinished and recently crashed runs."""
        runs = skip_older(self.client, self._runs())
        for run in runs:
            known = "experiment" in run.parameters or run.parameters.keys() >= EVALUATES
            if known and not any(tag.startswith(TAGGED) for tag in run.tags):
                label(self.client, run)
        self._queue([run for run in runs if run.work_queue_name == CURRICULA])
        for run in runs:
            if run.state is not None and run.state.is_crashed():
                self._attend(run, run.state)
            elif run.state is not None and run.state.type in ACTIVE and run.state.type != StateType.PENDING:
                self._check(run)
        self._close_cancelled({run.id for run in runs if run.state is not None and run.state.type in ACTIVE})
        self._report_missed(runs)

    def _close_cancelled(self, active: set[UUID]) -> None:
        """Close cancelled runs in MLflow, whose processes may have been killed before they could."""
        now = datetime.now(UTC)
        self._left |= dict.fromkeys(self._active - active, now)
        self._active = active
        for run_id in [run_id for run_id, since in self._left.items() if now - since >= CLOSE_AFTER]:
            del self._left[run_id]
            with suppress(ObjectNotFound):  # removed meanwhile
                state = self.client.read_flow_run(run_id).state
                if state is not None and state.is_cancelled():
                    close_runs(str(run_id))

    def _report_missed(self, runs: list[FlowRun]) -> None:
        """Report scheduled runs that no worker takes; workers first get time after a start and after a suspension."""
        now = datetime.now(UTC)
        if now - self._last_look > ASLEEP:
            self._awake_since = now
        self._last_look = now
        if now - self._awake_since >= MISSED_AFTER:
            report_missed(self.client, runs)

    def _runs(self) -> list[FlowRun]:
        """Runs of the pools that are due or run, and those that crashed lately, by the time at which they were due."""
        now = datetime.now(UTC)
        due = {"before_": now + timedelta(seconds=LOOK_SECONDS)}
        found = self._read(state={"type": {"any_": [StateType.SCHEDULED, *ACTIVE]}}, expected_start_time=due)
        found += self._read(state={"type": {"any_": [StateType.CRASHED]}}, end_time={"after_": now - RECENT})
        return sorted(found, key=_due)

    def _read(self, **wanted: Any) -> list[FlowRun]:
        """All runs of the pools that fulfil these conditions; the server returns PAGE of them at once."""
        found: list[FlowRun] = []
        pools = WorkPoolFilter.model_validate({"name": {"any_": list(POOLS)}})
        asked, order = FlowRunFilter.model_validate(wanted), FlowRunSort.EXPECTED_START_TIME_ASC
        while True:
            page = self.client.read_flow_runs(
                flow_run_filter=asked, work_pool_filter=pools, sort=order, limit=PAGE, offset=len(found)
            )
            found += page
            if len(page) < PAGE:
                return list({run.id: run for run in found}.values())  # a run may be on two pages if one has gone

    def _queue(self, runs: list[FlowRun]) -> None:
        """Say of each run that waits in the queue of curricula for whom it waits, and at which place."""
        active = [run for run in runs if run.state is not None and run.state.type in ACTIVE]
        waiting = [run for run in runs if run.state is not None and run.state.type == StateType.SCHEDULED]
        if not active:
            return
        for place, run in enumerate(waiting, 1):
            message = f"waits for {active[0].name} to end; place {place} in the queue"
            if place > PLACES:
                message = f"waits until the runs before it have ended; place {PLACES + 1} or later in the queue"
            assert run.state is not None
            if run.state.name != QUEUED or run.state.message != message:
                state: State[Any] = Scheduled(name=QUEUED, scheduled_time=_due(run), message=message)
                if self.client.set_flow_run_state(run.id, state).status == SetStateStatus.ACCEPT:  # not taken meanwhile
                    self._log(run, message)

    def _check(self, run: FlowRun) -> None:
        """Mark a run as crashed whose process on this machine has ended without a word, as after a reboot.

        A run that a person cancels is cancelled when its process has ended.
        """
        if not is_dead(run):
            self._missed.pop(run.id, None)
            return
        self._missed[run.id] = self._missed.get(run.id, 0) + 1
        if self._missed[run.id] >= DEAD_LOOKS:
            gone: State[Any] = Crashed(message="its process is gone: it was killed, or its machine started again")
            if run.state is not None and run.state.is_cancelling():
                gone = Cancelled(message="its process has ended")
            self.client.set_flow_run_state(run.id, gone, force=True)

    def _attend(self, run: FlowRun, state: State[Any]) -> None:
        """Close a crashed run in MLflow at once, say that it goes on, and start it again if nothing else does."""
        if state.id not in self._crashed:
            self._crashed.add(state.id)
            self._log(run, f"crashed: {state.message}; it starts again by itself, and finished work is kept")
            close_runs(str(run.id))
        if datetime.now(UTC) - state.timestamp > timedelta(seconds=RESCUE_SECONDS):
            message = "It crashed, and starts again: finished stages are reused."
            again: State[Any] = Scheduled(name=RESCUED, message=message)
            self.client.set_flow_run_state(run.id, again)

    def _log(self, run: FlowRun, message: str) -> None:
        line = {"name": "vectorclm", "level": logging.WARNING, "message": message}
        self.client.create_logs([{**line, "timestamp": datetime.now(UTC).isoformat(), "flow_run_id": str(run.id)}])


def _due(run: FlowRun) -> datetime:
    """The time that decides a run's place in the queue: one that crashed and starts again keeps its place."""
    first = run.expected_start_time or datetime.now(UTC)
    return first if run.state_name == RESCUED else run.next_scheduled_start_time or first


class ExperimentForms:
    """Fills the forms of the experiments again when a file in their folder has changed."""

    def __init__(self) -> None:
        self._files: Mapping[str, tuple[str, int, int]] | None = None  # None: not looked at yet

    def look(self) -> None:
        """Look once at the folder of experiments. Raises TimeoutExpired where the forms take too long."""
        before, self._files = self._files, _stamps()  # kept first: what fails is not repeated until the next change
        if before is None or before == self._files:
            return
        command = [sys.executable, "-m", "flows.platform.experiment_forms"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=FILL_SECONDS, check=False)
        for line in (done.stdout + done.stderr).splitlines():
            logger.warning("%s", line)


def _stamps() -> Mapping[str, tuple[str, int, int]]:
    """The experiments' files, each with its time and size."""
    found = {}
    for name, path in known_files().items():
        try:
            status = path.stat()
        except OSError:
            continue  # removed meanwhile
        found[name] = (str(path), status.st_mtime_ns, status.st_size)
    return found


def attend(url: str, auth: str | None, store: Store) -> threading.Event:
    """Attend the runs of the server at `url`, whatever goes wrong meanwhile, until the event is set.

    Disks, folders and records have a thread each beside that of the runs, as a file system that is away, or an MLflow
    that does not answer, may block a look.
    """
    ended = threading.Event()

    def runs(client: SyncPrefectClient) -> Sequence[Look]:
        incidents = Incidents(client, store, local_folder(store))
        return Attendant(client).look, incidents.look_at_runs, Resender(client).look

    def disks(client: SyncPrefectClient) -> Sequence[Look]:
        return (Incidents(client, store, local_folder(store)).look_at_disks,)

    def forms(client: SyncPrefectClient) -> Sequence[Look]:
        return (ExperimentForms().look,)

    def work(looks: Callable[[SyncPrefectClient], Sequence[Look]]) -> None:
        with SyncPrefectClient(url, auth_string=auth) as client:
            while client.api_healthcheck() is not None and not ended.wait(LOOK_SECONDS):
                pass  # the server is starting
            _repeat(looks(client), ended)

    def records(client: SyncPrefectClient) -> Sequence[Look]:
        return (Retention(local_folder(store)).look,)

    for looks in (runs, disks, forms, records):
        threading.Thread(target=work, args=[looks], daemon=True, name=f"attendant of {looks.__name__}").start()
    return ended


def _repeat(looks: Sequence[Look], ended: threading.Event) -> None:
    """Look again and again; each error is a warning the first time."""
    warned: set[str] = set()
    while not ended.wait(LOOK_SECONDS):
        for look in looks:
            try:
                look()
            except Exception as error:  # of any kind: a run has changed meanwhile, or a disk does not answer
                line = f"{type(error).__name__}: {error}"
                level = logging.DEBUG if line in warned else logging.WARNING
                logger.log(level, "the platform was not looked at: %s", line)
                warned.add(line)
