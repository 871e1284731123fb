"""Close the MLflow runs of a dead flow run, and delete old traces, by MLflow's REST API: importing it takes seconds."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import httpx

from flows.net import without_password

API = "/api/2.0/mlflow"
SECONDS = 10  # for one request
EXPERIMENTS = 1000
TRACES = 100  # in one request, which takes a second or so

logger = logging.getLogger(__name__)


def close_runs(flow_run_id: str) -> int:
    """Set the RUNNING runs of a flow run to KILLED; returns their number, 0 where MLflow does not answer."""
    closed = 0
    with _mlflow(f"keeps runs of {flow_run_id} open") as client:
        if client is None:
            return 0
        ids = _experiments(client)
        query = f"tags.`prefect.flow_run_id` = '{flow_run_id}' and attributes.status = 'RUNNING'"
        runs = _post(client, "/runs/search", {"experiment_ids": ids, "filter": query}) if ids else {}
        for run in runs.get("runs", ()):
            ended = {"run_id": run["info"]["run_id"], "status": "KILLED", "end_time": int(time.time() * 1000)}
            _post(client, "/runs/update", ended)
            closed += 1
    return closed


def delete_traces(older: timedelta) -> int:
    """Delete the traces that are older, of every experiment; returns their number, 0 where MLflow does not answer."""
    deleted, before = 0, int((time.time() - older.total_seconds()) * 1000)
    with _mlflow("keeps old traces") as client:
        for experiment in _experiments(client) if client is not None else ():
            asked = {"experiment_id": experiment, "max_timestamp_millis": before, "max_traces": TRACES}
            while client is not None and (
                count := int(_post(client, "/traces/delete-traces", asked)["traces_deleted"])
            ):
                deleted += count
    return deleted


@contextmanager
def _mlflow(problem: str) -> Iterator[httpx.Client | None]:
    """A client of MLflow's server, None without one; an error in the block is a warning about this problem."""
    if not (url := os.environ.get("MLFLOW_TRACKING_URI", "")).startswith("http"):
        yield None
        return
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    auth = httpx.BasicAuth(user, password) if user and password else None
    try:
        with httpx.Client(base_url=url.rstrip("/") + API, auth=auth, timeout=SECONDS, trust_env=False) as client:
            yield client
    except (httpx.HTTPError, ValueError, KeyError) as error:
        logger.warning("MLflow at %s %s: %s", without_password(url), problem, error)


def _post(client: httpx.Client, path: str, body: Any) -> dict[str, Any]:
    return dict(client.post(path, json=body).raise_for_status().json())


def _experiments(client: httpx.Client) -> list[str]:
    found = _post(client, "/experiments/search", {"max_results": EXPERIMENTS}).get("experiments", ())
    return [str(experiment["experiment_id"]) for experiment in found]
