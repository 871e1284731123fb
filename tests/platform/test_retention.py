"""Old records go by a setting and new ones stay, at a real server; logs stay short while their writers go on."""

import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, LogFilter
from prefect.events import Event, Resource
from prefect.states import Completed

from flows.platform import process
from flows.platform.config import PlatformConfig
from flows.platform.retention import KEEP, Retention, kept_days, prefect_settings
from tests.conftest import private_prefect
from tests.services.platform import until
from vectorclm.errors import ConfigError

DAYS = 30
EVENT = "vectorclm.test.aged"


def recorded(client: SyncPrefectClient, flow_id: UUID, name: str) -> UUID:
    """A run that has ended, with a line of a log, an artifact and an event."""
    deployment = client.create_deployment(flow_id, name)
    run_id = client.create_flow_run_from_deployment(deployment, state=Completed()).id
    client.create_logs([{
        "name": "test", "level": 20, "message": name, "timestamp": datetime.now(UTC).isoformat(),
        "flow_run_id": str(run_id),
    }])  # fmt: skip
    client.create_artifact(ArtifactCreate(key=name, type="markdown", data=name, flow_run_id=run_id))
    event = Event(occurred=datetime.now(UTC), event=EVENT, resource=Resource({"prefect.resource.id": f"test.{name}"}))
    client.request("POST", "/events", json=[event.model_dump(mode="json")])
    return run_id


def kept(client: SyncPrefectClient, runs: dict[str, UUID]) -> dict[str, set[str]]:
    """The names of the runs that each kind of record is still of."""
    names, ids = {run: name for name, run in runs.items()}, {"any_": list(runs.values())}
    found_runs = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"id": ids}))
    logs = client.read_logs(log_filter=LogFilter.model_validate({"flow_run_id": ids}))
    artifacts = client.read_artifacts(artifact_filter=ArtifactFilter.model_validate({"flow_run_id": ids}))
    wanted: dict[str, Any] = {"filter": {"event": {"name": [EVENT]}}, "limit": 50}
    events = client.request("POST", "/events/filter", json=wanted).json()["events"]
    return {
        "runs": {names[run.id] for run in found_runs},
        "logs": {line.message for line in logs},
        "artifacts": {str(artifact.data) for artifact in artifacts},
        "events": {event["resource"]["prefect.resource.id"].removeprefix("test.") for event in events},
    }


def test_records_that_are_older_go_and_newer_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the old ones is set back in the database, as if they had been there for longer."""

    def client(environment: dict[str, str]) -> SyncPrefectClient:
        return SyncPrefectClient(environment["PREFECT_API_URL"], auth_string=environment["PREFECT_API_AUTH_STRING"])

    with private_prefect(tmp_path) as environment, client(environment) as first:
        flow_id = first.create_flow_from_name("aged")
        runs = {name: recorded(first, flow_id, name) for name in ("old", "young")}
        both = {key: {"old", "young"} for key in ("runs", "logs", "artifacts", "events")}
        until(lambda: kept(first, runs) == both, "the records are written", 60)
    past = datetime.now(UTC) - timedelta(days=DAYS + 1)
    with sqlite3.connect(tmp_path / "prefect.db") as database:
        moved = database.execute("UPDATE flow_run SET end_time = ? WHERE id = ?", (str(past), str(runs["old"])))
        moved = moved if moved.rowcount else database.execute(
            "UPDATE flow_run SET end_time = ? WHERE id = ?", (str(past), runs["old"].hex)
        )  # fmt: skip
        assert moved.rowcount == 1
        for table, column in (("events", "resource_id"), ("event_resources", "resource_id")):
            aged = database.execute(f"UPDATE {table} SET occurred = ? WHERE {column} = 'test.old'", (str(past),))
            assert aged.rowcount == 1
    monkeypatch.setenv(KEEP, str(DAYS))
    with private_prefect(tmp_path) as environment, client(environment) as second:
        left = {key: {"young"} for key in ("runs", "logs", "artifacts", "events")}
        until(lambda: kept(second, runs) == left, "the old records are gone", 60)


def test_a_log_is_cut_while_its_writer_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOG_BYTES", 100)
    (folder := tmp_path / "platform").mkdir()
    log, other = folder / "mlflow.log", folder / "mlflow.json"
    other.write_text("{}" * 100)
    writes = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
    with log.open("ab") as opened:
        child = subprocess.Popen([sys.executable, "-c", writes], stdin=subprocess.PIPE, stdout=opened, text=True)
    assert child.stdin is not None
    with child:
        retention = Retention(tmp_path, {})
        for number in range(3):
            text = f"line {number} " + "x" * 100
            print(text, file=child.stdin, flush=True)
            until(lambda text=text: log.read_text() == f"{text}\n", "the line is written", 60)
            retention.look()
            retention.look()  # a short log stays as it is
            assert (log.read_text(), (folder / "mlflow.log.1").read_text()) == ("", f"{text}\n")
    assert other.stat().st_size == 200 and (folder / "mlflow.log.1").stat().st_mode & 0o077 == 0


def test_the_setting_is_a_number_of_days() -> None:
    assert kept_days({}) is kept_days({KEEP: ""}) is None and prefect_settings(None) == {}
    for wrong in ("0", "-1", "a week", "1.5"):
        with pytest.raises(ConfigError, match=r"is not a number of days, 1 or more"):
            kept_days({KEEP: wrong})
    config = PlatformConfig(vectorclm_keep_records=DAYS)
    assert config.servers()[0].environment[KEEP] == config.client_environment()[KEEP] == str(DAYS)


def test_traces_are_asked_for_once_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an MLflow server nothing is asked at all."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/mlflow.db")
    begun = time.monotonic()
    made = Retention(tmp_path, {KEEP: "1"})
    made.look()
    assert made._next_traces > begun + 3000
    before = made._next_traces
    made.look()
    assert made._next_traces == before
