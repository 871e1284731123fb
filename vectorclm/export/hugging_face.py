"""The models as Hugging Face directories, each with a model card that states data, tokens, scores and lineage."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vectorclm.corpus.summary import drop_counts
from vectorclm.evaluation.instruction_checks import FOLLOWED, PARTS
from vectorclm.store.artifact import Artifact
from vectorclm.tokenizer import BOS_ID, EOS, EOS_ID, IM_END, IM_END_ID, PAD_ID, write_tokenizer_config

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


def export(name: str, inputs: Mapping[str, Artifact], lineage: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
    """Write `base/`, and `chat/` of a chat model, from the stages in `inputs`; `lineage` has all stages behind them."""
    kinds = {"base": ("pretrain", "evaluate_base"), "chat": ("finetune", "evaluate")}
    kinds = {kind: stages for kind, stages in kinds.items() if stages[0] in inputs}
    for kind, (stage, evaluation) in kinds.items():
        source, folder = inputs[stage].local(), out / kind
        folder.mkdir()
        for file in MODEL_FILES:
            shutil.copyfile(source / file, folder / file)
        scores = json.loads((inputs[evaluation].local() / "scores.json").read_text(encoding="utf-8"))
        shutil.copyfile(inputs[evaluation].local() / "scores.json", folder / "scores.json")
        card = model_card(f"vectorclm-{name}-{kind}", kind, source, scores, lineage)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return {kind: kind for kind in kinds}


def model_card(title: str, kind: str, model: Path, scores: Mapping[str, Any], lineage: Mapping[str, Artifact]) -> str:
    """The README.md of a model directory: metadata of the Hugging Face hub, data, scores and lineage."""
    from huggingface_hub import ModelCard, ModelCardData  # takes longer to import than most commands run

    sample, config = lineage["sample"], json.loads((model / "config.json").read_text())
    tags = ["vectorclm", config["model_type"]]
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags),
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),
        title=title,
        config=config,
        trained=lineage["pretrain"].summary,
        documents=sample.summary["sources"],
        revisions={source["label"]: source.get("revision") for source in sample.manifest["config"]["sources"]},
        conversations=lineage["chat_shards"].summary["sources"] if kind == "chat" else None,
        scores=scores,
        parts=PARTS,
        followed_names=FOLLOWED,
        drop_counts=drop_counts,
        lineage=lineage,
    )
    return str(card)
