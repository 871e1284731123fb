"""What MLflow holds of two curricula: models that load, data behind each score, items, tokens, links, deletions."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file
from selenium.webdriver.remote.webdriver import WebDriver

from flows.cli import main
from flows.net import free_port
from flows.tracking.registry import Registry
from tests.conftest import read_lines
from tests.lineage.conftest import curriculum, pinned
from tests.services.browser import browser, says
from tests.services.mlflow_server import MLflowServer
from tests.services.platform import until
from vectorclm.inference.config import SamplingParams
from vectorclm.inference.generate import answer_text, continuation
from vectorclm.inference.load import open_model
from vectorclm.lineage.chain import SHORT
from vectorclm.store.artifact import Store
from vectorclm.tokenizer import encode, load_tokenizer

__all__ = ["browser"]  # a fixture
PROMPTS = ["Where does the otter live?", "Pim is an"]


@pytest.fixture(scope="module")
def client(world: SimpleNamespace, server: MLflowServer) -> Iterator[MlflowClient]:
    """MLflow as a user has it: the address of the server, and a store at hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VECTORCLM_STORE", world.store.uri)
        mlflow.set_tracking_uri(server.uri)
        client = MlflowClient()
        client.set_registered_model_alias("vectorclm-chat", "champion", "1")
        yield client


def built(client: MlflowClient, stage: str) -> Run:
    """The run that built a stage of the first curriculum."""
    place = client.get_experiment_by_name(pinned().name).experiment_id
    query = f"tags.stage = '{stage}' and tags.state = 'built'"
    return client.get_run(client.search_runs([place], query, order_by=["attributes.start_time ASC"])[0].info.run_id)


def files(folder: str) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in Path(folder).rglob("*")}


def test_a_registered_model_answers_through_mlflow(world: SimpleNamespace, client: MlflowClient) -> None:
    before = files(world.first["finetune"])
    chat = mlflow.pyfunc.load_model("models:/vectorclm-chat@champion")
    model, tokenizer = open_model(Path(world.first["finetune"]))
    assert chat.predict(PROMPTS) == [answer_text(model, tokenizer, prompt, 128) for prompt in PROMPTS]
    drawn = {"temperature": 1.5, "seed": 7, "max_new_tokens": 9}
    sampling = SamplingParams(temperature=1.5, seed=7)
    assert chat.predict(PROMPTS[0], params=drawn) == [answer_text(model, tokenizer, PROMPTS[0], 9, sampling)]
    assert chat.input_example == [PROMPTS[0]]
    assert str(chat.metadata.signature.inputs) == str(chat.metadata.signature.outputs) == "[string (required)]"
    base = mlflow.pyfunc.load_model("models:/vectorclm-base/1")
    model, tokenizer = open_model(Path(world.first["pretrain"]))
    assert base.predict(PROMPTS[1:]) == [continuation(model, tokenizer, PROMPTS[1], 128)]
    ids = mlflow.pyfunc.load_model("models:/vectorclm-tokenizer/1").predict(PROMPTS)
    assert ids == [encode(load_tokenizer(Path(world.first["tokenizer"])), prompt) for prompt in PROMPTS]
    assert files(world.first["finetune"]) == before


def test_transformers_loads_the_weights_from_the_store_and_mlflow_has_no_copy(
    world: SimpleNamespace, client: MlflowClient, tmp_path: Path, server: MLflowServer
) -> None:
    before = files(world.first["finetune"])
    chat = mlflow.transformers.load_model("models:/vectorclm-chat@champion")
    weights = load_file(Path(world.first["finetune"]) / "model.safetensors")
    kept = chat.model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights.items())
    (said,) = chat([{"role": "user", "content": PROMPTS[0]}], max_new_tokens=4, do_sample=False)
    assert said["generated_text"][-1]["role"] == "assistant"
    shutil.copytree(world.first["finetune"], tmp_path / "moved")
    version = client.get_model_version("vectorclm-chat", "1")
    place, _, fingerprint = world.first["finetune"].rpartition("/")
    lines = version.description.partition("```python\n")[2].partition("\n```")[0]
    lines = lines.replace(f"{place}/{fingerprint[:SHORT]}", "MOVED")
    assert "MOVED" in lines
    names = {"mlflow": SimpleNamespace(pyfunc=mlflow.pyfunc, transformers=mlflow.transformers)}
    exec(lines.replace("MOVED", str(tmp_path / "moved")), names)  # the lines of the version's page, as they stand
    assert files(world.first["finetune"]) == before
    kinds = {path.suffix for path in server.folder.rglob("artifacts/**/*")}
    assert not kinds & {".safetensors", ".pkl", ".bin", ".pt"} and ".json" in kinds


def test_the_store_at_hand_is_searched_first_and_verified(
    world: SimpleNamespace, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that was moved or is mounted elsewhere."""
    moved = Path(tmp_path, "store")
    monkeypatch.setenv("VECTORCLM_STORE", str(moved))
    address = world.first["finetune"].replace(world.store.uri, str(moved))
    shutil.copytree(world.first["finetune"], address)
    chat = mlflow.pyfunc.load_model("models:/vectorclm-chat@champion")
    assert chat.unwrap_python_model.__self__._model_impl.loaded.folder == Path(address)
    assert Registry(Store(str(moved))).find("models:/vectorclm-chat/1").address == address
    weights = Path(address, "model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(Exception, match=r"model\.safetensors"):
        mlflow.pyfunc.load_model("models:/vectorclm-chat@champion")
    shutil.rmtree(moved)
    assert mlflow.pyfunc.load_model("models:/vectorclm-chat@champion").predict(PROMPTS[:1])  # where it was built
    assert not moved.exists()


def test_mlflow_serves_a_registered_model(client: MlflowClient, server: MLflowServer, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/vectorclm-chat@champion"]
    command += ["--env-manager", "local", "--port", str(port), "--workers", "1"]
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # MLflow starts uvicorn by name
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server.uri, "PATH": programs}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:

        def answer() -> list[str]:
            try:
                asked = {"inputs": PROMPTS[:1], "params": {"max_new_tokens": 5}}
                return list(httpx.post(f"http://127.0.0.1:{port}/invocations", json=asked).json()["predictions"])
            except httpx.TransportError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                return []

        chat = mlflow.pyfunc.load_model("models:/vectorclm-chat@champion")
        assert until(answer, "MLflow serves the model", 120) == chat.predict(PROMPTS[:1], params={"max_new_tokens": 5})
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait(60)


def test_each_score_names_its_data_and_has_its_items(world: SimpleNamespace, client: MlflowClient) -> None:
    run = built(client, "evaluate")
    fingerprint = Path(world.first["evaluate"]).name
    scores = world.store.find("evaluate", fingerprint)
    (chat,) = run.inputs.model_inputs
    measured = {metric.key: metric.dataset_name for metric in client.get_logged_model(chat.model_id).metrics}
    assert measured["tasks.world.acc"] == "world"
    assert measured["text.stories.bits_per_byte"] == measured["loss.stories"] == f"{pinned().name} shards"
    assert measured["chat.ended"] == f"{pinned().name} chat_shards"
    assert set(filter(None, measured.values())) <= {item.dataset.name for item in run.inputs.dataset_inputs}
    (world_set,) = (item.dataset for item in run.inputs.dataset_inputs if item.dataset.name == "world")
    assert json.loads(world_set.source)["revision"].removeprefix("sha256:").startswith(world_set.digest)
    tables = {
        name: client.load_table(run.info.experiment_id, f"{name}.json", [run.info.run_id])
        for name in ("questions", "texts", "answers")
    }
    questions, texts = tables["questions"], tables["texts"]
    accuracy = scores.summary["tasks"]["world"]["acc"]
    assert questions[questions.task == "world"].correct.mean() == pytest.approx(accuracy) and len(questions) > 8
    stories = texts[texts.source == "stories"]
    mean = (stories.bits_per_byte * stories.bytes).sum() / stories.bytes.sum()
    assert mean == pytest.approx(scores.summary["text"]["stories"]["bits_per_byte"], rel=1e-6) and math.isfinite(mean)
    assert len(tables["answers"]) == len(scores.summary["samples"])


def test_curves_have_tokens_and_runs_have_names_and_parameters(world: SimpleNamespace, client: MlflowClient) -> None:
    run = built(client, "pretrain")
    lines = [line for line in read_lines(Path(world.first["pretrain"], "metrics.jsonl")) if "loss" in line]
    history = sorted(client.get_metric_history(run.info.run_id, "train/tokens"), key=lambda point: point.step)
    assert [(point.step, point.value) for point in history] == [(line["step"], line["tokens"]) for line in lines]
    place = client.get_experiment_by_name(pinned().name).experiment_id
    names = [found.info.run_name for found in client.search_runs([place])]
    assert len(set(names)) == len(names) - sum("reused" in name for name in names) + len(
        {name for name in names if "reused" in name}
    )
    config = world.store.find("pretrain", Path(world.first["pretrain"]).name).manifest["config"]
    assert run.data.params["optimizer.learning_rate"] == str(config["optimizer"]["learning_rate"])


def test_a_source_leads_to_its_models_and_a_version_to_its_sources(
    world: SimpleNamespace, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    version = client.get_model_version("vectorclm-chat", "1")
    sources = {key: value for key, value in version.tags.items() if key.startswith("source.")}
    assert {"source.stories", "source.lessons", "source.world-chat-messages"} <= set(sources)
    revision = sources["source.world-chat-messages"]
    found = client.search_model_versions(f"tags.`source.world-chat-messages` = '{revision}'")
    assert {(item.name, str(item.version)) for item in found} == {("vectorclm-chat", "1"), ("vectorclm-chat", "2")}
    found = client.search_model_versions(f"tags.`source.stories` = '{sources['source.stories']}'")
    assert {item.name for item in found} == {"vectorclm-base", "vectorclm-chat", "vectorclm-tokenizer"}
    place = client.get_experiment_by_name(pinned().name).experiment_id
    logged = client.search_logged_models([place], f"tags.`source.world-chat-messages` = '{revision}'")
    assert {model.tags["stage"] for model in logged} == {"finetune"}
    for named in ("world-chat-messages", revision, revision.removeprefix("sha256:")[:8]):
        assert main(["lineage", "--uses", named, "--store", world.store.uri, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert {item["model"] for item in told} == {world.first["finetune"], world.second["finetune"]}
        assert {name for item in told for name in item["versions"]} >= {"vectorclm-chat 1 @champion"}
    assert main(["lineage", "--uses", "stories", "--store", world.store.uri]) == 0
    said = capsys.readouterr().out
    assert "vectorclm-base 1" in said and "chat model" in said
    assert main(["lineage", "--uses", "nothing", "--store", world.store.uri]) == 2
    assert "have read" in capsys.readouterr().err


def test_a_version_has_scores_card_and_links(world: SimpleNamespace, client: MlflowClient) -> None:
    version = client.get_model_version("vectorclm-chat", "1")
    summary = world.store.find("evaluate", Path(world.first["evaluate"]).name).summary
    assert float(version.tags["score.acc.world"]) == pytest.approx(summary["tasks"]["world"]["acc"], abs=1e-4)
    assert version.tags["experiment"] == pinned().name and len(version.description) <= 5000
    model_id = version.source.removeprefix("models:/")
    assert json.loads(client.get_logged_model(model_id).tags["mlflow.modelVersions"]) == [
        {"name": "vectorclm-chat", "version": 1}
    ]
    card = Path(mlflow.artifacts.download_artifacts(f"models:/{model_id}"), "README.md").read_text()
    assert "## Lineage" in card and card == Path(world.first["export"], "chat", "README.md").read_text()
    newest = client.get_model_version_by_alias("vectorclm-chat", "candidate").version
    assert str(newest) == str(client.get_model_version_by_alias("vectorclm-chat", pinned().name).version) == "2"


def test_mlflows_pages_open_on_runs_and_link_the_registered_version(
    client: MlflowClient, server: MLflowServer, browser: WebDriver
) -> None:
    place = client.get_experiment_by_name(pinned().name).experiment_id
    browser.get(f"{server.uri}/#/experiments/{place}")
    until(lambda: says(browser, f"{pinned().name} "), "the experiment opens on its runs", 60)
    browser.get(f"{server.uri}/#/models")
    until(lambda: says(browser, "vectorclm-base"), "the registered models", 60)
    for hindrance in ("MLflow Assistant", "collects usage data", "Try it now"):  # of MLflow, until a user asks for it
        assert not says(browser, hindrance)
    run = built(client, "finetune")
    (output,) = run.outputs.model_outputs
    for page in (f"models/{output.model_id}", f"runs/{run.info.run_id}"):
        browser.get(f"{server.uri}/#/experiments/{place}/{page}")
        until(lambda: says(browser, "vectorclm-chat"), f"the registered version on {page}", 60)


def test_deletions_in_mlflow_break_nothing_and_are_reported_once(
    world: SimpleNamespace, client: MlflowClient, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def warnings() -> list[str]:
        found = [item.getMessage() for item in caplog.records if item.name.startswith("flows.tracking")]
        caplog.clear()
        return found

    caplog.set_level(logging.WARNING, "flows.tracking")
    fingerprint = Path(world.first["finetune"]).name
    client.delete_registered_model_alias("vectorclm-chat", "candidate")
    assert main(["lineage", "models:/vectorclm-chat@candidate"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    client.delete_model_version("vectorclm-chat", "1")
    curriculum(pinned(), world.store)
    query = f"name = 'vectorclm-chat' and tags.fingerprint = '{fingerprint}'"
    (version,) = client.search_model_versions(query)
    assert str(version.version) == "3" and not warnings()
    assert str(client.get_model_version_by_alias("vectorclm-chat", "candidate").version) == "3"

    client.delete_logged_model(version.source.removeprefix("models:/"))
    client.delete_experiment(client.get_experiment_by_name(pinned().name).experiment_id)
    assert main(["lineage", "models:/vectorclm-chat/3"]) == 0
    curriculum(pinned(), world.store)
    (warned,) = warnings()
    assert f"was deleted, so this run is recorded in {pinned().name} 2" in warned
    assert mlflow.pyfunc.load_model("models:/vectorclm-chat@candidate").predict(PROMPTS[:1])

    client.delete_registered_model("vectorclm-chat")
    curriculum(pinned(), world.store)
    assert not warnings()
    place = client.get_experiment_by_name(f"{pinned().name} 2").experiment_id
    assert {run.info.status for run in client.search_runs([place])} == {"FINISHED"}
    assert len(client.search_runs([place], "tags.stage = 'curriculum'")) == 2
    capsys.readouterr()
    assert main(["lineage", "models:/vectorclm-chat@candidate", "--verify"]) == 0
    assert "verified" in capsys.readouterr().out
