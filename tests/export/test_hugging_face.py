"""The model card: what it states, as the hub's own reader reads it, and without the hub."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from vectorclm.export.hugging_face import model_card
from vectorclm.store.artifact import Artifact, Store

LOST = {"dropped": {"duplicate": 2}, "contaminated": {}}
SUMMARIES: dict[str, dict[str, Any]] = {
    "sample": {"sources": {"stories": {"documents": 1200, "bytes": 400_000}, "web": {"documents": 7, "bytes": 90}}},
    "pretrain": {"parameters": 803_968, "tokens": 1_000_000, "epochs": {"stories": 1.5}},
    "chat_shards": {"sources": {"lessons": {"train": 1500, "shortened": 3, **LOST}}},
}
SOURCES = [{"label": "stories"}, {"label": "web", "revision": "0123456789abcdef0123456789abcdef"}]
LINEAGE = {
    stage: Artifact(Store("unused"), stage, digit * 64, {"summary": SUMMARIES[stage], "config": {"sources": SOURCES}})
    for stage, digit in zip(("sample", "chat_shards", "pretrain"), "abc", strict=True)
}
SCORES = {
    "bits_per_byte": {"stories": 1.23456},
    "tasks": {
        "arc": {"acc": 0.31, "acc_norm": 0.33, "stderr": 0.01, "chance": 0.25, "items": 2376},
        "world": {"acc": 0.5, "stderr": 0.02, "chance": 0.25, "items": 400},
    },
}
CHAT: dict[str, Any] = {
    **SCORES,
    "chat": {"ended": 7, "prompts": 8},
    "instructions": {"followed": {"share": 0.5, "stderr": 0.1, "items": 16}},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shape = {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {**shape, "model_type": "llama", "vocab_size": 4096, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def table(card: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first column has this heading."""
    found = re.search(rf"^\| {heading} \|.*\n\|[-:|]+\|\n((?:\|.*\n)*)", card, re.MULTILINE)
    assert found is not None, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def test_the_card_of_a_chat_model_states_data_scores_and_lineage(model: Path) -> None:
    card = model_card("vectorclm-tiny-chat", "chat", model, CHAT, LINEAGE)
    assert "A decoder of 803,968 parameters (4 layers, hidden size 128, 4 query and 2 key/value heads, " in card
    assert "vocabulary 4,096, up to 512 tokens), instruction-tuned with a loss on the assistant's tokens only." in card
    assert "Pretrained on 1,000,000 tokens." in card
    data, chat = re.findall(r"^\| source \|.*\n\|[-:|]+\|\n((?:\|.*\n)*)", card, re.MULTILINE)
    assert data.splitlines() == [
        "| stories | 1,200 | 400,000 | 1.50 | `None` |",
        "| web | 7 | 90 | 0.00 | `0123456789abcdef012` |",
    ]
    assert chat.startswith("| lessons | 1,500 | 3 | ") and "duplicate" in chat
    assert table(card, "held-out text") == [["stories", "1.2346"]]
    assert table(card, "benchmark") == [
        ["arc", "0.310", "0.330", "0.010", "0.250", "2,376"],
        ["world", "0.500", "", "0.020", "0.250", "400"],
    ]
    assert "7 of 8 held-out prompts are answered to the end of the turn." in card
    assert table(card, "instructions") == [["both", "0.500", "0.100", "16"]]
    assert table(card, "stage") == [[stage, f"`{artifact.fingerprint}`"] for stage, artifact in LINEAGE.items()]
    assert not re.search(r"\n\n\n|[^\n]\n## |\{\{|\{%", card) and card.endswith("|\n")


def test_the_card_of_a_base_model_says_nothing_of_conversations(model: Path) -> None:
    card = model_card("vectorclm-tiny-base", "base", model, SCORES, LINEAGE)
    assert "pretrained on text." in card and "held-out text" in card
    for part in ("Instruction-tuned", "prompts", "| instructions |"):
        assert part not in card
    assert not re.search(r"\n\n\n|[^\n]\n## ", card)


def test_the_hub_reads_the_metadata_and_is_not_asked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the card needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (model / "README.md").write_text(model_card("vectorclm-tiny-chat", "chat", model, CHAT, LINEAGE))
    card = ModelCard.load(model / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["vectorclm", "llama"]
    }  # fmt: skip
    assert card.text.lstrip().startswith("# vectorclm-tiny-chat\n")
