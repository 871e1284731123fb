"""The models as Hugging Face directories, each with a model card that states data, tokens, scores and lineage."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vectorclm.corpus.sampler import drop_counts
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
    """Write `base/` and `chat/` from the stages in `inputs`; `lineage` has all stages behind them."""
    for kind, stage, evaluation in (("base", "pretrain", "evaluate_base"), ("chat", "finetune", "evaluate")):
        source, folder = inputs[stage].local(), out / kind
        folder.mkdir()
        for file in MODEL_FILES:
            shutil.copyfile(source / file, folder / file)
        scores = json.loads((inputs[evaluation].local() / "scores.json").read_text(encoding="utf-8"))
        shutil.copyfile(inputs[evaluation].local() / "scores.json", folder / "scores.json")
        card = model_card(f"vectorclm-{name}-{kind}", kind, source, scores, lineage)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return {"base": "base", "chat": "chat"}


def model_card(title: str, kind: str, model: Path, scores: Mapping[str, Any], lineage: Mapping[str, Artifact]) -> str:
    """The README.md of a model directory."""
    config = json.loads((model / "config.json").read_text())
    trained = lineage["pretrain"].summary
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [vectorclm, {config['model_type']}]",
        "---",
        f"# {title}",
        "",
        f"A decoder of {trained['parameters']:,} parameters ({config['num_hidden_layers']} layers, hidden size "
        f"{config['hidden_size']}, {config['num_attention_heads']} query and {config['num_key_value_heads']} key/value "
        f"heads, vocabulary {config['vocab_size']:,}, up to {config['max_position_embeddings']:,} tokens), "
        + (
            "instruction-tuned with a loss on the assistant's tokens only." if kind == "chat" else "pretrained on text."
        ),
        "",
    ]
    lines += [*_data_section(kind, lineage), *_scores_section(scores)]
    lines += ["", "## Lineage", "", "| stage | fingerprint |", "|---|---|"]
    lines += [f"| {stage} | `{artifact.fingerprint}` |" for stage, artifact in lineage.items()]
    return "\n".join(lines) + "\n"


def _data_section(kind: str, lineage: Mapping[str, Artifact]) -> list[str]:
    """The card's section on training data, source by source."""
    trained, sample = lineage["pretrain"].summary, lineage["sample"]
    sources = {source["label"]: source for source in sample.manifest["config"]["sources"]}
    lines = [
        "## Data",
        "",
        f"Pretrained on {trained['tokens']:,} tokens.",
        "",
        "| source | documents sampled | bytes | epochs | revision |",
        "|---|---:|---:|---:|---|",
    ]
    for label, counts in sample.summary["sources"].items():
        revision = str(sources[label].get("revision"))
        epochs = trained["epochs"].get(label, 0.0)
        lines.append(f"| {label} | {counts['documents']:,} | {counts['bytes']:,} | {epochs:.2f} | `{revision[:19]}` |")
    if kind == "chat":
        lines += [
            "",
            "Instruction-tuned on:",
            "",
            "| source | conversations | shortened | dropped |",
            "|---|---:|---:|---|",
        ]
        for label, counts in lineage["chat_shards"].summary["sources"].items():
            lost = drop_counts(counts["dropped"], counts["contaminated"])
            lines.append(f"| {label} | {counts['train']:,} | {counts['shortened']:,} | {lost} |")
    return lines


def _scores_section(scores: Mapping[str, Any]) -> list[str]:
    """The card's section on scores."""
    lines = ["", "## Scores", "", "| held-out text | bits per byte |", "|---|---:|"]
    lines += [f"| {label} | {value:.4f} |" for label, value in scores["bits_per_byte"].items()]
    lines += [
        "",
        "| benchmark | acc | acc_norm | standard error | chance | items |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, score in scores["tasks"].items():
        columns = ("acc", "acc_norm", "stderr", "chance")
        figures = " | ".join(f"{score[key]:.3f}" if key in score else "" for key in columns)
        lines.append(f"| {label} | {figures} | {score['items']:,} |")
    if "chat" in scores:
        counts = scores["chat"]
        lines += [
            "",
            f"{counts['ended']} of {counts['prompts']} held-out prompts are answered to the end of the turn.",
        ]
    if "instructions" in scores:
        lines += ["", "| instructions | share followed | standard error | prompts |", "|---|---:|---:|---:|"]
        for name in PARTS:
            if followed := scores["instructions"].get(name):
                figures = f"{followed['share']:.3f} | {followed['stderr']:.3f} | {followed['items']:,}"
                lines.append(f"| {FOLLOWED[name]} | {figures} |")
    return lines
