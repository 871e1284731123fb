"""Settings of the platform: the file, secrets, refusals; and the job templates of infra/pools/, without a server."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from flows.net import HEARTBEAT_SECONDS
from flows.platform.config import PlatformConfig, read_platform
from vectorclm.errors import ConfigError
from vectorclm.settings import validate

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "docker" / "platform.env.example"
POOLS = ("process", "docker", "kubernetes")
SECRETS = {
    "POSTGRES_PASSWORD",
    "PREFECT_AUTH",
    "MLFLOW_ADMIN_PASSWORD",
    "MLFLOW_SECRET_KEY",
    "S3_ACCESS_KEY",
    "S3_SECRET_KEY",
}


def pool_template(kind: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "infra" / "pools" / f"{kind}.json").read_text(encoding="utf-8")))


def example() -> dict[str, str]:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def program_passes(*command: str) -> None:
    done = subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.items():
            yield from _texts(list(item))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def placeholders(part: object) -> set[str]:
    return {name for text in _texts(part) for name in re.findall(r"{{\s*(.+?)\s*}}", text)}


MAIL = {"vectorclm_smtp_user": "me", "vectorclm_smtp_password": "hunter2"}
OWN = {"VECTORCLM_DATABASE": "postgresql://me:mine@db:5432", "AWS_ENDPOINT_URL": "http://s3:9000"}


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*example(), *OWN]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_settings")
def test_the_file_of_compose_starts_the_platform_too_once_servers_are_named(tmp_path: Path) -> None:
    filled = {**example(), **{name: f"{name.lower()}:0123456789" for name in SECRETS}}
    file = tmp_path / "platform.env"
    for number, (name, successor) in enumerate(
        (("POSTGRES_PASSWORD", "VECTORCLM_DATABASE"), ("S3_PORT", "AWS_ENDPOINT_URL"), ("", ""))
    ):
        named = dict(list(OWN.items())[:number])
        file.write_text("\n".join(f"{name}={value}" for name, value in (filled | named).items()), encoding="utf-8")
        if name:
            with pytest.raises(ConfigError, match=f"{name} is read by .* name one of your own by {successor}, or"):
                read_platform(file)
    config = read_platform(file)
    assert config.database("mlflow", "psycopg2") == "postgresql+psycopg2://me:mine@db:5432/mlflow"
    assert config.client_environment()["AWS_ENDPOINT_URL"] == OWN["AWS_ENDPOINT_URL"]
    assert config.vectorclm_store == "s3://vectorclm/store"
    assert config.prefect_auth is not None
    assert config.prefect_auth.get_secret_value() == "prefect_auth:0123456789"


@pytest.mark.usefixtures("no_settings")
def test_what_started_postgres_and_s3_names_its_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("POSTGRES_PASSWORD", "hunter2")
        with pytest.raises(
            ConfigError, match=r"POSTGRES_PASSWORD .* starts no Postgres: .* by VECTORCLM_DATABASE"
        ) as told:
            read_platform(None)
        assert "hunter2" not in str(told.value)
    file = tmp_path / "platform.env"
    file.write_text("VECTORCLM_STORE=s3://b/p\nS3_ACCESS_KEY=one\nS3_SECRET_KEY=hunter2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"S3_ACCESS_KEY .* starts none: set AWS_ENDPOINT_URL to its URL") as told:
        read_platform(file)
    assert "hunter2" not in str(told.value)


@pytest.mark.usefixtures("no_settings")
def test_a_file_of_settings_is_read_as_compose_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "platform.env"
    lines = ["# a comment", "", " PREFECT_PORT = 4300 ", "export MLFLOW_PORT='5300'", "PREFECT_AUTH=me:7c%1d@/= #x"]
    file.write_text("\n".join([*lines, "VECTORCLM_ALLOWED_HOSTS=", 'VECTORCLM_HOME="/a b"']), encoding="utf-8")
    config = read_platform(file)
    assert (config.prefect_port, config.mlflow_port, config.vectorclm_home) == (4300, 5300, "/a b")
    assert config.prefect_password == "me:7c%1d@/=" and config.vectorclm_allowed_hosts == ""
    for wrong in ("PREFECT_PORT 4300", "PREFECT_PORT", "='x'"):
        file.write_text(f"# a comment\n\n\n{wrong}\nMLFLOW_PORT=5300\n", encoding="utf-8")
        with pytest.raises(ConfigError, match="line 4: write NAME=value"):
            read_platform(file)


@pytest.mark.usefixtures("no_settings")
def test_a_file_of_settings_that_others_may_change_is_refused_and_one_that_they_may_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "platform.env"
    file.write_text("PREFECT_PORT=4300\n", encoding="utf-8")
    for mode in (0o646, 0o664, 0o622):
        file.chmod(mode)
        with pytest.raises(ConfigError, match=f"other users can write to {file}.*chmod go-w"):
            read_platform(file)
    file.chmod(0o644)
    assert read_platform(file).prefect_port == 4300 and caplog.text == ""  # it has no secret
    file.write_text("PREFECT_AUTH=me:hunter2\n", encoding="utf-8")
    for mode, warned in ((0o600, False), (0o640, True), (0o604, True)):
        file.chmod(mode)
        caplog.clear()
        assert read_platform(file).prefect_password == "me:hunter2"
        assert (f"chmod 600 '{file}'" in caplog.text) == warned and "hunter2" not in caplog.text


def test_a_secret_left_empty_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "platform.env"
    file.write_text("PREFECT_PORT=4200\nPREFECT_AUTH=\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2: PREFECT_AUTH is empty"):
        read_platform(file)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mlflow_admin_password": "hunter2"}, "mlflow_admin_password: Value should have at least 12 items"),
        ({"mlflow_admin_password": "hunter2-hunter2"}, "MLFLOW_SECRET_KEY go together"),
        ({"vectorclm_database": "mysql://u:hunter2@h"}, "VECTORCLM_DATABASE must be postgresql://"),
        ({"prefect_port": 0}, r"prefect_port: .* \(got 0\)"),
        ({"vectorclm_notify": "https://hooks.example.org/hunter2"}, "VECTORCLM_NOTIFY must be webhook:https://"),
        ({"vectorclm_notify": "webhook:ftp://hunter2"}, "VECTORCLM_NOTIFY must be webhook:https://"),
        ({"vectorclm_notify": "mailto:hunter2"}, "VECTORCLM_NOTIFY must be webhook:https://"),
        ({"vectorclm_notify": "mailto:a@b.org"}, "needs a mail server: set VECTORCLM_SMTP_HOST"),
        ({"vectorclm_smtp_password": "hunter2"}, "VECTORCLM_SMTP_USER and VECTORCLM_SMTP_PASSWORD go together"),
        ({"vectorclm_smtp_from": "the platform"}, "VECTORCLM_SMTP_FROM must be an address"),
        (
            {**MAIL, "vectorclm_smtp_host": "smtp.example.org", "vectorclm_smtp_tls": "none"},
            "VECTORCLM_SMTP_TLS=none would send the password in plain text",
        ),
    ],
)
def test_a_bad_setting_is_told_without_any_secret(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        validate(PlatformConfig, given, "platform settings")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "receiver", ["none", "slack-webhook/team", "webhook:http://localhost:8000/a?b=c", "mailto:a@b.org,c@d.org"]
)
def test_who_is_notified_is_a_block_or_an_address(receiver: str) -> None:
    config = PlatformConfig(vectorclm_notify=SecretStr(receiver), vectorclm_smtp_host="smtp.example.org")
    assert config.notify == receiver and receiver not in repr(config)


def test_an_empty_receiver_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for value in ("", "none", "slack-webhook/team"):
        monkeypatch.setenv("VECTORCLM_NOTIFY", value)
        found[value] = read_platform(None).names_receiver
    monkeypatch.delenv("VECTORCLM_NOTIFY")
    assert not read_platform(None).names_receiver
    assert found == {"": False, "none": True, "slack-webhook/team": True}


def test_a_postgres_that_does_not_answer_is_named_without_its_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        at = f"127.0.0.1:{listening.getsockname()[1]}"
        config = PlatformConfig(vectorclm_database=SecretStr(f"postgresql://me:hunter2@{at}"))
        assert config.check_database() == at
    with pytest.raises(ConfigError, match=f"no Postgres answers at {at}, which VECTORCLM_DATABASE names") as told:
        config.check_database()
    assert "hunter2" not in str(told.value)
    assert PlatformConfig().check_database() is None


def test_passwords_reach_services_by_their_environment_and_never_by_arguments(tmp_path: Path) -> None:
    secrets = {name: SecretStr(f"{name}-s3cr3t") for name in ("mlflow_admin_password", "mlflow_secret_key")}
    secrets |= {name: SecretStr(f"{name}-s3cr3t") for name in ("s3_access_key", "s3_secret_key")}
    config = PlatformConfig(
        vectorclm_store="s3://bucket/store",
        vectorclm_home=str(tmp_path),
        vectorclm_database=SecretStr("postgresql://me:7c%25-s3cr3t@db:5432"),
        vectorclm_allowed_hosts="prefect.example.com",
        prefect_auth=SecretStr("me:of-prefect-s3cr3t"),
        aws_endpoint_url="http://s3:9000",
        **secrets,
    )
    services = {service.name: service for service in (*config.servers(), *config.workers())}
    assert list(services) == ["prefect-server", "mlflow", "worker-cpu", "worker-gpu"]
    assert not any("s3cr3t" in word for service in services.values() for word in service.command)
    prefect, mlflow, gpu = (services[name].environment for name in ("prefect-server", "mlflow", "worker-gpu"))
    assert prefect["PREFECT_SERVER_API_AUTH_STRING"] == gpu["PREFECT_API_AUTH_STRING"] == "me:of-prefect-s3cr3t"
    assert prefect["PREFECT_API_DATABASE_CONNECTION_URL"] == "postgresql+asyncpg://me:7c%25-s3cr3t@db:5432/prefect"
    assert prefect["VECTORCLM_ALLOWED_HOSTS"] == mlflow["VECTORCLM_ALLOWED_HOSTS"] == "prefect.example.com"
    assert mlflow["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://bucket/store/mlflow"
    assert mlflow["MLFLOW_AUTH_ADMIN_PASSWORD"] == gpu["MLFLOW_TRACKING_PASSWORD"] == "mlflow_admin_password-s3cr3t"
    assert mlflow["AWS_SECRET_ACCESS_KEY"] == gpu["AWS_SECRET_ACCESS_KEY"] == "s3_secret_key-s3cr3t"
    assert "basic-auth" in services["mlflow"].command and services["worker-gpu"].command[-2:] == ["--limit", "1"]
    services["mlflow"].folder.mkdir()
    assert services["mlflow"].prepare is not None
    services["mlflow"].prepare()
    users = Path(mlflow["MLFLOW_AUTH_CONFIG_PATH"]).read_text()
    assert "database_uri = postgresql+psycopg2://me@db:5432/mlflow" in users and "s3cr3t" not in users
    assert mlflow["PGPASSWORD"] == "7c%-s3cr3t"


def test_a_local_platform_keeps_all_in_its_home_and_asks_for_no_users(tmp_path: Path) -> None:
    config = PlatformConfig(vectorclm_store=str(tmp_path), prefect_port=4300, mlflow_port=5300)
    prefect, mlflow = config.servers()
    assert (prefect.port, mlflow.port) == (4300, 5300) and mlflow.prepare is None
    assert mlflow.environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert mlflow.environment["MLFLOW_ARTIFACTS_DESTINATION"] == f"file://{tmp_path}/mlartifacts"
    assert "basic-auth" not in mlflow.command and "PREFECT_API_DATABASE_CONNECTION_URL" not in prefect.environment
    cpu, gpu = config.workers()
    assert "--limit" not in cpu.command and cpu.umask == -1  # the user's own, for artifacts in a shared folder
    assert cpu.environment["PREFECT_API_URL"] == "http://127.0.0.1:4300/api"
    assert cpu.environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5300"
    assert cpu.environment["VECTORCLM_STORE"] == str(tmp_path) and "AWS_ACCESS_KEY_ID" not in cpu.environment
    assert {service.folder for service in (prefect, mlflow, cpu, gpu)} == {tmp_path / "platform"}


@pytest.mark.parametrize("kind", POOLS)
def test_every_placeholder_of_a_pool_is_declared(kind: str) -> None:
    pool = pool_template(kind)
    declared = set(pool["variables"]["properties"])
    assert placeholders(pool["job_configuration"]) | {"env"} == declared  # Prefect merges a run's env into the pool's


@pytest.mark.parametrize("kind", ("docker", "kubernetes"))
def test_pools_take_secrets_from_blocks_only(kind: str) -> None:
    pool = pool_template(kind)
    secrets = {name for name in pool["variables"]["properties"] if re.search("_key|password", name)}
    assert secrets == {"s3_access_key", "s3_secret_key", "mlflow_password"}
    for name in secrets:  # the server takes references to blocks in defaults only
        default = pool["variables"]["properties"][name]["default"]
        assert default == f"{{{{ prefect.blocks.secret.{name.replace('_', '-')} }}}}"
    assert secrets < placeholders(pool["job_configuration"]["env"])
    assert pool["job_configuration"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(HEARTBEAT_SECONDS)
