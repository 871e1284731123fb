"""The public surface of the library: its names, its types, and the examples of its page."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vectorclm
from tests.conftest import ANSWERS, CLIENTS, publish_shards
from tests.services.clients import node_with
from tests.test_pages import PAGES, ROOT, fenced
from vectorclm.runtime.devices import Runtime
from vectorclm.tokenizer import BOS_ID

EXAMPLES = [block for block in fenced(PAGES["vectorclm/README.md"], "python") if "vectorclm import" in block]


def test_the_public_names_are_there_and_import_torch_only_when_used() -> None:
    code = "import sys, json, vectorclm; dir(vectorclm); print(json.dumps([*sys.modules])); "
    code += "print([getattr(vectorclm, name) for name in vectorclm.__all__])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "pyarrow", "pydantic"} & set(json.loads(done.stdout.splitlines()[0]))
    documented = [name for name in vectorclm.__all__ if (getattr(vectorclm, name).__doc__ or "").strip()]
    assert documented == vectorclm.__all__ == sorted(vectorclm.__all__) and set(vectorclm.__all__) <= set(
        dir(vectorclm)
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vectorclm.nothing  # noqa: B018


def test_a_model_is_loaded_by_name_or_folder_and_generates(
    chat_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_thread = Runtime(threads=1)
    for name in (chat_folder, str(chat_folder)):
        loaded = vectorclm.load(name, runtime=one_thread)
        assert loaded.chat and not loaded.model.training
        assert vectorclm.answer_text(loaded.model, loaded.tokenizer, "Who swims?", 200) == ANSWERS["Who swims?"]
    with pytest.raises(vectorclm.VectorCLMError):
        vectorclm.load("no-such-model", store=str(chat_folder.parent))
    (example,) = (block for block in EXAMPLES if "load(" in block)
    exec(example.replace('load("tiny")', f"load({str(chat_folder)!r})"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_the_examples_train_on_shards_with_another_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    windows = (np.arange(64 * 32).reshape(64, 32) % 40 + 20).astype(np.uint16)
    windows[:, 0] = BOS_ID
    artifact = publish_shards(
        "store", tmp_path / "work", {"a": {"input_ids": windows[:40]}, "b": {"input_ids": windows}}, 4096
    )
    train, attention = (
        next(block for block in EXAMPLES if word in block) for word in ("stream_shards(", "NoPositions(")
    )
    known: dict[str, object] = {}
    exec(train.replace("shards/7fa0", f"shards/{artifact.fingerprint[:6]}"), known)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20 and losses[-1] < losses[0] / 2
    assert len(train.splitlines()) <= 25
    again = vectorclm.CausalLM.from_pretrained("my-model")
    with torch.inference_mode():
        ids = torch.arange(30, 40)[None]
        assert torch.equal(again(ids), known["model"](ids))  # type: ignore[operator]
        exec(attention, known)
        assert known["model"](ids).shape == (1, 10, 4096)  # type: ignore[operator]
        kinds = [type(layer.self_attn).__name__ for layer in known["model"].model.layers]  # type: ignore[attr-defined]
        assert kinds == ["Attention", "NoPositions"] * 2
    with pytest.raises(vectorclm.VectorCLMError, match="has no finished shards/000"):
        vectorclm.stream_shards("shards/000", 8).__enter__()


USER = """
from pathlib import Path
from vectorclm import CausalLM, LoadedModel, SamplingParams, answer_text, load, stream_shards
from vectorclm.runtime.devices import Runtime

loaded: LoadedModel = load("tiny", runtime=Runtime(threads=1))
sampling = SamplingParams(temperature=0.7)
text: str = answer_text(loaded.model, loaded.tokenizer, "?", 40, sampling)
model: CausalLM = CausalLM.from_pretrained("folder")
model.save_pretrained(Path("folder"))
with stream_shards("shards/7fa0", batch_size=8) as dataset:
    for batch in dataset:
        tokens: int = batch.input_ids.shape[1]
"""


SETTINGS = """[mypy]
strict = True
follow_imports = silent
[mypy-torch.*,numpy.*,pyarrow.*,datasets.*,fsspec.*]
follow_imports = skip
"""


@pytest.mark.skipif(not CLIENTS, reason="takes mypy a minute: VECTORCLM_CLIENTS=all")
def test_a_users_file_passes_mypy_and_its_mistakes_do_not(tmp_path: Path) -> None:
    """Strict, without the plugin of this repository; torch, which takes mypy a minute, is left out."""
    (tmp_path / "good.py").write_text(USER)
    (tmp_path / "bad.py").write_text(USER.replace("text: str", "text: int").replace('"folder")', "7)", 1))
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "good.py", "bad.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(re.findall(r"^(\w+)\.py:\d+: error", done.stdout, re.MULTILINE)) == {"bad"}, done.stdout
    assert "Found 2 errors in 1 file" in done.stdout and (ROOT / "vectorclm" / "py.typed").is_file()


@pytest.mark.skipif(not CLIENTS, reason="installs pyright: VECTORCLM_CLIENTS=all")
def test_pyright_accepts_a_users_file_and_the_examples_and_finds_mistakes(tmp_path: Path) -> None:
    """With the editor's own rules; the example of an attention goes on where that of a training ends."""
    load, train, attention = EXAMPLES
    files = {"user": USER, "load": load, "train": train + attention}
    files["bad"] = USER.replace("text: str", "text: int").replace("batch_size=8", "batch=8")
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    found = {"extraPaths": [str(ROOT)], "venvPath": str(Path(sys.prefix).parent), "venv": Path(sys.prefix).name}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"include": ["*.py"], **found}))
    command = [node_with(["pyright"]) / "node_modules" / ".bin" / "pyright", "--outputjson"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)["generalDiagnostics"]
    mistakes = {("bad", "reportAssignmentType"), ("bad", "reportCallIssue")}
    assert {(Path(each["file"]).stem, each["rule"]) for each in told} == mistakes, told
