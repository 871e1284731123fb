"""Hostile configurations, weights, tokenizers and GGUF files."""

import json
import struct
from pathlib import Path
from typing import Any

import torch

from tests.formats.samples import (
    DEEP,
    HEADS,
    SHAPE,
    case,
    encoded,
    tokenizer_record,
    write_header,
    write_model,
    write_tokenizer,
)
from vectorclm.export.gguf import export_gguf
from vectorclm.export.llama_cpp import LlamaCpp
from vectorclm.inference.load import open_model
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig
from vectorclm.store.model_ref import Model, find_model
from vectorclm.tokenizer import SPECIAL_TOKENS, TRANSFORMERS_TEMPLATE, load_tokenizer


@case
def config_with_rope_scaling_of_text(folder: Path) -> Any:
    return open_model(write_model(folder, rope_scaling="linear"))


@case
def config_of_nested_json(folder: Path) -> Any:
    (write_model(folder) / "config.json").write_text(DEEP)
    return open_model(folder)


@case
def config_with_a_million_positions(folder: Path) -> Any:
    model = write_model(folder, max_position_embeddings=2**20, head_dim=2**15)
    return open_model(model)


@case
def config_with_a_wide_head(folder: Path) -> Any:
    torch.manual_seed(0)
    shape = {**SHAPE, **HEADS, "head_dim": 2**12}
    CausalLM(ModelConfig.model_validate(shape)).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "max_position_embeddings": 2**20}))
    return CausalLM.from_pretrained(folder)


@case
def config_with_an_epsilon_of_1e300(folder: Path) -> Any:
    return open_model(write_model(folder, rms_norm_eps=1e300))


@case
def config_with_a_huge_number(folder: Path) -> Any:
    (write_model(folder) / "config.json").write_text('{"vocab_size": ' + "9" * 10_000 + "}")
    return open_model(folder)


@case
def config_with_positions_of_text(folder: Path) -> Any:
    return open_model(write_model(folder, rope_parameters=["default"], hidden_size="16"))


@case
def tokenizer_config_of_nested_json(folder: Path) -> Any:
    (write_model(folder) / "tokenizer_config.json").write_text(DEEP)
    return find_model(str(folder))


@case
def weights_with_200_000_names(folder: Path) -> Any:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_header(write_model(folder) / "model.safetensors", {f"model.layers.{n}": entry for n in range(200_000)})
    return open_model(folder)


@case
def weights_with_a_header_of_100_megabytes(folder: Path) -> Any:
    write_header(write_model(folder) / "model.safetensors", b"{" + b" " * 99_000_000 + b"}")
    return open_model(folder)


@case
def weights_with_a_header_of_2_to_the_63(folder: Path) -> Any:
    write_header(write_model(folder) / "model.safetensors", {}, length=2**63)
    return open_model(folder)


@case
def weights_with_a_huge_shape(folder: Path) -> Any:
    entry = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}
    write_header(write_model(folder) / "model.safetensors", {"model.norm.weight": entry}, b"1234")
    return open_model(folder)


@case
def weights_with_many_dimensions(folder: Path) -> Any:
    entry = {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}
    write_header(write_model(folder) / "model.safetensors", {"model.norm.weight": entry}, b"1234" * 5000)
    return open_model(folder)


@case
def weights_that_overlap(folder: Path) -> Any:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write_header(write_model(folder) / "model.safetensors", {"a": entry, "b": entry}, b"1234")
    return open_model(folder)


@case
def weights_of_whole_numbers(folder: Path) -> Any:
    from safetensors.torch import load_file, save_file

    file = write_model(folder) / "model.safetensors"
    save_file({name: value.to(torch.int8) for name, value in load_file(file).items()}, file)
    return open_model(folder)


@case
def weights_of_nested_json(folder: Path) -> Any:
    write_header(write_model(folder) / "model.safetensors", DEEP.encode())
    return open_model(folder)


def split_by(pattern: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


@case
def tokenizer_with_a_slow_pattern(folder: Path) -> Any:
    return encoded(write_tokenizer(folder, pre_tokenizer=split_by({"Regex": "(a+)+$"})))


@case
def tokenizer_that_replaces_by_a_slow_pattern(folder: Path) -> Any:
    replace = {"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": "b"}
    return encoded(write_tokenizer(folder, normalizer=replace), "a" * 60 + "!")


@case
def tokenizer_that_grows_a_text(folder: Path) -> Any:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    return encoded(write_tokenizer(folder, normalizer={"type": "Sequence", "normalizers": [step] * 4}), "a" * 10)


@case
def tokenizer_with_a_charsmap(folder: Path) -> Any:
    return encoded(write_tokenizer(folder, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}))


@case
def tokenizer_without_an_unknown_token(folder: Path) -> Any:
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    return encoded(write_tokenizer(folder, model={"type": "WordLevel", "vocab": vocab, "unk_token": "no"}))


@case
def tokenizer_of_a_unigram(folder: Path) -> Any:
    vocab = [[token, -1.0] for token in SPECIAL_TOKENS]
    return encoded(write_tokenizer(folder, model={"type": "Unigram", "vocab": vocab, "unk_id": None}), "é")


@case
def tokenizer_with_a_prefix(folder: Path) -> Any:
    model = tokenizer_record()["model"] | {"continuing_subword_prefix": "€€€€"}
    return encoded(write_tokenizer(folder, model=model))


@case
def tokenizer_of_nested_json(folder: Path) -> Any:
    (folder / "tokenizer.json").write_text(DEEP)
    return encoded(folder)


@case
def tokenizer_with_an_id_of_2_to_the_31(folder: Path) -> Any:
    record = tokenizer_record()
    record["model"]["vocab"]["x" * 5] = 2**31
    return encoded(write_tokenizer(folder, model=record["model"]))


@case
def tokenizer_with_a_gap(folder: Path) -> Any:
    from vectorclm.tokenizer import token_lengths

    record = tokenizer_record()
    record["model"]["vocab"]["xxxxx"] = 1000
    return token_lengths(load_tokenizer(write_tokenizer(folder, model=record["model"])))


@case
def tokenizer_that_pads(folder: Path) -> Any:
    padding = {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 4}
    return encoded(write_tokenizer(folder, padding={**padding, "pad_type_id": 0, "pad_token": "<|pad|>"}))


@case
def gguf_of_huge_arrays(folder: Path) -> Any:
    key = b"llama.x"
    field = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 2**40)
    (folder / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + b"\0" * 100)
    return LlamaCpp(folder / "a.gguf")


@case
def gguf_of_many_empty_texts(folder: Path) -> Any:
    key = b"llama.x"
    field = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 4_000_000)
    (folder / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + b"\0" * 32_000_000)
    return LlamaCpp(folder / "a.gguf")


@case
def gguf_whose_template_loops(folder: Path) -> Any:
    write_model(folder)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loop)
    file = export_gguf(Model(str(folder), "0" * 64, True), "f32", folder / "a.gguf")
    return len(LlamaCpp(file).prompt([{"role": "user", "content": "a"}]))


@case
def template_of_transformers(folder: Path) -> Any:
    write_model(folder)
    (folder / "chat_template.jinja").write_text(TRANSFORMERS_TEMPLATE)
    return export_gguf(Model(str(folder), "0" * 64, True), "f32", folder / "a.gguf").stat().st_size
