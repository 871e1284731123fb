"""The command `vectorclm` on a finished curriculum, in this process: run, look, compare, promote, operate, refuse."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prefect.client.orchestration import SyncPrefectClient

from flows import terminal
from flows.cli import main
from flows.net import free_port
from flows.tracking.registry import EVALUATIONS, Registry
from tests.services.curricula import Recorded, copied
from tests.test_curriculum import mini
from vectorclm.shards.order import format_epochs
from vectorclm.store.artifact import Store
from vectorclm.store.layout import STAGES

CHAT = "models:/vectorclm-chat@candidate"


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands set the environment, and a handler of SIGTERM, of their process; here that of the tests goes on."""
    handler, before = signal.getsignal(signal.SIGTERM), dict(os.environ)
    for name in ("VECTORCLM_STORE", "VECTORCLM_HOME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    yield
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def store(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return copied(recorded, tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("experiment") / "mini.json"
    file.write_text(mini().model_dump_json())
    return str(file)


class Command:
    """The command line in this process: its exit code, and what it wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        code = main([str(argument) for argument in arguments])
        self.out, self.err = self.capsys.readouterr()
        return code


@pytest.fixture
def vectorclm(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.mark.usefixtures("prefect_client")
def test_a_finished_curriculum_is_reused_on_the_users_own_server(
    vectorclm: Command, experiment: str, store: Store, shared_prefect: dict[str, str]
) -> None:
    os.environ["PREFECT_API_URL"] = shared_prefect["PREFECT_API_URL"]
    assert vectorclm("run", experiment, "--store", store.root, "--json", "--threads", "1") == 0, vectorclm.err
    stages = json.loads(vectorclm.out)["stages"]
    assert {name: stage["state"] for name, stage in stages.items()} == dict.fromkeys(STAGES, "reused")
    assert len(vectorclm.out.splitlines()) == 1
    assert [line for line in vectorclm.err.splitlines() if line.endswith(" reused")] != []
    assert vectorclm("run", experiment, "--store", store.root, "--threads", "1", "--verbose") == 0, vectorclm.err
    assert "vectorclm chat" in vectorclm.out and all(name in vectorclm.out for name in STAGES)


def test_a_dry_run_says_how_often_sources_are_read_that_are_in_the_store(
    vectorclm: Command, experiment: str, store: Store
) -> None:
    dry = ["run", experiment, "--store", store.root, "--dry-run"]
    assert vectorclm(*dry, "--json") == 0
    costs = json.loads(vectorclm.out)
    artifact = store.find("pretrain", costs["stages"]["pretrain"])
    assert artifact is not None
    summary = artifact.summary
    assert {label: round(epochs, 3) for label, epochs in costs["epochs"].items()} == summary["epochs"]
    assert summary["read"] == format_epochs(costs["epochs"])
    assert costs["here"]["device"] == "cpu" and set(costs["here"]["seconds"]) <= set(STAGES)
    assert vectorclm(*dry) == 0
    assert summary["read"] in vectorclm.out
    changes = ['pretrain.phases.0.when_exhausted="stop"', "pretrain.phases.0.tokens=9_000_000"]
    assert vectorclm(*dry, *(part for change in changes for part in ("--set", change))) == 2
    assert "phase 1 takes" in vectorclm.err and "set its when_exhausted to" in vectorclm.err


def test_pools_take_an_experiment_of_ones_own_and_need_a_server(
    vectorclm: Command, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run", experiment, "--store", tmp_path, "--placement", "pools"]
    assert vectorclm(*command) == 2
    assert "placement pools needs a Prefect server with workers: set PREFECT_API_URL" in vectorclm.err
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert vectorclm(*command) == 2
    assert "no Prefect server answers at http://127.0.0.1:9/api: start it, or unset PREFECT_API_URL" in vectorclm.err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_names_its_neighbours(vectorclm: Command, tmp_path: Path) -> None:
    assert vectorclm("run", "tiny", "--store", tmp_path, "--set", "finetune.epoch=1.0") == 2
    assert "finetune.epoch" in vectorclm.err and "did you mean 'epochs'?" in vectorclm.err
    assert "batch_size" in vectorclm.err and list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written_stops_the_run_first(vectorclm: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert vectorclm("run", "tiny", "--store", tmp_path / "file" / "store") == 2
    assert "not writable" in vectorclm.err


def test_an_interrupted_run_says_how_it_continues(
    vectorclm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(store: Store) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Store, "check_writable", interrupted)
    monkeypatch.setattr(terminal, "END_SECONDS", 10**6)  # this process lives on
    assert vectorclm("run", "tiny", "--store", tmp_path) == 130
    assert vectorclm.err.endswith("stopped: finished work is kept, and the same command continues from here\n")


def test_a_model_is_shown_from_the_store_and_from_mlflow(vectorclm: Command, recorded: Recorded, store: Store) -> None:
    place = ["--store", store.root]
    assert vectorclm("lineage", CHAT, *place, "--verify") == 0
    assert "verified: every file and fingerprint" in vectorclm.out and "vectorclm-chat 1 @candidate" in vectorclm.out
    assert vectorclm("lineage", "vectorclm-chat", *place, "--json") == 0  # no champion yet: the candidate
    assert json.loads(vectorclm.out)["mlflow"]["versions"]
    base = f"pretrain/{recorded.handles['pretrain']['fingerprint'][:12]}"
    assert vectorclm("lineage", CHAT, *place, "--diff", base) == 0
    assert f"finetune  - → {recorded.handles['finetune']['fingerprint']}" in vectorclm.out
    out = Path(store.root).parent / "page.html"
    assert vectorclm("report", CHAT, *place, "--against", base, "--out", out) == 0
    assert vectorclm.out == f"{out}\n" and "champion" in out.read_text()


def test_the_scores_of_a_registered_model_are_recorded_and_others_are_not(
    vectorclm: Command, experiment: str, store: Store
) -> None:
    registry = Registry(store)
    suite = ["--suite", experiment, "--items", "3", "--documents", "2", "--store", store.root]

    def runs() -> int:
        known = registry.client.get_experiment_by_name(EVALUATIONS)
        return len(registry.client.search_runs([known.experiment_id])) if known is not None else 0

    before = runs()
    assert vectorclm("evaluate", "models:/vectorclm-base@candidate", *suite) == 0
    assert "recorded in MLflow: run " in vectorclm.err and runs() == before + 1
    assert vectorclm("evaluate", "models:/vectorclm-base@candidate", *suite) == 0
    assert "recorded in MLflow" not in vectorclm.err and runs() == before + 1
    os.environ |= {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    base = registry.find("models:/vectorclm-base@candidate").address
    assert vectorclm("evaluate", base, *suite) == 0
    assert "does not answer; the result is in the store and not in MLflow" in vectorclm.err


def test_a_registered_model_is_exported_by_its_name(vectorclm: Command, store: Store, tmp_path: Path) -> None:
    gguf = ["--format", "gguf", "--out", tmp_path / "chat.gguf", "--store", store.root]
    assert vectorclm("export", "vectorclm-chat", *gguf) == 0, vectorclm.err
    assert (tmp_path / "chat.gguf").read_bytes()[:4] == b"GGUF"
    assert vectorclm("export", "vectorclm-nothing", *gguf) == 2
    assert "vectorclm-nothing" in vectorclm.err and vectorclm.err.count("\n") == 1


def test_a_model_is_promoted_if_it_beats_chance_on_what_is_named(vectorclm: Command, store: Store) -> None:
    code = vectorclm("promote", "models:/vectorclm-base@candidate", "--store", store.root, "--task", "world")
    champion = Registry(store).champion("vectorclm-base")
    assert (code, champion is not None) in ((0, True), (1, False)) and "acc.world" in vectorclm.out
    assert ("vectorclm-base 1: now @champion" in vectorclm.out) == (code == 0)
    assert vectorclm("promote", "models:/vectorclm-base@candidate", "--store", store.root, "--task", "no") == 2
    assert champion is not None or "not measured on both: acc.no; there are acc.world" in vectorclm.err


def ports() -> list[object]:
    return ["--prefect-port", free_port(), "--mlflow-port", free_port()]


def test_where_no_platform_ran_doctor_and_down_say_so_and_make_nothing(vectorclm: Command, tmp_path: Path) -> None:
    place = ["--store", tmp_path / "store", *ports()]
    assert vectorclm("down", *place) == 0
    assert f"no service of the platform of {tmp_path / 'store'} was running" in vectorclm.out
    assert vectorclm("doctor", *place) == 1
    assert f"!! no platform ran in {tmp_path / 'store'}" in vectorclm.out
    assert list(tmp_path.iterdir()) == []


def test_up_starts_nothing_without_its_database(vectorclm: Command, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{closed.getsockname()[1]}"
        file = tmp_path / "platform.env"
        file.write_text(f"VECTORCLM_STORE={tmp_path / 'store'}\nVECTORCLM_DATABASE=postgresql://me:s3cr3t@{at}\n")
        assert vectorclm("up", "--env-file", file, *ports()) == 2
    assert f"error: no Postgres answers at {at}, which VECTORCLM_DATABASE names: start it" in vectorclm.err
    assert "s3cr3t" not in vectorclm.err
    assert list((tmp_path / "store" / "platform").glob("*.json")) == []  # no record of a service


def test_a_retry_prints_the_page_of_the_new_run(
    vectorclm: Command, tmp_path: Path, prefect_client: SyncPrefectClient, shared_prefect: dict[str, str]
) -> None:
    flow_id = prefect_client.create_flow_from_name("curriculum")
    deployment = prefect_client.create_deployment(flow_id, "tiny", enforce_parameter_schema=False)
    before = prefect_client.create_flow_run_from_deployment(deployment, parameters={"experiment": "tiny"}).id
    port = urlsplit(shared_prefect["PREFECT_API_URL"]).port
    options = ["--store", tmp_path, "--prefect-port", port]
    assert vectorclm("retry", before, "--from", "export", "--set", "finetune.epochs=2.0", *options) == 0, vectorclm.err
    page, _, run_id = vectorclm.out.strip().rpartition("/")
    assert page.endswith(f" runs again as a new run: http://127.0.0.1:{port}/runs/flow-run") and str(before) in page
    parameters = prefect_client.read_flow_run(run_id).parameters  # type: ignore[arg-type]
    assert parameters["again_from"] == "export" and parameters["settings"] == {"finetune.epochs": 2.0}
