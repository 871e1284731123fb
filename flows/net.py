"""Addresses of servers: whether one answers, and how it is reached and shown."""

import os
import re
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from urllib.parse import urlsplit

HEARTBEAT_SECONDS = 30  # of a flow run, the least Prefect takes; the automation that finds dead runs counts on it


QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def has_own_server() -> bool:
    """Whether the user named a Prefect server."""
    return bool(os.environ.get("PREFECT_API_URL"))


def past_proxies() -> dict[str, str]:
    """The environment in which requests to this machine go to this machine, whatever proxy is set."""
    known = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    value = ",".join(dict.fromkeys([*filter(None, known.split(",")), "127.0.0.1", "localhost"]))
    return {"NO_PROXY": value, "no_proxy": value}


def without_password(text: str) -> str:
    """`text` with the user and password of every address in it left out."""
    return re.sub(r"://[^/@\s]+@", "://", text)


def answers(url: str) -> bool:
    """Whether an HTTP server says 200 at `url`; one of this machine is asked directly, whatever proxy is set."""
    try:
        direct = urlsplit(url).hostname in ("127.0.0.1", "localhost")
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if direct else []))
        with opener.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, HTTPException, ValueError):  # or what it says is no HTTP, or `url` is no address
        return False


def neutral(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what points at other servers."""
    return {key: value for key, value in environment.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
