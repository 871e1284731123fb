"""A platform is copied to another place and goes on there, by the commands of the page, each as it is written."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import Failed, Scheduled

from flows.form import completed
from flows.net import free_port
from flows.platform import password
from flows.platform.config import PlatformConfig
from flows.platform.ownership import remember
from flows.platform.provision import provision
from tests.conftest import KILLS, skip_or_fail
from tests.platform.test_config import ROOT
from tests.services.curricula import record_mini
from tests.services.platform import Platform, clean, until
from tests.services.postgres import INSTALLED, Postgres
from tests.test_curriculum import SHRUNK
from vectorclm.config import assignments

PASSWORD = "of-this-test-0123"
LOADS = (
    'cd /; python -c \'import mlflow; model = mlflow.pyfunc.load_model("models:/vectorclm-chat@candidate"); '
    'assert len(model.predict(["Where does the otter live?"])) == 1\''
)
WORDS = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(title: str) -> list[list[str]]:
    """The commands of a section of the page, one list for each block."""
    section = (ROOT / "infra" / "README.md").read_text(encoding="utf-8").partition(f"## {title}\n")[2]
    return [block.splitlines() for block in WORDS.findall(section.partition("\n## ")[0])]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the user postgres reaches."""
    made = Path(tempfile.mkdtemp(prefix="vectorclm-backup-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


def settings(store: Path, database: str | None) -> PlatformConfig:
    ports: dict[str, Any] = {"prefect_port": free_port(), "mlflow_port": free_port()}
    return PlatformConfig(vectorclm_store=str(store), vectorclm_database=database, **ports)


def shell(line: str, config: PlatformConfig, **variables: str) -> str:
    """The output of a command of the page, run as written by somebody whose platform has these settings."""
    known = clean() | variables | {"PREFECT_PORT": str(config.prefect_port), "MLFLOW_PORT": str(config.mlflow_port)}
    if config.vectorclm_database is not None:
        known["VECTORCLM_DATABASE"] = config.vectorclm_database.get_secret_value()
    programs = [Path(sys.executable).parent, *sorted(INSTALLED.glob("*/bin"))[-1:]]
    known["PATH"] = os.pathsep.join([*map(str, programs), os.environ["PATH"]])
    done = subprocess.run(["bash", "-c", line], env=known, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def use(config: PlatformConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A platform with a small curriculum, a failed run of it, and a schedule, which is stopped by no command yet."""
    remember(config)
    password.ensure(config.home, f"{config.prefect_url}/api")
    server, tracking = config.servers()
    server.start()
    if config.vectorclm_database is not None:  # the other cell records without a server
        tracking.start()
        tracking.wait()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", config.mlflow_url)
    record_mini(config.home)
    server.wait()
    made = Platform(config, [])
    with SyncPrefectClient(f"{config.prefect_url}/api", auth_string=config.prefect_password) as client:
        made.client = client
        with made.addressed():
            provision(client, lambda line: None, config)
        deployment = client.read_deployment_by_name("curriculum/tiny")
        own = assignments([f"{name}={value}" for name, value in SHRUNK.items() if name != "name"])
        parameters = completed(deployment.parameters, {"settings": own, "runtime": {"threads": 1}})
        client.create_flow_run_from_deployment(deployment.id, parameters=parameters, name="unlucky", state=Failed())
        often = IntervalSchedule(interval=timedelta(seconds=20), anchor_date=datetime.now(UTC))
        again = DeploymentScheduleCreate(schedule=often, active=True, slug="often", parameters={"dry_run": True})
        client.create_deployment_schedules(deployment.id, [(again.schedule, True)])
        (schedule,) = client.read_deployment_schedules(deployment.id)
        client.update_deployment_schedule(deployment.id, schedule.id, parameters={"dry_run": True})
    return config.home


def check(platform: Platform) -> None:
    """What worked at the old place works at the new one."""
    client, config, began = platform.client, platform.config, datetime.now(UTC)
    named = {"name": {"any_": ["unlucky"]}}
    (failed,) = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(named))
    client.set_flow_run_state(failed.id, Scheduled(name="AwaitingRetry"))  # as the button Retry does

    place = {"MLFLOW_TRACKING_URI": config.mlflow_url}
    shell(LOADS, config, **place)  # from a folder without a store: MLflow's record says where the model is
    shell(f"vectorclm lineage vectorclm-chat@candidate --verify --store {config.vectorclm_store}", config, **place)
    listed = shell(f"vectorclm store rm mini --store {config.vectorclm_store}", config, **place)
    assert "3 models, versions " in listed  # its records are those of the store at the new place
    _check_pages(config)

    def due() -> list[UUID]:
        wanted = {"deployment_id": {"any_": [failed.deployment_id]}, "expected_start_time": {"after_": began}}
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted))
        return [run.id for run in runs if run.auto_scheduled and run.state_name == "DryRun"]

    assert platform.ended(failed.id) == "Completed", platform.run(failed.id).state
    states = platform.tasks(failed.id)
    assert {name for name, names in states.items() if names[-1] == "Reused"} >= {"sample", "pretrain", "finetune"}
    until(due, "the schedule starts a run")


def _check_pages(config: PlatformConfig) -> None:
    """MLflow serves the files of a run and of a model, as its pages of artifacts ask for them."""
    client = MlflowClient(config.mlflow_url, config.mlflow_url)
    version = client.get_model_version_by_alias("vectorclm-chat", "candidate")
    model_id = version.source.removeprefix("models:/")
    url = f"{config.mlflow_url}/ajax-api/2.0/mlflow/logged-models/{model_id}/artifacts/files"
    found = httpx.get(url, params={"artifact_file_path": "MLmodel"})
    assert found.status_code == 200 and f"uri: {config.vectorclm_store}/finetune/" in found.text
    run = client.get_run(version.run_id)
    files = [file.path for file in client.list_artifacts(run.info.run_id) if not file.is_dir]
    assert files, "the run of the model has no file"
    page = httpx.get(f"{config.mlflow_url}/get-artifact", params={"run_uuid": run.info.run_id, "path": files[0]})
    assert page.status_code == 200 and page.content


def restored(stop: list[list[str]], old: PlatformConfig, new: PlatformConfig, folder: Path, **variables: str) -> None:
    """Run the blocks of the page; before the restore, the old place is taken away."""
    variables |= {"STORE": str(old.home), "BACKUP": str(folder / "backup"), "NEW": str(new.home)}
    (folder / "backup").mkdir()
    for block, config in zip(stop, (old, old, new, new, new), strict=True):
        if any("DATABASE" in line for line in block) and old.vectorclm_database is None:
            continue
        if config is new and old.home.exists():
            old.home.rename(folder / "gone")
        for line in block:
            printed = shell(line, config, **variables)
    assert f"records follow from {old.home} to {new.home}" in printed


def go_on(old: PlatformConfig, new: PlatformConfig, folder: Path, patch: pytest.MonkeyPatch, **variables: str) -> None:
    with ExitStack() as stack:
        for config in (new, old):
            options = ["--store", config.vectorclm_store]
            for port in ("prefect_port", "mlflow_port"):
                options += [f"--{port.replace('_', '-')}", str(getattr(config, port))]
            stack.callback(Platform(config, options).command, "down")
        use(old, patch)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        restored(commands("Backup and restore"), old, new, folder, **variables)
        platform = Platform(new, [])
        with SyncPrefectClient(f"{new.prefect_url}/api", auth_string=new.prefect_password) as platform.client:
            check(platform)


@pytest.mark.skipif(KILLS < 10, reason="minutes: VECTORCLM_KILLS=10")
def test_a_platform_goes_on_at_another_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on(settings(folder / "old", None), settings(folder / "new", None), folder, monkeypatch)


@pytest.mark.skipif(KILLS < 10, reason="minutes: VECTORCLM_KILLS=10")
def test_a_platform_on_postgres_goes_on_at_another_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not list(INSTALLED.glob("*/bin")):
        skip_or_fail("no Postgres here: apt-get install --no-install-recommends postgresql")
    with ExitStack() as stack:
        urls = []
        for name in ("one", "two"):
            port = free_port()
            server = Postgres(folder / name, folder / f"logs-{name}", port, PASSWORD)
            stack.callback(server.stop)
            server.start() if name == "one" else server.service.start()
            server.service.wait()
            urls.append(f"postgresql://vectorclm:{PASSWORD}@127.0.0.1:{port}")
        old, new = (settings(folder / f"store-{number}", url) for number, url in enumerate(urls))
        go_on(old, new, folder, monkeypatch, DATABASE=urls[0], NEW_DATABASE=urls[1])
