"""The MLflow runs of a flow run whose process is gone are closed at a real server; without one, nothing breaks."""

import logging
import sqlite3
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.net import free_port
from flows.platform.mlflow_runs import close_runs, delete_traces
from tests.services.mlflow_server import MLflowServer
from tests.services.platform import until


def test_the_running_runs_of_a_flow_run_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = MLflowServer(tmp_path)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri + "/")
    try:
        client = MlflowClient(server.uri)
        mine, other = {"prefect.flow_run_id": "gone"}, {"prefect.flow_run_id": "another"}
        runs = [
            client.create_run(client.create_experiment(name), tags=tags).info.run_id
            for name, tags in (("a", mine), ("b", mine), ("c", mine), ("d", other), ("e", {}))
        ]
        client.set_terminated(runs[2], "FAILED")
        assert close_runs("gone") == 2 and close_runs("gone") == 0 == close_runs("nobody")
        found = [client.get_run(run).info for run in runs]
        _check_traces(client, tmp_path / "server.db")
        assert [client.get_run(run).info.lifecycle_stage for run in runs] == ["active"] * len(runs)
    finally:
        server.stop()
    assert [info.status for info in found] == ["KILLED", "KILLED", "FAILED", "RUNNING", "RUNNING"]
    assert found[0].end_time >= found[0].start_time


TRACES = """
import mlflow
client = mlflow.MlflowClient()
for name in ("a", "b"):
    experiment = client.get_experiment_by_name(name)
    for _ in range(2):
        trace = client.start_trace("a question", experiment_id=experiment.experiment_id)
        client.end_trace(trace.trace_id)
        print(trace.trace_id)
mlflow.flush_trace_async_logging()
"""


def _check_traces(client: MlflowClient, database: Path) -> None:
    """Of two traces in each of two experiments, the one whose time is set back goes."""
    made = subprocess.run(  # in a process of its own: MLflow's client sends all traces of a process to its first server
        [sys.executable, "-c", TRACES], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    traces = made.stdout.split()
    shown = ["a", "b"]

    def left() -> list[str]:
        ids = [str(found.experiment_id) for name in shown if (found := client.get_experiment_by_name(name)) is not None]
        return sorted(trace.info.trace_id for trace in client.search_traces(locations=ids, include_spans=False))

    until(lambda: left() == sorted(traces), "the traces are kept", 60)
    past = int((time.time() - 3 * 86_400) * 1000)
    with sqlite3.connect(database, timeout=60) as opened:
        for trace in traces[::2]:
            moved = opened.execute("UPDATE trace_info SET timestamp_ms = ? WHERE request_id = ?", (past, trace))
            assert moved.rowcount == 1
    assert delete_traces(timedelta(days=2)) == 2 and delete_traces(timedelta(days=2)) == 0
    assert left() == sorted(traces[1::2])


def test_without_an_mlflow_nothing_is_closed_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/mlflow.db")
    assert close_runs("gone") == 0 == delete_traces(timedelta(days=1)) and caplog.text == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    with caplog.at_level(logging.WARNING):
        assert close_runs("gone") == 0 == delete_traces(timedelta(days=1))
    assert (
        "keeps old traces" in caplog.text and "keeps runs of gone open" in caplog.text and "secret" not in caplog.text
    )
