"""The shapes that an experiment may have are those that the model's consumers open."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig

from tests.conftest import write_tokenizer
from vectorclm.errors import ConfigError
from vectorclm.export.gguf import export_gguf
from vectorclm.export.llama_cpp import LlamaCpp
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig, hugging_face_config
from vectorclm.settings import validate
from vectorclm.store.model_ref import find_model

SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
EXTREMES: list[dict[str, Any]] = [
    {"rope_theta": 1e12},
    {"rope_theta": 1.0},
    {"rms_norm_eps": 1.0},
    {"rms_norm_eps": 1e-30},
]


def test_what_transformers_refuses_is_refused_when_the_experiment_is_read() -> None:
    ours: dict[tuple[int, int], bool] = {}
    theirs: dict[tuple[int, int], bool] = {}
    for hidden in (30, 32, 33, 36, 48, 50):
        for heads in (1, 2, 3, 4, 5, 6, 8):
            changes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": 1}
            shape = hidden, heads
            raw = hugging_face_config(ModelConfig.model_construct(**SHAPE | changes, **_defaults()))
            try:
                LlamaConfig(**raw)
                theirs[shape] = True
            except (StrictDataclassError, ValueError):
                theirs[shape] = False
            try:
                validate(ModelConfig, SHAPE | changes, "here")
                ours[shape] = True
            except ConfigError:
                ours[shape] = False
    assert ours == theirs and not all(ours.values())


def _defaults() -> dict[str, Any]:
    named = {name: field.default for name, field in ModelConfig.model_fields.items() if not field.is_required()}
    return {name: value for name, value in named.items() if name not in SHAPE}


@pytest.mark.parametrize("changes", EXTREMES, ids=str)
def test_the_ends_of_the_bounds_are_opened_by_transformers_and_llama_cpp(
    changes: dict[str, Any], tmp_path: Path, tiny_text: list[str]
) -> None:
    config = ModelConfig(**SHAPE | changes)
    CausalLM(config).save_pretrained(tmp_path / "model")
    written = write_tokenizer(tmp_path, tiny_text, 300, 20_000, 64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((written / name).read_bytes())
    assert AutoConfig.from_pretrained(tmp_path / "model").rms_norm_eps == config.rms_norm_eps
    path = export_gguf(find_model(str(tmp_path / "model")), "f32", tmp_path / "model.gguf")
    field = gguf.GGUFReader(path).fields["llama.attention.layer_norm_rms_epsilon"]
    assert field.contents() == pytest.approx(config.rms_norm_eps, rel=1e-6)
    assert len(LlamaCpp(path).greedy([0, 5, 6], 3)) == 3
