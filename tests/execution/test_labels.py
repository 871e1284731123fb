"""Names, tags and processes of runs on a real server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import flow_run
from prefect.states import Running

from flows.execution.labels import PROCESS, is_dead, label, name_of_this_run, record_process
from vectorclm.runtime.processes import process_identity

USUAL: dict[str, Any] = {"experiment": "tiny", "changes": {"seed": 1}}
CHANGED: dict[str, Any] = {"experiment": "tiny", "changes": {"seed": 2}}


@pytest.fixture
def deployment(prefect_client: SyncPrefectClient) -> UUID:
    flow_id = prefect_client.create_flow_from_name("labelled")
    return prefect_client.create_deployment(flow_id, "labelled", parameters=USUAL)


def started(client: SyncPrefectClient, deployment: UUID, name: str | None = None) -> FlowRun:
    return client.create_flow_run_from_deployment(
        deployment, name=name, parameters=CHANGED, tags=["mine"], state=Running()
    )


def test_a_run_gets_its_name_and_tags_and_a_typed_name_stays(
    prefect_client: SyncPrefectClient, deployment: UUID
) -> None:
    run = started(prefect_client, deployment)
    name = label(prefect_client, run)
    assert name.startswith("tiny seed=2, ") and name.endswith(f" ({str(run.id)[:4]})")
    known = prefect_client.read_flow_run(run.id)
    assert known.name == name
    assert set(known.tags) == {"mine", "experiment: tiny", "setting: seed", "from: API"}
    typed = started(prefect_client, deployment, "a lower rate")
    assert label(prefect_client, typed) == "a lower rate" == prefect_client.read_flow_run(typed.id).name
    prefect_client.delete_deployment(deployment)
    assert label(prefect_client, run).startswith("tiny seed=2, ")  # all parameters count as changed then


def test_a_flow_names_itself_when_it_starts(prefect_client: SyncPrefectClient) -> None:
    @flow(flow_run_name=name_of_this_run)
    def named(experiment: str) -> tuple[str, str]:
        return str(flow_run.id), str(flow_run.name)

    run_id, name = named("tiny")
    assert name.startswith("tiny, ") and prefect_client.read_flow_run(UUID(run_id)).name == name
    assert "experiment: tiny" in prefect_client.read_flow_run(UUID(run_id)).tags


def test_an_evaluation_is_named_after_what_it_does_and_a_typed_name_stays(prefect_client: SyncPrefectClient) -> None:
    @flow(flow_run_name=name_of_this_run)
    def measured(model: str, suite: str = "tiny") -> str:
        return str(flow_run.id)

    run = prefect_client.read_flow_run(UUID(measured("models:/vectorclm-chat@candidate")))
    assert run.name.startswith("vectorclm-chat@candidate on tiny, ") and run.name.endswith(f" ({str(run.id)[:4]})")
    assert "suite: tiny" in run.tags and not [tag for tag in run.tags if tag.startswith("experiment")]
    typed = prefect_client.create_flow_run(measured, "before the change", {"model": "a", "suite": "b"})
    assert label(prefect_client, typed) == "before the change" == prefect_client.read_flow_run(typed.id).name


@pytest.fixture
def process() -> Iterator[psutil.Popen]:
    found = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
    yield found
    if found.is_running():
        found.kill()
    found.wait()


def test_a_recorded_process_that_ended_is_noticed(
    prefect_client: SyncPrefectClient, deployment: UUID, process: psutil.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    record_process()  # outside of a run there is nothing to record
    run = started(prefect_client, deployment)
    assert not is_dead(run)  # nothing is known of it
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(run.id))
    record_process()
    run = prefect_client.read_flow_run(run.id)
    known = json.loads(str(run.labels[PROCESS]))
    assert known["pid"] == psutil.Process().pid and not is_dead(run)

    def of(**changes: object) -> FlowRun:
        changed = known | process_identity(process) | changes
        return run.model_copy(update={"labels": {PROCESS: json.dumps(changed)}})

    alive, elsewhere, newer = of(), of(machine="another"), of(infrastructure_pid="host:1")
    _, _, space = known["pids"].partition(" ")
    rebooted, contained = of(pids=f"another-boot {space}"), of(pids=known["pids"] + "x")
    assert not is_dead(alive) and is_dead(rebooted)
    process.kill()
    process.wait()
    assert is_dead(alive)
    assert not is_dead(elsewhere) and not is_dead(newer) and not is_dead(contained)
    assert not is_dead(run.model_copy(update={"labels": {PROCESS: "damaged"}}))
