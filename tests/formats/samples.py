"""Small valid files, and the list of hostile ones."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

from vectorclm.corpus.file_formats import columns_of, read_file_batches, read_rows
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig
from vectorclm.tokenizer import SPECIAL_TOKENS, load_tokenizer, write_tokenizer_config

SHAPE = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
Case = Callable[[Path], Any]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Add a function to the cases, under its name."""
    CASES[function.__name__] = function
    return function


def tokenizer_record() -> dict[str, Any]:
    """The `tokenizer.json` of a byte-level BPE with 300 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "abcdefg" for b in "hijklm"][:39]
    tokens = [*SPECIAL_TOKENS, *letters, *("".join(pair) for pair in pairs)]
    added = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i, t in enumerate(SPECIAL_TOKENS)
    ]
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [list(pair) for pair in pairs]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**token, "special": True} for token in added],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": {**split},
        "model": {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, **model},
    }


def write_model(folder: Path, **config: Any) -> Path:
    """A small model directory; `config` replaces entries of its config.json."""
    torch.manual_seed(0)
    CausalLM(ModelConfig.model_validate({**SHAPE, **HEADS})).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_record()))
    write_tokenizer_config(folder, 32, "<|im_end|>")
    if config:
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**written, **config}))
    return folder


def write_tokenizer(folder: Path, **parts: Any) -> Path:
    """The folder of a tokenizer with other parts."""
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer_record(), **parts}))
    return folder


def write_header(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def rows(file: Path) -> int:
    """Read a data file by all ways of reading; the sum of what is in it."""
    columns_of(file)
    found = sum(len(str(row.get("text"))) for row in read_rows([file], ("text",)))
    return found + sum(len(text or "") for batch in read_file_batches(file, "text", None) for text in batch.texts)


def encoded(folder: Path, text: str = "a" * 40 + "!") -> int:
    """Load a tokenizer, and encode a text and its like."""
    return len(load_tokenizer(folder).encode(text).ids)


DEEP = "[" * 100_000 + "]" * 100_000
