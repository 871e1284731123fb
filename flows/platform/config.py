"""Settings of the platform, and its services: Prefect, MLflow and the workers.

Each service is a process that outlives the command which starts it; its log and its record are in `<home>/platform/`.
Passwords reach services by their environment or a pipe, never by arguments.
"""

import os
import re
import socket
import sys
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Self, get_args
from urllib.parse import unquote, urlsplit

from dotenv.parser import parse_stream
from pydantic import Field, SecretStr, model_validator

from flows.net import HEARTBEAT_SECONDS, QUIET, answers, past_proxies
from flows.paths import check_name, local_folder
from flows.platform import password, private
from flows.platform.process import HOST, PREFECT, Service
from flows.platform.public_address import host_of
from flows.platform.retention import KEEP
from flows.tracking.client import MLFLOW_PAGE
from flows.tracking.database import artifacts_destination
from vectorclm.errors import ConfigError
from vectorclm.inference.guard import ALLOWED, allowed_hosts
from vectorclm.settings import Settings, validate
from vectorclm.store.artifact import Store

POOLS = ("cpu", "gpu")
EVENTS_KEPT = "P30D"  # ISO 8601
NO_STORE = (
    "S3_ACCESS_KEY belongs to an S3 store of your own, as `vectorclm up` starts none: set AWS_ENDPOINT_URL to its URL; "
    "for Amazon's S3, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment instead"
)
CONNECT_SECONDS = 10
SCHEDULE_SECONDS = 10  # between two checks for new schedules
PROBED_SECONDS = 2  # between two rounds of the loops whose effect `doctor` waits for
TOGETHER = (
    ("mlflow_admin_password", "mlflow_secret_key"),
    ("s3_access_key", "s3_secret_key"),
    ("vectorclm_smtp_user", "vectorclm_smtp_password"),
)
MAIL_ADDRESS = r"[^\s@,;<>]+@[^\s@,;<>]+"
NOTIFY = re.compile(rf"none|[a-z0-9-]+/[a-z0-9-]+|webhook:https?://[^\s/]\S*|mailto:{MAIL_ADDRESS}(,{MAIL_ADDRESS})*")


class PlatformConfig(Settings):
    """Settings of the platform: the variables of `docker/platform.env`, in lower case."""

    vectorclm_store: str = Field("./store", description="The store of the artifacts: a folder, or s3://bucket/prefix")
    vectorclm_database: SecretStr | None = Field(
        None, description="postgresql://user:password@host:port for Prefect and MLflow; default: SQLite in the home"
    )
    vectorclm_notify: SecretStr = Field(  # the address of a webhook often is its password
        SecretStr("none"),
        description="Who is notified of failures, missed runs, full disks and fallen scores: webhook:https://…, "
        "mailto:name@host, or a block of Prefect as type/name: slack-webhook/team; none = nobody; not set = as before",
    )
    vectorclm_smtp_host: str | None = Field(None, description="The mail server that sends the messages of mailto:")
    vectorclm_smtp_port: int | None = Field(None, ge=1, le=65_535, description="Default: 587; tls: 465; none: 25")
    vectorclm_smtp_user: str | None = None
    vectorclm_smtp_password: SecretStr | None = None
    vectorclm_smtp_from: str | None = Field(
        None, description="The sender's address; default: VECTORCLM_SMTP_USER if it is one, else the first receiver"
    )
    vectorclm_smtp_tls: Literal["starttls", "tls", "none"] = "starttls"
    vectorclm_home: str | None = Field(None, description="The folder on this machine for databases and logs")
    vectorclm_experiments: str | None = Field(
        None, description="A folder of experiment files (TOML or JSON), each offered with a form of its own"
    )
    vectorclm_keep_records: int | None = Field(
        None, ge=1, description="Days for which runs and events in Prefect and traces in MLflow are kept"
    )
    prefect_port: int = Field(4200, ge=1, le=65_535)
    mlflow_port: int = Field(5000, ge=1, le=65_535)
    vectorclm_url: str | None = Field(
        None, description="Prefect's address in a browser, if not that of this machine: https://prefect.example.org"
    )
    vectorclm_mlflow_url: str | None = Field(None, description="MLflow's address in a browser, alike")
    vectorclm_allowed_hosts: str = Field(
        "", description="Host names of Prefect and MLflow beside localhost, as behind a proxy; separated by commas"
    )
    prefect_auth: SecretStr | None = Field(
        None, description="user:password of Prefect's API and UI; default: `up` creates one; none = no password"
    )
    mlflow_admin_password: SecretStr | None = Field(None, min_length=12)
    mlflow_secret_key: SecretStr | None = None
    s3_access_key: SecretStr | None = None
    s3_secret_key: SecretStr | None = None
    aws_endpoint_url: str | None = Field(None, description="The URL of the S3 store to which S3_ACCESS_KEY belongs")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for one, other in TOGETHER:
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"{one.upper()} and {other.upper()} go together: set both, or neither")
        if self.s3_access_key is not None and self.aws_endpoint_url is None:
            raise ValueError(NO_STORE)
        auth = self.prefect_auth
        if auth is not None and not password.is_off(auth) and not password.is_complete(auth.get_secret_value()):
            raise ValueError("PREFECT_AUTH must be user:password, or none")
        try:
            allowed_hosts({ALLOWED: self.allowed_hosts})
        except ConfigError as error:
            raise ValueError(str(error)) from error
        url = self.vectorclm_database
        if url is not None and not re.match(r"postgres(ql)?://", url.get_secret_value()):
            raise ValueError("VECTORCLM_DATABASE must be postgresql://user:password@host:port")
        return self

    @model_validator(mode="after")
    def _can_notify(self) -> Self:
        if not NOTIFY.fullmatch(self.notify):
            raise ValueError(
                "VECTORCLM_NOTIFY must be webhook:https://…, mailto:name@host, a block of Prefect as type/name, or none"
            )
        if self.notify.startswith("mailto:") and self.vectorclm_smtp_host is None:
            raise ValueError("VECTORCLM_NOTIFY=mailto:… needs a mail server: set VECTORCLM_SMTP_HOST")
        sender = self.vectorclm_smtp_from
        if sender is not None and not re.fullmatch(MAIL_ADDRESS, sender):
            raise ValueError("VECTORCLM_SMTP_FROM must be an address such as vectorclm@example.org")
        is_open = self.vectorclm_smtp_tls == "none" and self.vectorclm_smtp_host not in ("localhost", HOST, "::1")
        if is_open and self.vectorclm_smtp_password is not None:
            raise ValueError("VECTORCLM_SMTP_TLS=none would send the password in plain text: set starttls or tls")
        return self

    @property
    def notify(self) -> str:
        """Who is notified: the value of VECTORCLM_NOTIFY, in which the address of a webhook is a secret."""
        return self.vectorclm_notify.get_secret_value()

    @property
    def names_receiver(self) -> bool:
        """Whether VECTORCLM_NOTIFY is set, if only to `none`: without it, who was notified before still is."""
        return "vectorclm_notify" in self.model_fields_set

    @property
    def home(self) -> Path:
        """The folder on this machine for databases, logs and locks."""
        if self.vectorclm_home is not None:
            return check_name(Path(self.vectorclm_home).absolute())
        return local_folder(Store(self.vectorclm_store))

    @property
    def prefect_password(self) -> str | None:
        """user:password of Prefect: as set, else the one that `up` created; None without a password.

        Raises ConfigError where the file that keeps it cannot be read.
        """
        if self.prefect_auth is None:
            return password.read(self.home)
        return None if password.is_off(self.prefect_auth) else self.prefect_auth.get_secret_value()

    @property
    def prefect_url(self) -> str:
        """The URL of Prefect's UI; its API is at `/api`."""
        return f"http://{HOST}:{self.prefect_port}"

    @property
    def prefect_page(self) -> str:
        """The address of Prefect's pages in a browser, for links: VECTORCLM_URL, else that of this machine."""
        return (self.vectorclm_url or self.prefect_url).rstrip("/")

    @property
    def mlflow_page(self) -> str:
        """The address of MLflow's pages in a browser, for links: VECTORCLM_MLFLOW_URL, else that of this machine."""
        return (self.vectorclm_mlflow_url or self.mlflow_url).rstrip("/")

    @property
    def allowed_hosts(self) -> str:
        """The names of the servers beside localhost: those that are set, and those of the public addresses."""
        public = [host_of(url) for url in (self.vectorclm_url, self.vectorclm_mlflow_url) if url is not None]
        return ",".join(dict.fromkeys(filter(None, [*self.vectorclm_allowed_hosts.split(","), *public])))

    @property
    def mlflow_url(self) -> str:
        """The URL of MLflow's UI and API."""
        return f"http://{HOST}:{self.mlflow_port}"

    def database(self, name: str, driver: str) -> str | None:
        """The URL of a Postgres database, `prefect` or `mlflow`; None if SQLite is used."""
        if self.vectorclm_database is None:
            return None
        at = urlsplit(self.vectorclm_database.get_secret_value()).netloc
        return f"postgresql+{driver}://{at}/{name}"

    def check_database(self) -> str | None:
        """The address of the Postgres that VECTORCLM_DATABASE names; None for SQLite.

        Raises ConfigError where nothing answers there: the servers of Prefect and MLflow would not start.
        """
        if self.vectorclm_database is None:
            return None
        at = urlsplit(self.vectorclm_database.get_secret_value())
        host, port = at.hostname or HOST, at.port or 5432
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise ConfigError(
                f"no Postgres answers at {host}:{port}, which VECTORCLM_DATABASE names: start it ({error})"
            ) from error
        return f"{host}:{port}"

    def client_environment(self) -> dict[str, str]:
        """The environment of a worker, or of a command that talks to the platform."""
        store = self.vectorclm_store
        environment = {
            **QUIET,
            **past_proxies(),
            "PREFECT_HOME": str(self.home / ".prefect"),
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
            "PREFECT_WORKER_QUERY_SECONDS": "5",
            "PREFECT_UI_URL": self.prefect_page,  # of links in overviews
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "VECTORCLM_HOME": str(self.home),
            "VECTORCLM_STORE": store if "://" in store else str(Path(store).absolute()),
        }
        if self.vectorclm_keep_records is not None:
            environment[KEEP] = str(self.vectorclm_keep_records)
        if self.vectorclm_url is not None:
            environment["VECTORCLM_URL"] = self.prefect_page
        if self.vectorclm_mlflow_url is not None:
            environment[MLFLOW_PAGE] = self.mlflow_page
        if self.vectorclm_experiments is not None:
            environment["VECTORCLM_EXPERIMENTS"] = str(Path(self.vectorclm_experiments).absolute())
        if (auth := self.prefect_password) is not None:
            environment["PREFECT_API_AUTH_STRING"] = auth
        if self.mlflow_admin_password is not None:
            environment["MLFLOW_TRACKING_USERNAME"] = "admin"
            environment["MLFLOW_TRACKING_PASSWORD"] = self.mlflow_admin_password.get_secret_value()
        return environment | self._s3_environment()

    def _s3_environment(self) -> dict[str, str]:
        if self.s3_access_key is None or self.s3_secret_key is None:
            return {}
        endpoint = self.aws_endpoint_url or ""
        return {
            "AWS_ACCESS_KEY_ID": self.s3_access_key.get_secret_value(),
            "AWS_SECRET_ACCESS_KEY": self.s3_secret_key.get_secret_value(),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
            "MLFLOW_S3_ENDPOINT_URL": endpoint,
        }

    def servers(self) -> list[Service]:
        """The servers of Prefect and MLflow, which start in parallel."""
        return [_prefect_server(self), _mlflow_server(self)]

    def workers(self) -> list[Service]:
        """A worker for each pool."""
        return [_worker(self, pool) for pool in POOLS]


# What older versions of `up` started servers by, and docker/compose.yaml still does; each with its successor.
RETIRED = {
    "postgres_password": "vectorclm_database",
    "postgres_port": "vectorclm_database",
    "s3_port": "aws_endpoint_url",
}
SECRETS = [name for name, field in PlatformConfig.model_fields.items() if SecretStr in get_args(field.annotation)]


def read_platform(env_file: Path | None, **options: Any) -> PlatformConfig:
    """Read the platform's settings: options override the environment, which overrides the file. Raises ConfigError."""
    values: dict[str, Any] = {} if env_file is None else _read_file(env_file)
    known = [*PlatformConfig.model_fields, *RETIRED]
    values |= {name: os.environ[name.upper()] for name in known if name.upper() in os.environ}
    values |= {name: value for name, value in options.items() if value is not None}
    values = {name: value for name, value in values.items() if value != ""}
    for name, successor in RETIRED.items():
        if values.pop(name, None) is not None and successor not in values:
            kind = "Postgres" if name.startswith("postgres") else "S3 store"
            raise ConfigError(
                f"{name.upper()} is read by docker/compose.yaml only, as `vectorclm up` starts no {kind}: name one of "
                f"your own by {successor.upper()}, or remove {name.upper()}"
            )
    return validate(PlatformConfig, values, "platform settings")


def _read_file(env_file: Path) -> dict[str, Any]:
    """The settings of a file of lines NAME=value. Raises ConfigError with the number of a wrong line."""
    try:
        text, readable = private.read_settings(env_file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{env_file} cannot be read: {error}") from error
    values: dict[str, Any] = {}
    for binding in parse_stream(StringIO(text)):
        at = binding.original
        line = at.line + at.string[: len(at.string) - len(at.string.lstrip())].count("\n")
        if binding.error or (binding.key is not None and binding.value is None):
            raise ConfigError(f"{env_file}, line {line}: write NAME=value")
        if binding.key is None:
            continue  # a comment
        name = binding.key.lower()
        if not binding.value and (name in SECRETS or name in RETIRED):
            raise ConfigError(f"{env_file}, line {line}: {binding.key} is empty: fill it in, or delete the line")
        values[name] = binding.value
    if readable and (secret := next((name for name in values if name in SECRETS and values[name]), "")):
        private.warn_of_readers(env_file, secret.upper())
    return values


def _prefect_server(config: PlatformConfig) -> Service:
    command = [
        sys.executable,
        "-m",
        "flows.platform.guard",
        "prefect",
        "--host",
        HOST,
        "--port",
        str(config.prefect_port),
    ]
    known = config.client_environment()  # for the attendant of the runs
    environment = {
        **{name: known[name] for name in known if name.startswith(("VECTORCLM_", "MLFLOW_", "AWS_"))},
        **QUIET,
        "PREFECT_HOME": str(config.home / ".prefect"),
        "PREFECT_API_URL": f"{config.prefect_url}/api",
        ALLOWED: config.allowed_hosts,
        # The guard refuses other origins; these two settings also work behind a proxy that hides the origin.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(
            dict.fromkeys([config.prefect_url, f"http://localhost:{config.prefect_port}", config.prefect_page])
        ),
        "PREFECT_UI_URL": config.prefect_page,  # of links in messages
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        # Automations that fell due while the server was away still fire when it is back.
        "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": EVENTS_KEPT,
        # Prefect's default is a minute.
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": str(SCHEDULE_SECONDS),
        # Prefect's default is 5 seconds, for which `doctor` would wait.
        "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": str(PROBED_SECONDS),
        "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": str(PROBED_SECONDS),
    }
    if (url := config.database("prefect", "asyncpg")) is not None:
        environment["PREFECT_API_DATABASE_CONNECTION_URL"] = url
    if (auth := config.prefect_password) is not None:
        environment |= {"PREFECT_SERVER_API_AUTH_STRING": auth, "PREFECT_API_AUTH_STRING": auth}
    ready = partial(answers, f"{config.prefect_url}/api/health")
    return Service(PREFECT, command, environment, _folder(config), config.prefect_port, ready)


def _mlflow_server(config: PlatformConfig) -> Service:
    home = config.home
    command = [
        sys.executable,
        "-m",
        "flows.platform.guard",
        "mlflow",
        "--host",
        HOST,
        "--port",
        str(config.mlflow_port),
    ]
    command += ["--workers", "2"]
    environment = {
        **QUIET,
        "MLFLOW_BACKEND_STORE_URI": config.database("mlflow", "psycopg2") or f"sqlite:///{home / 'mlflow.db'}",
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts_destination(Store(config.vectorclm_store), home),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        ALLOWED: config.allowed_hosts,
        **config._s3_environment(),
    }
    if config.mlflow_admin_password is not None and config.mlflow_secret_key is not None:
        command += ["--app-name", "basic-auth"]
        environment["MLFLOW_AUTH_ADMIN_PASSWORD"] = config.mlflow_admin_password.get_secret_value()
        environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = config.mlflow_secret_key.get_secret_value()
    prepare = None
    if config.mlflow_admin_password is not None and (url := config.database("mlflow", "psycopg2")) is not None:
        user, _, at = urlsplit(url).netloc.rpartition("@")
        name, _, password = user.partition(":")
        environment["PGPASSWORD"] = unquote(password)  # not in the URL, which is written to a file
        environment["MLFLOW_AUTH_CONFIG_PATH"] = str(_folder(config) / "mlflow-auth.ini")
        prepare = partial(_write_users, _folder(config) / "mlflow-auth.ini", f"{name}@{at}")
    ready = partial(answers, f"{config.mlflow_url}/health")
    return Service("mlflow", command, environment, _folder(config), config.mlflow_port, ready, prepare)


def _write_users(file: Path, at: str) -> None:
    """Write MLflow's configuration of users, who are kept in Postgres."""
    lines = ["[mlflow]", "default_permission = READ", f"database_uri = postgresql+psycopg2://{at}/mlflow"]
    file.write_text("\n".join([*lines, "admin_username = admin", ""]), encoding="utf-8")


def _worker(config: PlatformConfig, pool: str) -> Service:
    name = f"{socket.gethostname()}-{pool}"
    command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool", pool, "--name", name]
    command += ["--no-create-pool-if-not-found", "--install-policy", "never"]
    command += ["--limit", "1"] if pool == "gpu" else []  # a stage uses all GPUs of its machine; the next one waits
    # The user's own umask decides who may read artifacts in a shared folder.
    return Service(f"worker-{pool}", command, config.client_environment(), _folder(config), umask=-1)


def _folder(config: PlatformConfig) -> Path:
    return config.home / "platform"
