"""`vectorclm retry`: which run is started again with which settings, and what is said where that cannot be."""

import getpass
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings
from prefect.states import Completed

from flows.platform.retry import retry, start
from vectorclm.errors import ConfigError

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        name: {"type": "string" if name == "experiment" else "object"} for name in ("experiment", "changes", "settings")
    },
    "additionalProperties": False,
}


@pytest.fixture
def deployment(prefect_client: SyncPrefectClient) -> UUID:
    flow_id = prefect_client.create_flow_from_name("curriculum")
    return prefect_client.create_deployment(
        flow_id,
        "tiny",
        parameters={"experiment": "tiny", "changes": {"seed": 7, "sample": {"bytes": 30_000}}},
        parameter_openapi_schema=SCHEMA,
        enforce_parameter_schema=True,
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
    """Settings inside the changes, where older forms had them, become a parameter of their own."""
    settings = {"finetune.epochs": 1.0, "sample.bytes": 20_000}
    form = {"seed": 3, "settings": settings}
    before = finished(prefect_client, deployment, "first-of-retry", experiment="tiny", changes=form)
    told, again = retry(before, None, [])
    assert told.startswith(f"first-of-retry ({before}, Completed, 20")
    changes = {"seed": 3, "sample": {"bytes": 30_000}}
    wanted = {"experiment": "tiny", "changes": changes, "settings": settings}
    assert again != before and parameters_of(prefect_client, again) == wanted
    other = retry(before, None, ["finetune.epochs=2.0", "pretrain.batch_size=4"]).run_id
    assert parameters_of(prefect_client, other) == {
        **wanted, "settings": {"finetune.epochs": 2.0, "sample.bytes": 20_000, "pretrain.batch_size": 4}
    }  # fmt: skip
    fewer = retry(before, None, ["sample.bytes="]).run_id
    assert parameters_of(prefect_client, fewer) == {**wanted, "settings": {"finetune.epochs": 1.0}}
    assert {"from: command line", f"user: {getpass.getuser()}"} <= set(prefect_client.read_flow_run(UUID(other)).tags)


def test_a_name_means_its_newest_run(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    for seed in (1, 2):
        finished(prefect_client, deployment, "twice", experiment="tiny", changes={"seed": seed})
    again = parameters_of(prefect_client, retry("twice", None, []).run_id)
    assert again == {"experiment": "tiny", "changes": {"seed": 2, "sample": {"bytes": 30_000}}}


def test_a_dry_run_is_repeated_as_a_run(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    schema = {**SCHEMA, "properties": {**SCHEMA["properties"], "dry_run": {"type": "boolean"}}}
    prefect_client.update_deployment(deployment, DeploymentUpdate(parameter_openapi_schema=schema))
    before = finished(prefect_client, deployment, "dry", experiment="tiny", dry_run=True)
    assert "dry_run" not in parameters_of(prefect_client, retry(before, None, []).run_id)
    shown = parameters_of(prefect_client, start("tiny", {"dry_run": True, "changes": {"seed": 9}}))
    assert shown["dry_run"] is True and shown["changes"]["seed"] == 9


def test_a_retry_that_cannot_be_says_what_to_do(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    flow_id = prefect_client.create_flow_from_name("free")
    free = prefect_client.create_deployment(flow_id, "free")
    finished(prefect_client, free, "by-run", experiment={"name": "tiny"})
    finished(prefect_client, free, "a-stage", experiment="tiny", stage="sample")
    finished(prefect_client, deployment, "by-form", experiment="tiny")
    finished(prefect_client, deployment, "wrong-key", experiment="tiny", settings={"pretrain.optimiser.momentum": 0.9})
    count = len(prefect_client.read_flow_runs())
    for run, again_from, changes, message in (
        ("nowhere", None, [], "no run 'nowhere': give the id or the name"),
        ("by-run", None, [], "run 'by-run' was started by `vectorclm run`, not by the platform: start it again with"),
        ("a-stage", None, [], "run 'a-stage' is not a curriculum: start its deployment again from the UI"),
        ("by-form", None, ["pretrain.batchsize=3"], "pretrain.batchsize: unknown key; did you mean 'batch_size'"),
        ("by-form", None, ["seed="], "seed=: the run has no such setting that could be left out; it has none"),
        ("wrong-key", None, [], r"(?s)pretrain\.optimiser.*did you mean 'optimizer'.*; `--set KEY=` leaves out"),
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
    with pytest.raises(ConfigError, match="Prefect has no deployment curriculum/tiny: run `vectorclm up`, or, "):
        retry("by-form", None, [])


def test_a_retry_without_a_platform_says_how_to_start_it(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = str(closed.getsockname()[1])
        command = [sys.executable, "-m", "flows.cli", "retry", "any", "--store", str(tmp_path), "--prefect-port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no platform answers at http://127.0.0.1:{port}/api/: ")
    assert done.stderr.count("\n") == 1
    start = "run `vectorclm up`, or" in done.stderr and "docker compose " in done.stderr
    assert start or "a platform runs in " in done.stderr  # that of another test
