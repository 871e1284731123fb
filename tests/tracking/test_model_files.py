"""The files of a logged model: signature, example, tokenizer, and a reference in place of the weights."""

import json
from pathlib import Path

import pytest
from mlflow.models import Model

from flows.tracking.model_files import EXAMPLE, loading_lines, write_model_files
from flows.tracking.pyfunc_model import MAX_NEW_TOKENS, REFERENCE, content
from tests.services.curricula import Recorded
from tests.tracking.conftest import client
from vectorclm.lineage.chain import SHORT
from vectorclm.store.artifact import Artifact, Store


def artifact(recorded: Recorded, stage: str) -> Artifact:
    found = recorded.store.find(stage, recorded.handles[stage]["fingerprint"])
    assert found is not None
    return found


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain", "finetune"])
def test_a_model_is_described_and_its_weights_stay_in_the_store(recorded: Recorded, tmp_path: Path, stage: str) -> None:
    found, built = client(recorded.store), artifact(recorded, stage)
    place = found.get_experiment_by_name("mini").experiment_id
    (logged,) = found.search_logged_models([place], f"tags.stage = '{stage}'")
    write_model_files(tmp_path, logged, built)
    model = Model.load(tmp_path / "model")
    assert model.model_id == logged.model_id and model.metadata["fingerprint"] == built.fingerprint
    (reference,) = (tmp_path / "model").rglob(REFERENCE)
    assert json.loads(reference.read_text()) == {
        "stage": stage, "fingerprint": built.fingerprint, "content": content(built), "store": recorded.store.uri
    }  # fmt: skip
    names = {path.name for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert "model.safetensors" not in names and not any(name.endswith((".pkl", ".bin")) for name in names)
    kept = tmp_path / "model" / "components" / "tokenizer" / "tokenizer.json"
    assert kept.read_bytes() == built.read("tokenizer.json")
    assert ("transformers" in model.flavors) == (stage != "tokenizer")
    params = model.signature.params
    if stage == "tokenizer":
        assert params is None and "Array(long)" in str(model.signature.outputs)
    else:
        defaults = {param.name: param.default for param in params.params}
        assert defaults["max_new_tokens"] == MAX_NEW_TOKENS and defaults["seed"] == 0 and "temperature" in defaults
        assert model.flavors["transformers"]["source_model_name"] == built.uri


def test_a_version_says_how_it_is_loaded(recorded: Recorded) -> None:
    chat = artifact(recorded, "finetune")
    lines = loading_lines("vectorclm-chat", "3", chat).splitlines()
    assert lines[1] == f'mlflow.pyfunc.load_model("models:/vectorclm-chat/3").predict(["{EXAMPLE[0]}"])'
    assert lines[2] == 'mlflow.transformers.load_model("models:/vectorclm-chat/3")'
    assert f"finetune/{chat.fingerprint[:SHORT]}" in lines[-3]
    assert max(map(len, lines)) <= 100 + len(chat.store.uri)  # else the page scrolls sideways
    remote = Artifact(Store("memory://models"), "finetune", chat.fingerprint, chat.manifest)
    assert (
        'load_model("models:/vectorclm-chat/3")' not in loading_lines("vectorclm-chat", "3", remote).split("\n", 2)[2]
    )
    assert len(loading_lines("vectorclm-tokenizer", "1", artifact(recorded, "tokenizer")).splitlines()) == 3
