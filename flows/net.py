"""Addresses of servers: check whether one answers, find a free port, bypass proxies, hide passwords."""

import os
import re
import socket
from collections.abc import Mapping

HEARTBEAT_SECONDS = 30  # of a flow run, Prefect's minimum; the automation that finds dead runs relies on it


PARAMETER_BYTES = 64 * 2**20  # of a run; an experiment is one, and may name thousands of files

QUIET = {
    "PREFECT_SERVER_API_MAX_PARAMETER_SIZE": str(PARAMETER_BYTES),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


SAFE_PATH = {"PYTHONSAFEPATH": "1"}  # `python -m` and `python -c` import nothing from the working directory


# What creates the deployments, without containers and in those of docker/compose.yaml.
PROVISION = (
    "run `vectorclm up`, or, for a platform in containers, `docker compose --env-file docker/platform.env --file "
    "docker/compose.yaml up --detach`"
)


def has_own_server() -> bool:
    """Whether PREFECT_API_URL names a Prefect server of the user."""
    return bool(os.environ.get("PREFECT_API_URL"))


def past_proxies() -> dict[str, str]:
    """Environment variables that send requests to 127.0.0.1 and localhost past any proxy."""
    known = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    value = ",".join(dict.fromkeys([*filter(None, known.split(",")), "127.0.0.1", "localhost"]))
    return {"NO_PROXY": value, "no_proxy": value}


def without_password(text: str) -> str:
    """Remove user and password from every URL in a text."""
    return re.sub(r"://[^/@\s]+@", "://", text)


def answers(url: str) -> bool:
    """Whether an HTTP server answers 200 at `url`. A server of this machine is asked directly, past any proxy."""
    import httpx  # takes a tenth of a second, which most commands need not wait for

    try:
        where = httpx.URL(url)
        direct = where.host in ("127.0.0.1", "localhost")
        safe = where.scheme == "https"  # else no certificates are read
        found = httpx.get(where, timeout=5, trust_env=not direct, verify=safe, follow_redirects=True)
        return found.status_code == httpx.codes.OK
    except (httpx.HTTPError, httpx.InvalidURL, OSError):  # OSError: a file of certificates that is not there
        return False


def free_port() -> int:
    """A port of 127.0.0.1 that no program listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def neutral(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables of Prefect and MLflow, which may name other servers."""
    return {key: value for key, value in environment.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
