"""Addresses of servers: check whether one answers, find a free port, bypass proxies, hide passwords."""

import os
import re
import socket
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from urllib.parse import urlsplit

HEARTBEAT_SECONDS = 30  # of a flow run, Prefect's minimum; the automation that finds dead runs relies on it


QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


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
    try:
        direct = urlsplit(url).hostname in ("127.0.0.1", "localhost")
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if direct else []))
        with opener.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, HTTPException, ValueError):  # or the answer is not HTTP, or `url` is not an address
        return False


def free_port() -> int:
    """A port of 127.0.0.1 that no program listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def neutral(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables of Prefect and MLflow, which may name other servers."""
    return {key: value for key, value in environment.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
