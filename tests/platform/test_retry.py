"""`vectorclm retry`: which run is started again with which settings, and what is said where that cannot be."""

import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings
from prefect.states import Completed

from flows.platform.retry import CURRICULUM, retry
from vectorclm.errors import ConfigError

SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "object" if name == "changes" else "string"} for name in ("experiment", "changes")},
    "additionalProperties": False,
}


@pytest.fixture
def deployment(prefect_client: SyncPrefectClient) -> UUID:
    flow_id = prefect_client.create_flow_from_name("curriculum")
    return prefect_client.create_deployment(
        flow_id, "curriculum", parameter_openapi_schema=SCHEMA, enforce_parameter_schema=True
    )


def finished(client: SyncPrefectClient, deployment: UUID, name: str, **parameters: Any) -> str:
    made = client.create_flow_run_from_deployment(deployment, name=name, parameters=parameters, state=Completed())
    return str(made.id)


def parameters_of(client: SyncPrefectClient, run_id: str) -> Mapping[str, Any]:
    run = client.read_flow_run(UUID(run_id))
    assert run.state_name == "Scheduled"
    return dict(run.parameters)


def test_a_run_is_started_again_as_it_was_or_with_other_settings(
    prefect_client: SyncPrefectClient, deployment: UUID
) -> None:
    form = {"seed": 3, "settings": {"finetune.epochs": 1.0, "sample.bytes": 20_000}}
    before = finished(prefect_client, deployment, "first-of-retry", experiment="tiny", changes=form)
    again = retry(before, None, [])
    assert again != before and parameters_of(prefect_client, again) == {"experiment": "tiny", "changes": form}
    other = retry(before, None, ["finetune.epochs=2.0", "pretrain.batch_size=4"])
    settings = {"finetune.epochs": 2.0, "sample.bytes": 20_000, "pretrain.batch_size": 4}
    assert parameters_of(prefect_client, other)["changes"] == {"seed": 3, "settings": settings}


def test_a_name_means_its_newest_run(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    for experiment in ("small", "tiny"):
        finished(prefect_client, deployment, "twice", experiment=experiment)
    assert parameters_of(prefect_client, retry("twice", None, [])) == {"experiment": "tiny"}


def test_a_retry_that_cannot_be_says_what_to_do(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    flow_id = prefect_client.create_flow_from_name("free")
    free = prefect_client.create_deployment(flow_id, "free")
    finished(prefect_client, free, "by-run", experiment={"name": "tiny"})
    finished(prefect_client, free, "a-stage", experiment="tiny", stage="sample")
    finished(prefect_client, deployment, "by-form", experiment="tiny")
    count = len(prefect_client.read_flow_runs())
    for run, again_from, changes, message in (
        ("nowhere", None, [], "no run 'nowhere': give the id or the name"),
        ("by-run", None, [], "run 'by-run' was started by `vectorclm run`, not by the platform: start it again with"),
        ("a-stage", None, [], "run 'a-stage' is not a curriculum: start its deployment again from the UI"),
        ("by-form", None, ["pretrain.batchsize=3"], "pretrain.batchsize: unknown key; did you mean 'batch_size'"),
        ("by-form", "export", [], "Prefect refuses the run: .*again_from"),
    ):
        with pytest.raises(ConfigError, match=message):
            retry(run, again_from, changes)
    with (
        temporary_settings({PREFECT_API_AUTH_STRING: "admin:wrong"}),
        pytest.raises(ConfigError, match="Prefect requires a password: give the --store or --env-file of `up`"),
    ):
        retry("by-form", None, [])
    assert len(prefect_client.read_flow_runs()) == count  # refused, and no run was made
    prefect_client.delete_deployment(deployment)
    with pytest.raises(ConfigError, match=f"Prefect has no deployment {CURRICULUM}: run `vectorclm up`, or, "):
        retry("by-form", None, [])


def test_a_retry_without_a_platform_says_how_to_start_it(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = str(closed.getsockname()[1])
        command = [sys.executable, "-m", "flows.cli", "retry", "any", "--store", str(tmp_path), "--prefect-port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no platform answers at http://127.0.0.1:{port}/api/: run `vectorclm up`, or")
    assert "docker compose " in done.stderr and done.stderr.count("\n") == 1
