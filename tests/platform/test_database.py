"""The platform on a Postgres and an S3 store of the user's own, named by a settings file: the same form, the same runs.

Passwords show nowhere, and what is killed with -9 comes back with its data.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import httpx
import mlflow
import psutil
import pytest
from mlflow import MlflowClient
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import AwaitingRetry, Cancelling

from flows.net import free_port
from flows.platform.process import HOST, Service
from flows.platform.schedules import overview, remove
from flows.tracking.recorded_lineage import registered_names
from flows.tracking.registry import Registry
from tests.conftest import KILLS, in_turn, skip_or_fail
from tests.kill_matrix import CHANGES, Cell, Killer, Reference
from tests.platform.test_platform import REFUSED
from tests.platform.test_provision import listening
from tests.services.ceph import PACKAGES, object_store
from tests.services.platform import Platform, platform_at, until
from tests.services.postgres import INSTALLED, Postgres
from tests.services.queue import Wanted, check_made, check_nothing_left, check_order, enqueue, second_worker
from tests.services.trigger import SECTIONS, check_form
from vectorclm.lineage.chain import lineage
from vectorclm.store.artifact import Store
from vectorclm.store.layout import STAGES

SECRETS = {
    "PREFECT_AUTH": "admin:of-prefect-7c1d",
    "MLFLOW_ADMIN_PASSWORD": "of-mlflow-7c1d",
    "MLFLOW_SECRET_KEY": "of-cookies-7c1d",
    "S3_ACCESS_KEY": "of-s3-access-7c1d",
    "S3_SECRET_KEY": "of-s3-secret-7c1d",
}
OF_POSTGRES = "of-postgres: 7c%1d@/"
QUEUED = 20 if KILLS >= 10 else 2  # curricula that are queued at once
KILLED: Mapping[int, Callable[[Platform], Service]] = {  # in the curriculum of this number
    5: lambda platform: platform.config.servers()[0],
    9: lambda platform: platform.config.workers()[0],
}


class Servers:
    """The user's own Postgres and S3 store, in a folder; each can be started again, S3 also with another secret key."""

    def __init__(self, folder: Path) -> None:
        self.logs, self._folder, self._port = folder / "logs", folder, free_port()
        database = free_port()
        self.postgres = Postgres(folder / "postgres", self.logs, database, OF_POSTGRES)
        self.use_keys(SECRETS["S3_ACCESS_KEY"], SECRETS["S3_SECRET_KEY"])
        self.settings = {
            "VECTORCLM_DATABASE": f"postgresql://vectorclm:{quote(OF_POSTGRES, safe='')}@{HOST}:{database}",
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self._port}",
        }

    def use_keys(self, access_key: str, secret_key: str) -> None:
        self.s3 = object_store(self._folder / "s3", self.logs, self._port, access_key, secret_key)

    def start(self) -> None:
        self.postgres.start()
        for service in self.s3:
            service.start()
            service.wait()

    def stop(self) -> None:
        self.postgres.stop()
        for service in reversed(self.s3):
            service.stop()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    missing += [] if list(INSTALLED.glob("*/bin")) else ["postgresql"]
    if missing:
        skip_or_fail(f"no Postgres or no S3 store here: apt-get install --no-install-recommends {' '.join(missing)}")
    folder = Path(tempfile.mkdtemp(prefix="vectorclm-servers-"))
    folder.chmod(0o711)  # where root runs the tests, Postgres is another user
    made = Servers(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def platform(servers: Servers, monkeypatch_module: pytest.MonkeyPatch) -> Iterator[Platform]:
    home = Path(tempfile.mkdtemp(prefix="vectorclm-"))
    settings = {
        "VECTORCLM_STORE": "s3://vectorclm/store",
        "VECTORCLM_HOME": str(home),
        **{f"{name}_PORT": str(free_port()) for name in ("PREFECT", "MLFLOW")},
        **SECRETS,
        **servers.settings,
    }
    file = home / "platform.env"
    file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()), encoding="utf-8")
    file.chmod(0o600)
    monkeypatch_module.setenv("XDG_CACHE_HOME", str(home / "cache"))
    with platform_at(file) as made:
        for name, value in made.config.client_environment().items():
            monkeypatch_module.setenv(name, value)
        yield made
    shutil.rmtree(home)


def kill(*services: Service) -> None:
    for service in services:
        process = service.process()
        assert process is not None
        process.kill()
        process.wait(60)


@in_turn(1, 2)
def test_the_form_keeps_its_order_and_its_bounds(platform: Platform) -> None:
    """Postgres sorts the keys of nested objects by their length; the positions put them back."""
    check_form(platform, "tiny")
    schema = platform.client.read_deployment_by_name("curriculum/tiny").parameter_openapi_schema
    assert list(schema["properties"]["changes"]["properties"]) != SECTIONS  # else the positions would prove nothing
    for parameters, message in REFUSED:
        with pytest.raises(PrefectHTTPStatusError) as refused:
            platform.start(**parameters)
        assert message in refused.value.response.text


class Queued(NamedTuple):
    """Curricula that were queued at once, and one that was cancelled in the queue."""

    done: list[Wanted]
    cancelled: Wanted


@pytest.fixture(scope="module")
def queued(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Queued:
    """Curricula that two workers did one after the other, in pools and inline.

    One was cancelled in the queue, and a worker was killed in between; of many, also the server and the other worker.
    """
    with second_worker(platform) as worker:
        *wanted, cancelled = enqueue(platform, tmp_path_factory.mktemp("queue"), [*range(QUEUED), 0])
        until(lambda: platform.run(cancelled.run_id).state_name == "Queued", "the last one waits", 60)
        platform.client.set_flow_run_state(cancelled.run_id, Cancelling())
        for number, one in enumerate(wanted):
            until(lambda one=one: platform.run(one.run_id).run_count, f"curriculum {number} begins")
            if number == 1:
                kill(worker)
            elif number in KILLED:
                platform.breaks()
                kill(KILLED[number](platform))
                assert platform.command("doctor").returncode == 0
            assert platform.ended(one.run_id) == "Completed"
    run = platform.run(cancelled.run_id)
    assert (run.state_name, run.run_count) == ("Cancelled", 0)
    return Queued(wanted, cancelled)


@in_turn(0, 2)
def test_curricula_that_are_queued_at_once_are_done_in_order_and_once(platform: Platform, queued: Queued) -> None:
    check_order(platform, queued.done)
    check_made(platform, queued.done)
    check_nothing_left(platform, [one.run_id for one in (*queued.done, queued.cancelled)])


def test_a_curriculum_runs_from_the_form_to_models_in_the_bucket(platform: Platform, queued: Queued) -> None:
    store = Store(platform.config.vectorclm_store)
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    for name in ("vectorclm-base", "vectorclm-chat"):
        version = client.get_model_version_by_alias(name, "candidate")
        assert str(client.get_run(version.run_id or "").info.status) == "FINISHED"
        chain = lineage(version.tags["uri"], store)
        assert registered_names(Registry(store), f"models:/{name}@candidate") == chain.root.names
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"} and len(runs) == len(queued.done) * (1 + len(STAGES))
    assert any(client.list_artifacts(run.info.run_id) for run in runs)
    assert store.list("mlflow")  # where MLflow keeps its artifacts
    files = [path.name for path in platform.config.home.rglob("*.db") if path.is_file()]
    assert files == []  # nothing fell back to SQLite
    (answer,) = mlflow.pyfunc.load_model("models:/vectorclm-chat@candidate").predict(["Where is the otter?"])
    assert isinstance(answer, str)


def test_a_run_that_was_cancelled_in_the_queue_reuses_all_when_it_is_retried(
    platform: Platform, queued: Queued
) -> None:
    platform.client.set_flow_run_state(queued.cancelled.run_id, AwaitingRetry())
    assert platform.ended(queued.cancelled.run_id) == "Completed"
    assert platform.tasks(queued.cancelled.run_id) == {stage: ["Reused"] for stage in STAGES}


def test_a_schedule_fires(platform: Platform) -> None:
    deployment = platform.client.read_deployment_by_name("curriculum/tiny")
    soon = IntervalSchedule(interval=timedelta(days=1), anchor_date=datetime.now(UTC) + timedelta(seconds=12))
    platform.client.create_deployment_schedules(
        deployment.id, [(soon, True)], parameters={"dry_run": True}, slug="soon"
    )

    def last() -> str:
        (row,) = [row for row in overview(platform.client) if row["name"] == "soon"]
        return str(row["last"] or "")

    until(lambda: last().startswith("DryRun, "), "the run of the schedule is done", 120)
    assert remove(platform.client, "soon").name == "soon"


def test_a_stage_finds_what_the_curriculum_made(platform: Platform) -> None:
    deployment = platform.client.read_deployment_by_name("stage/sample")
    parameters = {"stage": "sample", "changes": CHANGES}
    run = platform.client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
    assert platform.ended(run.id) == "Completed"
    assert platform.tasks(run.id)["sample"] == ["Reused"]


def test_no_other_machine_is_listened_to(platform: Platform) -> None:
    found = listening(platform)
    assert {"prefect-server", "mlflow"} <= set(found)
    assert set.union(*found.values()) == {"127.0.0.1"}


def test_a_retry_takes_the_settings_file_as_up_did(platform: Platform) -> None:
    found = platform.command("retry", "nowhere")
    assert found.returncode == 2 and "no run 'nowhere': give the id or the name" in found.stderr
    command = [sys.executable, "-m", "flows.cli", "retry", "nowhere"]
    command += ["--prefect-port", str(platform.config.prefect_port)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    refused = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert (
        refused.returncode == 2
        and "Prefect requires a password: give the --store or --env-file of `up`, or set PREFECT_AUTH" in refused.stderr
    )


def test_up_starts_no_server_that_is_the_users_own(platform: Platform) -> None:
    records = {path.stem for path in (platform.config.home / "platform").glob("*.json")}
    assert records == {"about", "prefect-server", "mlflow", "worker-cpu", "worker-gpu"}


def test_servers_that_were_killed_are_missed_and_are_found_again_with_their_data(
    platform: Platform, servers: Servers
) -> None:
    runs = {run.id for run in platform.client.read_flow_runs()}
    platform.breaks()
    kill(servers.postgres.service, *servers.s3)
    done = platform.command("doctor")
    assert done.returncode == 1
    s3, postgres = [line for line in done.stdout.splitlines() if line.startswith("!!")]
    assert s3.startswith(f"!! store {platform.config.vectorclm_store}: nothing answers there")
    assert f"no Postgres answers at {HOST}:{servers.postgres.service.port}, which VECTORCLM_DATABASE names" in postgres
    servers.start()
    done = platform.command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {run.id for run in platform.client.read_flow_runs()} == runs
    assert MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_model_version_by_alias("vectorclm-chat", "candidate")
    store = Store(platform.config.vectorclm_store)
    artifact = store.find("export", store.list("export")[0])
    assert artifact is not None
    artifact.verify()


@pytest.mark.skipif(KILLS < 10, reason="minutes: VECTORCLM_KILLS=10; test_platform has the cell of every run")
@pytest.mark.parametrize("cell", [Cell("database", "pretrain"), Cell("worker", "finetune")], ids=str)
def test_a_run_outlives_what_is_killed_beside_it(
    platform: Platform, servers: Servers, reference: Reference, cell: Cell
) -> None:
    platform.breaks()
    killer = Killer(platform.config, lambda: platform.command("doctor"), platform.client, servers.postgres)
    killer.run(cell, reference)


def test_the_secrets_show_nowhere(platform: Platform, servers: Servers) -> None:
    secrets = [value.removeprefix("admin:") for value in SECRETS.values()]
    secrets += [OF_POSTGRES, quote(OF_POSTGRES, safe="")]
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert any(str(platform.config.prefect_port) in line for line in lines)
    told = [run.model_dump_json() for run in platform.client.read_flow_runs()]
    folders = (platform.config.home / "platform", servers.logs)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert {"postgres.log", "s3-gateway.log", "mlflow-auth.ini", "worker-cpu.json"} <= {path.name for path in files}
    for secret in secrets:
        assert not any(secret in text for text in [*lines, *told])
        assert [path.name for path in files if secret in path.read_text(errors="replace")] == []
    for name in (".prefect", "platform"):
        assert (platform.config.home / name).stat().st_mode & 0o077 == 0


@in_turn(1, 2)
def test_new_keys_are_taken_by_a_new_up(platform: Platform, servers: Servers) -> None:
    file = Path(platform.options[-1])
    before = file.read_text(encoding="utf-8")
    assert platform.command("down").returncode == 0
    servers.s3[-1].stop()
    another = {"S3_SECRET_KEY": "of-s3-another-7c1d", "PREFECT_AUTH": "admin:of-prefect-another-7c1d"}
    settings = before
    for name, value in another.items():
        settings = settings.replace(f"{name}={SECRETS[name]}", f"{name}={value}")
    file.write_text(settings, encoding="utf-8")
    servers.use_keys(SECRETS["S3_ACCESS_KEY"], another["S3_SECRET_KEY"])
    servers.start()
    done = platform.command("up")
    assert done.returncode == 0, done.stdout + done.stderr
    for password, status in ((SECRETS["PREFECT_AUTH"], 401), (another["PREFECT_AUTH"], 200)):
        user = httpx.BasicAuth(*password.split(":"))
        assert httpx.get(f"{platform.config.prefect_url}/api/version", auth=user).status_code == status
