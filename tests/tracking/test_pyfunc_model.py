"""Registered models through `mlflow.pyfunc`: the answers of the model in the store, searched and verified."""

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from flows.tracking.pyfunc_model import TextModel, TokenizerModel, _load_pyfunc, content, find_artifact, texts
from tests.services.curricula import Recorded
from vectorclm.errors import ConfigError, CorruptArtifactError, DataError
from vectorclm.inference.config import SamplingParams
from vectorclm.inference.generate import answer_text, continuation
from vectorclm.inference.load import open_model
from vectorclm.tokenizer import encode, load_tokenizer

PROMPTS = ["Where does the otter live?", "Pim is an"]


@pytest.fixture(autouse=True)
def at_hand(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VECTORCLM_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    mlflow.set_tracking_uri(f"sqlite:///{recorded.store.root}/mlflow.db")


def test_a_registered_model_answers_as_the_one_in_the_store(recorded: Recorded) -> None:
    for name, stage, write in (("chat", "finetune", answer_text), ("base", "pretrain", continuation)):
        loaded = mlflow.pyfunc.load_model(f"models:/vectorclm-{name}@candidate")
        model, tokenizer = open_model(Path(recorded.handles[stage]["uri"]))
        drawn = {"temperature": 1.5, "seed": 7, "max_new_tokens": 9}
        sampling = SamplingParams(temperature=1.5, seed=7)
        expected = [write(model, tokenizer, prompt, 9, sampling) for prompt in PROMPTS]
        assert loaded.predict(PROMPTS, params=drawn) == expected
    ids = mlflow.pyfunc.load_model("models:/vectorclm-tokenizer@candidate").predict(PROMPTS)
    assert ids == [encode(load_tokenizer(Path(recorded.handles["tokenizer"]["uri"])), prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "given",
    [PROMPTS, np.array(PROMPTS), pd.Series(PROMPTS), pd.DataFrame({"prompt": PROMPTS, "other": ["x", "y"]})],
    ids=lambda given: type(given).__name__,
)
def test_texts_are_taken_in_every_form_that_mlflow_passes(given: object) -> None:
    assert texts(given) == PROMPTS and texts(PROMPTS[0]) == PROMPTS[:1]


def reference(recorded: Recorded, folder: Path, stage: str, **changes: str) -> str:
    artifact = recorded.store.find(stage, recorded.handles[stage]["fingerprint"])
    assert artifact is not None
    fields = {"stage": stage, "fingerprint": artifact.fingerprint, "content": content(artifact)}
    (folder / "artifact.json").write_text(json.dumps({**fields, "store": recorded.store.uri, **changes}))
    return str(folder)


def test_a_wrong_question_or_setting_is_told(recorded: Recorded, tmp_path: Path) -> None:
    chat = _load_pyfunc(reference(recorded, tmp_path, "finetune"))
    assert isinstance(chat, TextModel)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        chat.predict(["Who?", " "])
    with pytest.raises(ConfigError, match="temperature"):
        chat.predict(["Who?"], {"temperature": -1.0})
    assert isinstance(_load_pyfunc(reference(recorded, tmp_path, "tokenizer")), TokenizerModel)


def test_the_store_at_hand_is_searched_first_and_another_model_is_refused(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, fingerprint = tmp_path / "moved", recorded.handles["pretrain"]["fingerprint"]
    shutil.copytree(recorded.handles["pretrain"]["uri"], moved / "pretrain" / fingerprint)
    monkeypatch.setenv("VECTORCLM_STORE", str(moved))
    base = _load_pyfunc(reference(recorded, tmp_path, "pretrain"))
    assert isinstance(base, TextModel) and Path(base.loaded.folder) == moved / "pretrain" / fingerprint
    with pytest.raises(CorruptArtifactError, match="is not the model that MLflow recorded"):
        _load_pyfunc(reference(recorded, tmp_path, "pretrain", content="0" * 64))
    wanted = {"stage": "pretrain", "fingerprint": "0" * 64}
    with pytest.raises(DataError, match=r"no store at hand has pretrain/0+: searched .*moved, nosuch://x \(.*; set"):
        find_artifact(wanted, [str(moved), "nosuch://x", str(moved)])
