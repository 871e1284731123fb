"""The models as Hugging Face directories, each with a model card that states data, tokens, scores and lineage."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vectorclm.export.model_card import model_card
from vectorclm.formats.json_files import read_table
from vectorclm.store.artifact import Artifact
from vectorclm.tokenizer import (
    BOS_ID,
    EOS,
    EOS_ID,
    IM_END,
    IM_END_ID,
    PAD_ID,
    TRANSFORMERS_TEMPLATE,
    write_tokenizer_config,
)

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)


def write_model_files(tokenizer: Path, model_max_length: int, *, chat: bool, out: Path) -> None:
    """Write the tokenizer and the generation config (the tokens that end a text) beside weights and `config.json`."""
    shutil.copyfile(tokenizer / "tokenizer.json", out / "tokenizer.json")
    write_tokenizer_config(out, model_max_length, eos_token=IM_END if chat else EOS)
    generation = {
        "bos_token_id": BOS_ID,
        "eos_token_id": [IM_END_ID, EOS_ID] if chat else EOS_ID,
        "pad_token_id": PAD_ID,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def adapt_to_consumers(folder: Path, *, chat: bool) -> None:
    """Add to a model directory what programs beside this one read.

    Prompts of different lengths are padded at the left, so that each continues at its end. The inputs of the model are
    named, because transformers 4 otherwise adds one that a Llama refuses. `config.json` names the token that ends a
    turn, and the chat template marks the assistant's tokens. A base model has no chat template.
    """
    tokenizer = read_table(folder / "tokenizer_config.json")
    tokenizer |= {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
    del tokenizer["chat_template"]
    if chat:
        tokenizer["chat_template"] = TRANSFORMERS_TEMPLATE
        config = read_table(folder / "config.json")
        config["eos_token_id"] = IM_END_ID
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n", encoding="utf-8")


def export(name: str, inputs: Mapping[str, Artifact], lineage: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
    """Write `base/`, and `chat/` of a chat model, from the stages in `inputs`; `lineage` has all stages behind them."""
    kinds = {"base": ("pretrain", "evaluate_base"), "chat": ("finetune", "evaluate")}
    kinds = {kind: stages for kind, stages in kinds.items() if stages[0] in inputs}
    for kind, (stage, evaluation) in kinds.items():
        source, folder = inputs[stage].local(), out / kind
        folder.mkdir()
        for file in MODEL_FILES:
            shutil.copyfile(source / file, folder / file)
        adapt_to_consumers(folder, chat=kind == "chat")
        scores = read_table(inputs[evaluation].local() / "scores.json")
        shutil.copyfile(inputs[evaluation].local() / "scores.json", folder / "scores.json")
        card = model_card(name, kind, folder, scores, lineage)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return {kind: kind for kind in kinds}
