"""MLflow's records of removed artifacts go, those of artifacts that stay do not; on a real database."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.tracking.registry import Registry
from flows.tracking.removal import PARENT, find_records, remove_records
from vectorclm.store.artifact import Store

GONE, STAYS = "a" * 64, "b" * 64


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("VECTORCLM_HOME", raising=False)
    return Registry(Store(str(tmp_path)))


def run(client: MlflowClient, experiment_id: str, parent: str | None = None, fingerprint: str | None = None) -> str:
    tags = {PARENT: parent, "fingerprint": fingerprint}
    known = {name: value for name, value in tags.items() if value is not None}
    return str(client.create_run(experiment_id, tags=known).info.run_id)


def is_there(client: MlflowClient, run_id: str) -> bool:
    return bool(client.get_run(run_id).info.lifecycle_stage == "active")


def test_versions_models_and_runs_go_and_what_others_use_stays(registry: Registry, tmp_path: Path) -> None:
    client = registry.client
    tiny, other = client.create_experiment("tiny"), client.create_experiment("tiny-er")
    own, shared = run(client, tiny), run(client, tiny)
    built, reused, base = run(client, tiny, own, GONE), run(client, other, None, GONE), run(client, tiny, shared, STAYS)
    model = client.create_logged_model(tiny, name="chat", tags={"fingerprint": GONE})
    client.create_registered_model("vectorclm-chat")
    for fingerprint in (GONE, STAYS):
        client.create_model_version("vectorclm-chat", str(tmp_path), tags={"fingerprint": fingerprint})
    client.set_registered_model_alias("vectorclm-chat", "candidate", "1")

    found = find_records(registry, [GONE])
    assert set(found.runs) == {built, reused}  # of a model alone
    found = find_records(registry, [GONE], "tiny")
    assert set(found.runs) == {own, built, reused} and found.models == [model.model_id]
    assert found.as_json() == {"versions": ["vectorclm-chat 1 @candidate"], "models": 1, "runs": 3}
    assert is_there(client, own)  # finding removes nothing
    remove_records(registry, found)
    assert [is_there(client, each) for each in (own, built, reused, shared, base)] == [False] * 3 + [True] * 2
    assert [version.version for version in client.search_model_versions()] in ([2], ["2"])
    with pytest.raises(MlflowException):
        client.get_model_version_by_alias("vectorclm-chat", "candidate")
    assert find_records(registry, [GONE], "tiny").as_json() == {"versions": [], "models": 0, "runs": 0}
