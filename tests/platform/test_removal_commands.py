"""`vectorclm store rm`: lists first, then removes a model or an experiment with the records of MLflow and Prefect."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Completed, Failed, Running

from flows.cli import main
from flows.execution.labels import TAGGED
from flows.net import free_port
from flows.platform.config import read_platform
from flows.platform.removal_commands import _runs, _unfinished
from flows.tracking.registry import Registry
from tests.store.test_removal import BASE, CHAT, EXPORTS, OTHER, SAMPLE, key, produce
from vectorclm.runtime.processes import process_identity
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
        assert {row["key"] for row in found["removes"]} == {key(EXPORTS[0]), key(CHAT)}
        assert found["mlflow"]["versions"] == ["vectorclm-chat 1 @candidate"]
    assert len(take_inventory(store).artifacts) == 6

    assert main(["store", "rm", "tiny", "--store", store.uri]) == 0
    shown = capsys.readouterr()
    assert "goes" in shown.out and "stays" in shown.out and shown.err == "--yes removes them\n"
    assert "Prefect: 0 runs" in shown.out and "stays: own uses it" in shown.out
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


def test_nothing_goes_while_mlflow_is_away(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
        code, found = asked(store, capsys, "tiny")
        assert code == 0 and "does not answer" in found["mlflow"]
        assert main(["store", "rm", "tiny", "--yes", "--store", store.uri]) != 0
        assert "does not answer; nothing was removed" in capsys.readouterr().err
    assert len(take_inventory(store).artifacts) == 6
    code, found = asked(store, capsys, "tiny", "--yes")
    assert code == 0 and found["mlflow"]["versions"] == ["vectorclm-chat 1 @candidate"]


class Refusing(BaseHTTPRequestHandler):
    """A server that refuses the password."""

    def do_GET(self) -> None:
        """Read the request, and answer 401."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def test_nothing_goes_while_prefect_is_away_or_refuses(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        monkeypatch.setenv("PREFECT_PORT", str(server.server_port))
        service = read_platform(None, vectorclm_store=store.uri).servers()[0]
        service.folder.mkdir(parents=True)  # as `up` leaves it
        said = []
        for known in ({}, process_identity(psutil.Process())):
            service.record.write_text(json.dumps(known))
            Thread(target=server.serve_forever, daemon=True).start()
            assert main(["store", "rm", "tiny", "--yes", "--store", store.uri]) != 0
            said.append(capsys.readouterr().err)
            code, found = asked(store, capsys, "tiny")
            assert code == 0 and isinstance(found["prefect_runs"], str)
            server.shutdown()
    assert "does not run" in said[0] and "401" in said[1] and all("nothing was removed" in text for text in said)
    assert len(take_inventory(store).artifacts) == 6
    assert len(Registry(store).client.search_model_versions()) == 1


def test_an_unfinished_run_stays_and_the_exit_code_says_so(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    client = Registry(store).client
    run = client.create_run(client.create_experiment("tiny"), tags={"fingerprint": CHAT.fingerprint})
    code, found = asked(store, capsys, "tiny", "--yes")
    assert code == 1 and found["unfinished"] == 1 and found["left"] == {}
    assert client.get_run(run.info.run_id).info.lifecycle_stage == "active"


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
    assert _unfinished(prefect_client, name) == 1
    assert _runs(None, None, delete=True) == 0
