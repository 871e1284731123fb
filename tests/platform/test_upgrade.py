"""A platform of an earlier version is upgraded by the commands of the page, and goes on with what it had.

The earlier version is taken from the history of the repository and runs with the libraries of the present one.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import AwaitingRetry, Failed

from flows.form import completed
from flows.net import free_port
from flows.platform.config import PlatformConfig
from flows.platform.schedules import overview
from tests.conftest import KILLS, skip_or_fail
from tests.kill_matrix import CHANGES, RUNTIME, SETTINGS
from tests.platform.test_backup import LOADS, commands, shell
from tests.platform.test_config import ROOT
from tests.services.platform import Platform, until
from vectorclm.store.layout import STAGES

EARLIER = "c879487"  # a commit of the history: the version that made the platform
ALIAS = "vectorclm-chat@candidate"
LONG = {**CHANGES, "settings": {**SETTINGS, "pretrain.phases": [{"tokens": 983_040}]}}

pytestmark = pytest.mark.skipif(KILLS < 10, reason="minutes: VECTORCLM_KILLS=10")


class Left(NamedTuple):
    """Runs that the earlier version left."""

    done: UUID
    failed: UUID
    interrupted: UUID
    waiting: UUID


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="vectorclm-upgrade-"))
    yield made
    shutil.rmtree(made)


def earlier(folder: Path) -> Path:
    """The code of the earlier version, unpacked in a folder."""
    archive = folder / "earlier.tar"
    command = ["git", "archive", f"--output={archive}", EARLIER, "flows", "vectorclm"]
    if shutil.which("git") is None or subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode:
        skip_or_fail(f"the history has no commit {EARLIER}: git fetch --unshallow")
    shutil.unpack_archive(archive, code := folder / "code", filter="data")
    return code


def leave(platform: Platform) -> Left:
    """Let the earlier version make a curriculum, aliases and schedules, and leave runs without an end."""
    client = platform.client
    done = platform.start(name="finished before", changes=CHANGES, runtime=RUNTIME)
    assert platform.ended(done) == "Completed"
    registry = MlflowClient(platform.config.mlflow_url)
    registry.set_registered_model_alias("vectorclm-chat", "champion", "1")
    deployment = client.read_deployment_by_name("curriculum/tiny")
    values = completed(deployment.parameters, {"changes": CHANGES, "runtime": RUNTIME})
    failed = client.create_flow_run_from_deployment(deployment.id, parameters=values, name="failed before")
    client.set_flow_run_state(failed.id, Failed(), force=True)
    command = platform.command("schedule", "evaluate", ALIAS, "--suite", "tiny", "--cron", "@daily")
    assert command.returncode == 0, command.stdout + command.stderr
    soon = IntervalSchedule(interval=timedelta(seconds=30), anchor_date=datetime.now(UTC))
    client.create_deployment_schedules(deployment.id, [(soon, True)], parameters={"dry_run": True}, slug="soon")
    interrupted = platform.start(name="interrupted before", changes=LONG, runtime=RUNTIME)
    until(lambda: list(Path(platform.config.vectorclm_store).glob("checkpoints/*/*")), "the training has a checkpoint")
    waiting = platform.start(name="waiting before", changes={**CHANGES, "seed": 6}, runtime=RUNTIME)
    until(lambda: platform.run(waiting).state_name == "Queued", "the second waits", 60)
    return Left(done, failed.id, interrupted, waiting)


def check(platform: Platform, left: Left) -> None:
    """The runs, schedules, models, aliases and the lineage are there; what waited goes on, and a Retry reuses."""
    client, config = platform.client, platform.config
    place = {"VECTORCLM_STORE": config.vectorclm_store, "MLFLOW_TRACKING_URI": config.mlflow_url}
    assert platform.run(left.done).state_name == "Completed"
    rows = {str(row["name"]): row for row in overview(client)}
    assert {"soon", f"{ALIAS} on tiny"} <= set(rows)
    until(lambda: platform.resumptions(left.interrupted), "it goes on")
    assert platform.ended(left.interrupted) == "Completed"
    assert platform.ended(left.waiting) == "Completed"

    registry = MlflowClient(config.mlflow_url)
    assert str(registry.get_model_version_by_alias("vectorclm-chat", "champion").version) == "1"
    shell(LOADS, config, **place)
    for alias in ("champion", "candidate"):
        shell(f"vectorclm lineage vectorclm-chat@{alias} --verify", config, **place)

    client.set_flow_run_state(left.failed, AwaitingRetry())
    assert platform.ended(left.failed) == "Completed"
    states = platform.tasks(left.failed)
    assert set(states) == set(STAGES)
    assert {name for name, names in states.items() if names[-1] == "Reused"} >= {"sample", "pretrain", "finetune"}

    deployment = client.read_deployment_by_name("evaluate/evaluate")
    values = {"model": "models:/vectorclm-chat@champion", "suite": "tiny"}
    run = client.create_flow_run_from_deployment(deployment.id, parameters=values)
    assert platform.ended(run.id) == "Completed", platform.run(run.id).state

    def fired() -> bool:
        (row,) = [row for row in overview(client) if row["name"] == "soon"]
        return str(row["last"] or "").startswith("DryRun, ")

    until(fired, "the schedule starts a run")


def test_a_platform_of_an_earlier_version_goes_on(folder: Path) -> None:
    code = {"PYTHONPATH": str(earlier(folder))}
    config = PlatformConfig(vectorclm_store=str(folder / "store"), prefect_port=free_port(), mlflow_port=free_port())
    place = {"VECTORCLM_STORE": config.vectorclm_store}
    ports = ["--prefect-port", str(config.prefect_port), "--mlflow-port", str(config.mlflow_port)]
    old, new = (Platform(config, ["--store", config.vectorclm_store, *ports], known) for known in (code, {}))
    ((down, install, up),) = commands("Upgrade")
    try:
        assert (done := old.command("up")).returncode == 0, done.stdout + done.stderr
        with SyncPrefectClient(f"{config.prefect_url}/api", auth_string=config.prefect_password) as old.client:
            left = leave(old)
        shell(down, config, **place, **code)
        assert install.startswith("make install")  # the environment of this test has the present version
        shell(up, config, **place)
        with SyncPrefectClient(f"{config.prefect_url}/api", auth_string=config.prefect_password) as new.client:
            check(new, left)
        doctor = new.command("doctor")
        assert doctor.returncode == 0, doctor.stdout
    finally:
        new.command("down")
