"""The MLflow runs of a flow run whose process is gone are closed at a real server; without one, nothing breaks."""

import logging
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.net import free_port
from flows.platform.mlflow_runs import close_runs
from tests.services.mlflow_server import MLflowServer


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
    finally:
        server.stop()
    assert [info.status for info in found] == ["KILLED", "KILLED", "FAILED", "RUNNING", "RUNNING"]
    assert found[0].end_time >= found[0].start_time


def test_without_an_mlflow_nothing_is_closed_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/mlflow.db")
    assert close_runs("gone") == 0 and caplog.text == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    with caplog.at_level(logging.WARNING):
        assert close_runs("gone") == 0
    assert "keeps runs of gone open" in caplog.text and "secret" not in caplog.text
