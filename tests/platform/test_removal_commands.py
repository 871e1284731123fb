"""`vectorclm store rm`: lists first, then removes a model or an experiment with the records of MLflow and Prefect."""

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Completed, Failed, Running

from flows.cli import main
from flows.execution.labels import TAGGED
from flows.platform.removal_commands import _runs
from flows.tracking.registry import Registry
from tests.store.test_removal import BASE, CHAT, EXPORTS, OTHER, SAMPLE, key, produce
from vectorclm.store.artifact import Store, build
from vectorclm.store.listing import take_inventory


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two experiments with one base model; one of their chat models is registered."""
    for name in ("MLFLOW_TRACKING_URI", "VECTORCLM_HOME", "VECTORCLM_STORE", "PREFECT_PORT"):
        monkeypatch.delenv(name, raising=False)
    made = Store(str(tmp_path / "store"))
    for spec in (SAMPLE, BASE, CHAT, OTHER, *EXPORTS):
        build(made, spec, produce)
    client = Registry(made).client
    tags = {"fingerprint": CHAT.fingerprint, "stage": "finetune", "uri": made.uri_of(key(CHAT))}
    client.create_registered_model("vectorclm-chat")
    client.create_model_version("vectorclm-chat", made.uri_of(key(CHAT)), tags=tags)
    client.set_registered_model_alias("vectorclm-chat", "candidate", "1")
    return made


def asked(store: Store, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["store", "rm", *words, "--json", "--store", store.uri])
    return code, json.loads(capsys.readouterr().out)


def test_nothing_goes_before_yes_and_then_all_of_it(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tiny", "vectorclm-chat@candidate", f"finetune/{CHAT.fingerprint[:8]}"):
        code, found = asked(store, capsys, name)
        assert code == 0 and not found["removed"]
        assert [row["key"] for row in found["removes"]] == [key(EXPORTS[0]), key(CHAT)]
        assert found["mlflow"]["versions"] == ["vectorclm-chat 1 @candidate"]
    assert len(take_inventory(store).artifacts) == 6

    assert main(["store", "rm", "tiny", "--store", store.uri]) == 0
    shown = capsys.readouterr()
    assert "goes" in shown.out and "stays" in shown.out and shown.err == "--yes removes them\n"
    assert "Prefect: the platform does not run; its runs stay" in shown.out
    code, found = asked(store, capsys, "tiny", "--yes")
    assert code == 0 and found["left"] == {} and [row["key"] for row in found["keeps"]] == [key(SAMPLE), key(BASE)]
    assert {folder.key for folder in take_inventory(store).artifacts} == {
        key(each) for each in (SAMPLE, BASE, OTHER, EXPORTS[1])
    }
    assert list(Registry(store).client.search_model_versions()) == []


def test_what_is_in_use_stays_with_its_record(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with store.lease(f"finetune-{CHAT.fingerprint[:16]}"):
        code, found = asked(store, capsys, key(CHAT), "--yes")
    assert code == 1 and found["left"] == {key(CHAT): "is in use"} and found["mlflow"]["versions"] == []
    assert len(Registry(store).client.search_model_versions()) == 1


def test_the_ended_runs_of_an_experiment_are_removed(prefect_client: SyncPrefectClient) -> None:
    name = f"own-{uuid4()}"
    flow_id = prefect_client.create_flow_from_name("removed")
    deployment = prefect_client.create_deployment(flow_id, name)
    runs = []
    for state, tag in ((Completed(), name), (Failed(), name), (Running(), name), (Completed(), f"{name}-er")):
        run = prefect_client.create_flow_run_from_deployment(deployment, tags=[f"{TAGGED}{tag}"])
        prefect_client.set_flow_run_state(run.id, state, force=True)
        runs.append(run.id)
    assert _runs(prefect_client, name, delete=False) == 2
    assert _runs(prefect_client, name, delete=True) == 2
    assert _runs(prefect_client, name, delete=True) == 0
    left = {run.id for run in prefect_client.read_flow_runs() if run.deployment_id == deployment}
    assert left == {runs[2], runs[3]}
    assert _runs(None, None, delete=True) == 0
