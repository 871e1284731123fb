"""Emit an event for each incident of the platform: a run that failed or recovered, a disk that is full or has room.

An automation notifies the operator of these events. Each incident has one event, also if the server starts again: a run
keeps the state that was reported as a label, and a variable of Prefect names the disks that are full.
"""

import json
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from httpx import HTTPError
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import VariableCreate, VariableUpdate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound

from flows.handle import DISK_FULL, DISK_RECOVERED, DRY_RUN, RUN_FAILED, RUN_RECOVERED
from flows.platform.events import emit
from flows.platform.machine_checks import Disk, disks
from vectorclm.store.artifact import Store

REPORTED = "vectorclm.reported"  # the label of a run with its last event and the id of the state that was reported
FULL_DISKS = "vectorclm_full_disks"  # the variable with the paths of full disks
RECENT = timedelta(hours=6)  # older ends of runs are not reported, such as those before an upgrade
OVERLAP = timedelta(minutes=5)  # between the periods of two looks
FINAL = timedelta(seconds=60)  # after which a crashed run is not started again: the attendant does it within 35 s
ROOMY = 1.2  # a full disk has recovered with so many times the least room
FEW = 5  # runs that are read at once in a search for an earlier one: mostly the first is the one
SUBJECT = ("experiment", "stage", "model", "suite")  # the parameters that say what a run is about
ENDED = (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED)  # a person knows of a run that was cancelled

logger = logging.getLogger(__name__)


class Incidents:
    """Looks for new incidents among the runs of deployments and on the disks of this machine."""

    def __init__(self, client: SyncPrefectClient, store: Store, home: Path) -> None:
        self.client, self.store, self.home = client, store, home
        self._full: set[str] | None = None  # paths; None: not read yet
        self._since = datetime.now(UTC) - RECENT
        self._seen: set[UUID] = set()  # states

    def look_at_runs(self) -> None:
        """Look once at the runs that ended since the last look."""
        begun = datetime.now(UTC)
        runs = self._ended(end_time={"after_": self._since})
        for run in reversed(runs):
            if run.state is None or run.state.id in self._seen:
                continue
            if run.state.is_crashed() and begun - run.state.timestamp < FINAL:
                continue  # it may start again
            if _reported(run) not in [(event, str(run.state.id)) for event in (RUN_FAILED, RUN_RECOVERED)]:
                self._report_end(run, run.state)
            self._seen.add(run.state.id)
        self._seen &= {run.state.id for run in runs if run.state is not None}
        self._since = max(self._since, begun - OVERLAP)

    def _ended_before(self, run: FlowRun) -> Iterator[FlowRun]:
        """The runs of the same deployment that ended before this one, the last one first, read as far as is asked."""
        conditions = {"deployment_id": {"any_": [run.deployment_id]}, "end_time": {"before_": run.end_time}}
        offset, page = 0, [run]
        while page:
            page = self._ended(limit=FEW, offset=offset, **conditions)
            yield from page
            offset += len(page)

    def _ended(self, limit: int | None = None, offset: int = 0, **conditions: Any) -> list[FlowRun]:
        """Runs of deployments that ended, the last one first; runs that are part of another run are left out."""
        wanted = {
            "state": {"type": {"any_": list(ENDED)}},
            "parent_task_run_id": {"is_null_": True},
            "deployment_id": {"is_null_": False},
            **conditions,
        }
        asked, order = FlowRunFilter.model_validate(wanted), FlowRunSort.END_TIME_DESC
        return self.client.read_flow_runs(flow_run_filter=asked, sort=order, limit=limit, offset=offset)

    def _report_end(self, run: FlowRun, state: State[Any]) -> None:
        """Report the end of a run as a failure or as a recovery, unless it is neither."""
        if not state.is_completed():
            how = "crashed, and does not start again by itself" if state.is_crashed() else "failed"
            remedy = "Finished stages are kept: fix the cause, then press Retry on the page of the run."
            self._report(RUN_FAILED, run, state, [f"{run.name} {how}", state.message or "", remedy])
        elif state.name != DRY_RUN and (before := self._failure_before(run)) is not None:
            lines = [f"{self._deployment_name(run)} runs again", f"{run.name} completed; {before.name} had failed."]
            self._report(RUN_RECOVERED, run, state, lines)

    def _failure_before(self, run: FlowRun) -> FlowRun | None:
        """This run before its retry, or else the run before it about the same subject, if its failure was reported."""
        if _reported(run)[0] == RUN_FAILED:
            return run
        for earlier in self._ended_before(run):
            is_other = earlier.id != run.id and earlier.state_name != DRY_RUN
            if is_other and all(earlier.parameters.get(name) == run.parameters.get(name) for name in SUBJECT):
                failed = earlier.state_type != StateType.COMPLETED and _reported(earlier)[0] == RUN_FAILED
                return earlier if failed else None
        return None

    def _deployment_name(self, run: FlowRun) -> str:
        with suppress(ObjectNotFound):
            if run.deployment_id is not None:
                return self.client.read_deployment(run.deployment_id).name
        return run.name

    def _report(self, event: str, run: FlowRun, state: State[Any], lines: Sequence[str]) -> None:
        about = {"run": run.name, "run_id": str(run.id), "state": state.name, "message": state.message}
        related = {
            "prefect.resource.id": f"prefect.flow-run.{run.id}",
            "prefect.resource.role": "flow-run",
            "prefect.resource.name": run.name,
        }
        resource = {"prefect.resource.id": f"vectorclm.flow-run.{run.id}", "prefect.resource.name": run.name}
        event_id = uuid5(state.id, event)  # the same one where the label is not written, and the server starts again
        emit(self.client, event, [resource, related], [line for line in lines if line], about, event_id)
        self._seen.add(state.id)  # also if the label cannot be written
        self.client.update_flow_run_labels(run.id, {REPORTED: f"{event} {state.id}"})

    def look_at_disks(self) -> None:
        """Look once at the disks on which the platform writes."""
        if self._full is None:
            self._full = self._read_full()
        before = set(self._full)
        try:
            for disk in disks(self.store, self.home):
                self._check_disk(disk, self._full)
        finally:  # what was reported before a disk failed is not reported again
            if self._full != before:
                self._write_full(self._full)

    def _check_disk(self, disk: Disk, full: set[str]) -> None:
        """Report a disk that has become full or has room again; changes the paths of full disks."""
        if disk.path not in full and disk.lacks(1.0):
            self._report_disk(DISK_FULL, disk, ["a disk of the platform is almost full", f"{disk}: {disk.remedy}"])
            full.add(disk.path)
        elif disk.path in full and not disk.lacks(ROOMY):
            self._report_disk(DISK_RECOVERED, disk, ["a disk of the platform has room again", str(disk)])
            full.remove(disk.path)

    def _report_disk(self, event: str, disk: Disk, lines: Sequence[str]) -> None:
        machine = socket.gethostname()
        name = {"prefect.resource.id": f"vectorclm.disk.{machine}.{disk.path}", "prefect.resource.name": disk.path}
        about = {"machine": machine, "places": disk.places, "free_bytes": disk.free}
        emit(self.client, event, [name], [f"{machine}: {lines[0]}", *lines[1:]], about)

    def _read_full(self) -> set[str]:
        found = self.client.read_variable_by_name(FULL_DISKS)
        with suppress(TypeError, ValueError):
            return {str(path) for path in json.loads(str(found.value))} if found is not None else set()
        return set()

    def _write_full(self, full: set[str]) -> None:
        value = json.dumps(sorted(full))
        try:
            if self.client.read_variable_by_name(FULL_DISKS) is None:
                self.client.create_variable(VariableCreate(name=FULL_DISKS, value=value))
            else:
                self.client.update_variable(VariableUpdate(name=FULL_DISKS, value=value))
        except HTTPError as error:  # no room for Prefect's database either
            logger.warning("the names of full disks were not kept: %s", error)


def _reported(run: FlowRun) -> tuple[str, str]:
    """The last event that was emitted for a run, and the id of the state that it reported; empty without one."""
    event, _, state = str(run.labels.get(REPORTED, "")).partition(" ")
    return event, state
