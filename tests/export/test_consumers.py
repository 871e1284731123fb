"""Programs that open an exported folder, each in an environment of its own: VECTORCLM_CLIENTS=all.

The oldest and the newest release of transformers are those that the page names.
"""

import re
from pathlib import Path

import pytest
import torch

from tests.conftest import ANSWERS, CLIENTS
from tests.export.test_hugging_face import exported
from tests.services.clients import python_with, run_client
from tests.test_pages import PAGES
from vectorclm.model import CausalLM
from vectorclm.shards.conversations import Turn, render
from vectorclm.tokenizer import load_tokenizer

SCRIPTS = Path(__file__).parent / "clients"
NAMED = re.findall(r"^\| transformers \| ([\d.]+) and ([\d.]+) \|", PAGES["vectorclm/export/README.md"], re.MULTILINE)
pytestmark = pytest.mark.skipif(not CLIENTS, reason="installs other programs: VECTORCLM_CLIENTS=all")
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "warning"}


@pytest.fixture(scope="module")
def folder(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(chat_folder, tmp_path_factory.mktemp("exported") / "model")


@pytest.mark.parametrize("age", [0, 1])
def test_transformers_answers_in_batches_and_masks(folder: Path, age: int, tmp_path: Path) -> None:
    python = python_with([f"transformers=={NAMED[0][age]}.*"])
    first, second, batched, mask = run_client([python, SCRIPTS / "with_transformers.py", folder], OFFLINE, tmp_path)[
        -4:
    ]
    assert first == second == batched == ANSWERS["Who swims?"]
    turns = [Turn("user", "Who swims?"), Turn("assistant", ANSWERS["Who swims?"])]
    _, supervised = render(load_tokenizer(folder), turns)
    assert [one == "1" for one in mask] == supervised


@pytest.mark.parametrize("age", [0, 1])
def test_trl_trains_on_the_assistants_tokens_and_peft_merges_its_step(folder: Path, age: int, tmp_path: Path) -> None:
    packages = [["trl==0.24.*", "peft==0.18.*"], ["trl", "peft"]][age]
    python = python_with([f"transformers=={NAMED[0][age]}.*", *packages])
    command = [python, SCRIPTS / "with_trl.py", folder, tmp_path / "merged"]
    before, after, is_ours = run_client(command, OFFLINE, tmp_path)[-3:]
    assert float(after) < float(before) and is_ours == "True"
    merged = CausalLM.from_pretrained(tmp_path / "merged")  # LoRA's product is in the weights
    original = CausalLM.from_pretrained(folder)
    assert not torch.equal(
        merged.model.layers[0].self_attn.qkv_proj.weight, original.model.layers[0].self_attn.qkv_proj.weight
    )  # type: ignore[union-attr, arg-type]


def test_onnx_computes_the_same_logits(folder: Path, tmp_path: Path) -> None:
    python = python_with(["onnx", "onnxruntime", "onnxscript"])
    worst = run_client([python, SCRIPTS / "with_onnx.py", folder, tmp_path / "model.onnx"], OFFLINE, tmp_path)[-1]
    assert float(worst) < 1e-4


def test_llama_cpp_python_answers(folder: Path, tmp_path: Path) -> None:
    from vectorclm.export.gguf import export_gguf
    from vectorclm.store.model_ref import find_model

    python = python_with(["llama-cpp-python"])
    file = export_gguf(find_model(str(folder)), "f32", tmp_path / "otter.gguf")
    (answer,) = run_client([python, SCRIPTS / "with_llama_cpp.py", file], OFFLINE, tmp_path)
    assert answer == ANSWERS["Who swims?"]
