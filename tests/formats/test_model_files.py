"""Weights, configurations, tokenizers, templates and GGUF files with faults: a value or one typed error."""

import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from tests.formats.mutations import TEXTS, damaged_bytes, damaged_trees, fuzzed
from tests.formats.samples import tokenizer_record, write_header, write_model
from vectorclm.errors import DataError, VectorCLMError
from vectorclm.formats import gguf_files, json_files, tensors
from vectorclm.formats.gguf_files import read_gguf_fields
from vectorclm.formats.templates import read_template, render
from vectorclm.formats.tensors import check_tensors, load_tensors
from vectorclm.formats.tokenizer_files import PATTERNS, load_tokenizer_file, read_tokenizer_record
from vectorclm.inference.load import open_model
from vectorclm.model import CausalLM
from vectorclm.model_config import read_model_config
from vectorclm.store.model_ref import find_model
from vectorclm.tokenizer import CHAT_TEMPLATE, load_tokenizer

PLACE = Path(tempfile.mkdtemp(prefix="formats-"))
MODEL = write_model(PLACE / "model")
CONFIG = json.loads((MODEL / "config.json").read_text())
WEIGHTS = (MODEL / "model.safetensors").read_bytes()
LENGTH = struct.unpack("<Q", WEIGHTS[:8])[0]
TENSOR_HEADER = json.loads(WEIGHTS[8 : 8 + LENGTH])
SMALL = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.int64)}, {"format": "pt"})


def teardown_module() -> None:
    shutil.rmtree(PLACE)


@fuzzed(st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 3), max_size=3), max_size=4), 0.5)
def test_tensors_that_are_written_are_read(shapes: dict[str, list[int]]) -> None:
    shapes = {name: shape for name, shape in shapes.items() if name.isprintable() and name != tensors.METADATA}
    (PLACE / "a.safetensors").write_bytes(save({name: torch.ones(shape) for name, shape in shapes.items()}))
    assert {name: list(value.shape) for name, value in load_tensors(PLACE / "a.safetensors").items()} == shapes


@fuzzed(damaged_bytes(SMALL))
def test_damaged_tensors(data: bytes) -> None:
    (PLACE / "b.safetensors").write_bytes(data)
    try:
        assert sum(value.nbytes for value in load_tensors(PLACE / "b.safetensors").values()) <= len(data)
    except DataError as error:
        assert len(str(error)) < 1000


@fuzzed(damaged_trees(TENSOR_HEADER))
def test_headers_of_other_types(header: Any) -> None:
    write_header(PLACE / "c.safetensors", header, WEIGHTS[8 + LENGTH :])
    try:
        load_tensors(PLACE / "c.safetensors", floats=True)
    except DataError as error:
        assert len(str(error)) < 1000


@fuzzed(damaged_trees(CONFIG))
def test_configurations_of_other_types(raw: Any) -> None:
    (MODEL / "config.json").write_text(json.dumps(raw))
    try:
        CausalLM.from_pretrained(MODEL)
    except VectorCLMError as error:
        assert len(str(error)) < 10_000
    finally:
        (MODEL / "config.json").write_text(json.dumps(CONFIG))


RECORD = tokenizer_record()
ONE = {"type": "NFC"}
KINDS = ("NFD", "NFKC", "Lowercase", "Strip", "StripAccents", "Nmt", "BertNormalizer", "ByteLevel", "Precompiled", "No")
REPLACE = [
    {"type": "Replace", "pattern": pattern, "content": content}
    for pattern in ({"String": "a"}, {"Regex": "a+"}, {"String": ""}, {})
    for content in ("b", "b" * 1000, 7)
]
SPLITS = [
    *(
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
        for one in sorted(PATTERNS)
    ),
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": True},
    *({"type": kind} for kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts", "Delimiter")),
    {"type": "Digits", "individual_digits": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
]
PIECE = {"Sequence": {"id": "A", "type_id": 0}}
TEMPLATE = {"type": "TemplateProcessing", "single": [PIECE], "pair": [PIECE, {"Sequence": {"id": "B", "type_id": 1}}]}
PARTS = {
    "normalizer": [
        ONE,
        {"type": "Sequence", "normalizers": [ONE, ONE]},
        *({"type": kind} for kind in KINDS),
        *REPLACE,
        {"type": "Prepend", "prepend": "a"},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]},
    ],
    "pre_tokenizer": [*SPLITS, {"type": "Sequence", "pretokenizers": SPLITS[:3]}],
    "post_processor": [TEMPLATE | {"special_tokens": {}}, {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}],
    "decoder": [{"type": "Fuse"}, {"type": "Strip", "content": "a", "start": 2**60, "stop": 1}, *REPLACE],
}


@fuzzed(
    st.sampled_from(sorted(PARTS))
    .flatmap(lambda p: st.tuples(st.just(p), st.sampled_from(PARTS[p])))
    .flatmap(
        lambda pair: st.tuples(
            st.sampled_from([RECORD, RECORD | {pair[0]: pair[1]}]).flatmap(damaged_trees)
            | st.just(RECORD | {pair[0]: pair[1]}),
            TEXTS,
        )
    ),
    2,
)
def test_tokenizers_of_other_types(drawn: tuple[Any, str]) -> None:
    record, text = drawn
    (PLACE / "tokenizer.json").write_text(json.dumps(record))
    try:
        tokenizer = load_tokenizer(PLACE)
    except DataError as error:
        assert len(str(error)) < 2000
        return
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert all(0 <= i < 2**21 for i in ids)
    tokenizer.decode(ids)


@fuzzed(damaged_bytes(json.dumps(RECORD, ensure_ascii=False).encode()))
def test_damaged_tokenizers(data: bytes) -> None:
    (PLACE / "tokenizer.json").write_bytes(data)
    try:
        load_tokenizer(PLACE).encode("a bc")
    except DataError as error:
        assert len(str(error)) < 2000


@fuzzed(damaged_bytes((MODEL / "tokenizer_config.json").read_bytes()), 0.5)
def test_damaged_settings_of_tokenizers(data: bytes) -> None:
    before = (MODEL / "tokenizer_config.json").read_bytes()
    (MODEL / "tokenizer_config.json").write_bytes(data)
    try:
        find_model(str(MODEL))
    except DataError:
        pass
    finally:
        (MODEL / "tokenizer_config.json").write_bytes(before)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


GGUF = b"".join(
    [
        b"GGUF" + struct.pack("<IQQ", 3, 1, 5),
        *(text("llama.context_length"), struct.pack("<II", 4, 32)),
        *(text("llama.vocab_size"), struct.pack("<II", 4, 300)),
        *(text("tokenizer.chat_template"), struct.pack("<I", 8), text("{{ a }}")),
        *(text("tokens"), struct.pack("<IIQ", 9, 8, 2), text("a"), text("bc")),
        *(text("scores"), struct.pack("<IIQff", 9, 6, 2, 0.5, 0.5)),
        *(text("a.weight"), struct.pack("<IQIQ", 1, 4, 0, 0), b"\0" * 64),
    ]
)


@fuzzed(damaged_bytes(GGUF))
def test_damaged_gguf(data: bytes) -> None:
    (PLACE / "a.gguf").write_bytes(data)
    try:
        assert all(isinstance(name, str) for name in read_gguf_fields(PLACE / "a.gguf"))
    except DataError as error:
        assert len(str(error)) < 1000


def test_a_whole_gguf_is_read() -> None:
    (PLACE / "a.gguf").write_bytes(GGUF)
    found = read_gguf_fields(PLACE / "a.gguf")
    assert found["llama.context_length"] == 32 and found["tokens"] is None
    for at, value, message in ((4, 9, "begin with"), (8, 2**40, "tensors"), (16, 2**40, "fields")):
        made = bytearray(GGUF)
        made[at : at + (4 if at == 4 else 8)] = value.to_bytes(4 if at == 4 else 8, "little")
        (PLACE / "a.gguf").write_bytes(made)
        with pytest.raises(DataError, match=message):
            read_gguf_fields(PLACE / "a.gguf")
    for old, new, message in (
        (struct.pack("<IQIQ", 1, 4, 0, 0), struct.pack("<IQIQ", 1, 2**40, 0, 0), "larger than the file"),
        (struct.pack("<IQIQ", 1, 4, 0, 0), struct.pack("<IQIQ", 99, 4, 0, 0), "99 dimensions"),
        (struct.pack("<IIQ", 9, 8, 2), struct.pack("<IIQ", 9, 77, 2), "unknown type 77"),
        (text("llama.vocab_size"), text("llama.context_length"), "twice"),
    ):
        (PLACE / "a.gguf").write_bytes(GGUF.replace(old, new))
        with pytest.raises(DataError, match=message):
            read_gguf_fields(PLACE / "a.gguf")
    for place in (PLACE / "none.gguf", PLACE):
        with pytest.raises(DataError, match="is not a GGUF file"):
            read_gguf_fields(place)
    assert gguf_files.GGUF_ARRAY >= 2**20


def test_a_template_has_a_budget() -> None:
    messages = [{"role": "user", "content": "Who?"}]
    said = render(CHAT_TEMPLATE, messages, "x")
    assert said == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    for template, message in (
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2 seconds"),
        ("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "writes more than"),
        ("{% set n = namespace(x='aaaaaaaa') %}{% for a in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "MiB"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{% if %}", "TemplateSyntaxError"),
        ("x" * 70_000, "more than 65,536 characters"),
    ):
        with pytest.raises(DataError, match=message):
            render(template, messages, "x")
    (PLACE / "a.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not a chat template"):
        read_template(PLACE / "a.jinja")


def test_a_whole_model_is_read() -> None:
    model, tokenizer = open_model(MODEL)
    assert model.config.vocab_size == tokenizer.get_vocab_size() == 300
    assert read_tokenizer_record(MODEL / "tokenizer.json") == RECORD
    assert load_tokenizer_file(MODEL / "tokenizer.json").encode("ah").ids == [RECORD["model"]["vocab"]["ah"]]
    assert read_model_config(CONFIG, "x").head_dim == 8
    assert set(check_tensors(MODEL / "model.safetensors")) == set(TENSOR_HEADER) - {tensors.METADATA}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "no model"),
        ({"model": RECORD["model"] | {"vocab": []}}, "no table of tokens"),
        ({"model": RECORD["model"] | {"merges": {}}}, "model.merges"),
        ({"model": RECORD["model"] | {"merges": [["a"]]}}, "no pair"),
        ({"model": RECORD["model"] | {"merges": ["a zz"]}}, "no tokens"),
        ({"model": RECORD["model"] | {"unk_token": "zz"}}, "unk_token"),
        ({"model": RECORD["model"] | {"dropout": 7.0}}, "is not a tokenizer"),
        ({"added_tokens": {}}, "no list"),
        ({"added_tokens": [1]}, "no table"),
        ({"added_tokens": [{"content": "", "id": 1}]}, "is empty"),
        ({"added_tokens": [{"content": "zz", "id": 1}]}, "same id"),
        ({"normalizer": {"type": "Sequence", "normalizers": [ONE, ONE]}}, "twice"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence"}]}}, "Sequence in a Sequence"),
        ({"normalizer": {"type": "Sequence", "normalizers": [ONE] * 17}}, "no list of 16"),
        ({"normalizer": [1]}, "no type"),
    ],
)
def test_a_part_of_a_tokenizer_that_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    (PLACE / "tokenizer.json").write_text(json.dumps(RECORD | change))
    with pytest.raises(DataError, match=message):
        load_tokenizer(PLACE)


def test_the_limits_of_tensors_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    file = MODEL / "model.safetensors"
    for name, value, message in (("TENSORS", 3, "3 at most"), ("TENSOR_HEADER", 50, "of 50 at most")):
        with monkeypatch.context() as patch:
            patch.setattr(tensors, name, value)
            with pytest.raises(DataError, match=message):
                check_tensors(file)
    write_header(PLACE / "d.safetensors", {"__metadata__": {"a": 1}})
    with pytest.raises(DataError, match="other values than texts"):
        check_tensors(PLACE / "d.safetensors")
    (PLACE / "d.safetensors").write_bytes(b"1234")
    with pytest.raises(DataError, match="too short"):
        check_tensors(PLACE / "d.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(json_files, "SETTINGS_BYTES", 10)
        with pytest.raises(DataError, match="more than 10 bytes"):
            json_files.read_settings(MODEL / "config.json")
