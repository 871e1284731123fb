"""Files of MLflow's runs are found with the platform's server and without it, whoever made the experiment."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.net import free_port
from flows.platform.config import PlatformConfig
from flows.tracking.client import tracking_uri
from flows.tracking.registry import EVALUATIONS, Registry
from flows.tracking.server_files import open_client
from tests.tracking.conftest import tracker
from vectorclm.config import ExperimentConfig
from vectorclm.store.artifact import Store

ROWS = [{"score": "acc.world", "champion": "0.25", "candidate": "0.4"}]


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlatformConfig]:
    """The MLflow of a platform as `up` starts it; a test stops and starts it."""
    config = PlatformConfig(vectorclm_store=str(tmp_path / "store"), prefect_port=free_port(), mlflow_port=free_port())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield config
    config.servers()[1].stop()


def decide(store: Store) -> str:
    """Record a decision about a model, with its table; returns the id of its run."""
    registry = Registry(store)
    version = registry.client.get_model_version("a-model", "1")
    page = registry.decide(version, {"over": "chance", "decision": "refused"}, ROWS, good=False)
    return page.partition("?")[0].rstrip("/").rpartition("/")[2].removeprefix("run ")


def listed(client: MlflowClient, run_id: str) -> str:
    """The table of a decision, listed and read by this client."""
    assert [file.path for file in client.list_artifacts(run_id)] == ["comparison.json"]
    return Path(client.download_artifacts(run_id, "comparison.json")).read_text()


def test_files_are_found_with_and_without_the_server(
    platform: PlatformConfig, experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run, up, a decision and a run there, down, a decision and a run without the server, up again."""
    store, server = Store(platform.vectorclm_store), platform.servers()[1]
    store.create()
    with tracker(store, experiment, "first") as first:
        first.report("before")
    embedded = open_client(tracking_uri(store), store)
    embedded.create_registered_model("a-model")
    embedded.create_model_version("a-model", "elsewhere", tags={"fingerprint": "0" * 64})
    server.start()
    server.wait()
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", platform.mlflow_url)
        there = decide(store)
        with tracker(store, experiment, "second") as second:
            second.report("on the platform")
        with tracker(store, experiment, "first") as again:
            again.report("again")
    proxied = MlflowClient(platform.mlflow_url)
    assert proxied.get_experiment_by_name(EVALUATIONS).artifact_location.startswith("mlflow-artifacts:")
    server.stop()

    here = decide(store)  # in the experiment that the server made
    with tracker(store, experiment, "second") as third:
        third.report("without it")
    assert listed(embedded, there) == listed(embedded, here)
    reports = {"first": {"before", "again"}, "second": {"on the platform", "without it"}}
    for client in (embedded, proxied):
        if client is proxied:
            server.start()
            server.wait()
        for name, told in reports.items():
            runs = client.search_runs([client.get_experiment_by_name(name).experiment_id], "tags.stage = 'curriculum'")
            found = {Path(client.download_artifacts(run.info.run_id, "report.html")).read_text() for run in runs}
            assert found == told
    assert listed(proxied, there) == listed(proxied, here)


def test_an_address_that_leads_out_of_the_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(str(tmp_path / "store"))
    store.create()
    client = open_client(tracking_uri(store), store)
    run = client.create_run(client.create_experiment("out", "mlflow-artifacts:/../../elsewhere"))
    with pytest.raises(MlflowException, match="leads out of"):
        client.log_text(run.info.run_id, "text", "file.txt")
