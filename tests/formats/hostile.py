"""Hostile files, one function each: it writes its file and hands it to the loader that the commands use.

`python -m tests.formats.hostile FOLDER` prints what became of each, as a table.
"""

import gzip
import json
import lzma
import os
import resource
import select
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from tokenizers import pre_tokenizers

from vectorclm.comparison.curves import curves_of
from vectorclm.config import load_experiment, load_suite
from vectorclm.corpus.file_formats import columns_of, read_file_batches, read_rows
from vectorclm.errors import VectorCLMError
from vectorclm.evaluation.item_scores import read_scored
from vectorclm.export.gguf import export_gguf
from vectorclm.export.llama_cpp import LlamaCpp
from vectorclm.inference.load import open_model
from vectorclm.inference.openai_format import json_object
from vectorclm.lineage.chain import lineage
from vectorclm.lineage.pinning import Lock
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig
from vectorclm.shards.conversations import read_conversation
from vectorclm.store.artifact import StageSpec, Store
from vectorclm.store.manifest import sealed
from vectorclm.store.model_ref import Model, find_model
from vectorclm.tokenizer import SPECIAL_TOKENS, TRANSFORMERS_TEMPLATE, load_tokenizer, write_tokenizer_config
from vectorclm.training.checkpoint import Checkpoints

MEMORY, SECONDS = 2 * 2**30, 20.0  # of one case, beyond what the libraries take
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


@case
def experiment_of_nested_json(folder: Path) -> Any:
    (folder / "a.json").write_text('{"name": ' + DEEP + "}")
    return load_experiment(str(folder / "a.json"))


@case
def experiment_of_nested_toml(folder: Path) -> Any:
    (folder / "a.toml").write_text(f"name = {DEEP}")
    return load_experiment(str(folder / "a.toml"))


@case
def experiment_of_a_deep_key(folder: Path) -> Any:
    (folder / "a.toml").write_text(".".join(["a"] * 100_000) + " = 1")
    return load_experiment(str(folder / "a.toml"))


@case
def experiment_of_tables_in_tables(folder: Path) -> Any:
    (folder / "a.toml").write_text("".join("[" + ".".join(["a"] * n) + "]\n" for n in range(1, 4000)))
    return load_experiment(str(folder / "a.toml"))


@case
def experiment_that_is_a_list(folder: Path) -> Any:
    (folder / "a.json").write_text("[1, 2]")
    return load_experiment(str(folder / "a.json"))


@case
def experiment_with_half_a_surrogate(folder: Path) -> Any:
    (folder / "a.json").write_text('{"name": "\\ud800"}')
    return load_experiment(str(folder / "a.json"))


@case
def experiment_with_nul_in_its_name(folder: Path) -> Any:
    return load_experiment(f"{folder}/a\0.toml")


@case
def suite_that_is_a_number(folder: Path) -> Any:
    (folder / "a.json").write_text("7")
    return load_suite(str(folder / "a.json"))


@case
def suite_with_tasks_of_wrong_types(folder: Path) -> Any:
    (folder / "a.json").write_text('{"name": "a", "tasks": [[1], "x", {"label": {}}], "sample": 3}')
    return load_suite(str(folder / "a.json"))


@case
def lock_of_nested_json(folder: Path) -> Any:
    (folder / "a.lock").write_text(DEEP)
    return Lock(folder / "a.lock")


@case
def lock_that_is_a_number(folder: Path) -> Any:
    (folder / "a.lock").write_text("[[1, [2]]]")
    return Lock(folder / "a.lock")


@case
def rows_of_nested_json(folder: Path) -> Any:
    (folder / "a.jsonl").write_text('{"text": ' + DEEP + "}\n")
    return rows(folder / "a.jsonl")


@case
def rows_of_many_values(folder: Path) -> Any:
    (folder / "a.jsonl").write_text('{"text": [' + "[]," * 20_000_000 + "[]]}\n")
    return rows(folder / "a.jsonl")


@case
def rows_of_a_gzip_bomb(folder: Path) -> Any:
    with gzip.open(folder / "a.txt.gz", "wb", 9) as file:
        for _ in range(2048):
            file.write(b"a" * 2**20)
    return rows(folder / "a.txt.gz")


@case
def rows_of_an_xz_bomb(folder: Path) -> Any:
    with lzma.open(folder / "a.jsonl.xz", "wb", preset=1) as file:
        for _ in range(2048):
            file.write(b" " * 2**20)
    return rows(folder / "a.jsonl.xz")


@case
def rows_of_a_zstd_bomb(folder: Path) -> Any:
    with zstandard.open(folder / "a.txt.zst", "wb") as file:
        for _ in range(256):
            file.write(b"\n" * 2**20)
    return rows(folder / "a.txt.zst")


@case
def rows_of_an_xz_dictionary(folder: Path) -> Any:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**20}]
    data = bytearray(lzma.compress(b'{"text": "a"}\n', filters=filters, check=lzma.CHECK_NONE))
    data[16] = 40  # the property of LZMA2: a dictionary of 4 GiB
    import zlib

    data[20:24] = struct.pack("<I", zlib.crc32(bytes(data[12:20])))
    (folder / "a.jsonl.xz").write_bytes(bytes(data))
    return rows(folder / "a.jsonl.xz")


@case
def parquet_of_a_dictionary(folder: Path) -> Any:
    text = pa.array(["a" * 4_000_000]).dictionary_encode()
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), text.dictionary)
    pq.write_table(
        pa.table({"text": column}),
        folder / "a.parquet",
        compression="zstd",
        dictionary_pagesize_limit=2**26,
        store_schema=False,
    )
    return rows(folder / "a.parquet")


@case
def parquet_of_a_page_bomb(folder: Path) -> Any:
    table = pa.table({"text": ["a" * 400_000_000]})
    pq.write_table(table, folder / "a.parquet", compression="zstd", use_dictionary=False, write_statistics=False)
    del table
    return rows(folder / "a.parquet")


@case
def parquet_of_many_columns(folder: Path) -> Any:
    pq.write_table(pa.table({f"c{n}": pa.array([1]) for n in range(50_000)}), folder / "a.parquet")
    return rows(folder / "a.parquet")


@case
def parquet_of_numbers(folder: Path) -> Any:
    pq.write_table(pa.table({"text": [[1], [2]]}), folder / "a.parquet")
    return rows(folder / "a.parquet")


@case
def parquet_without_the_column(folder: Path) -> Any:
    pq.write_table(pa.table({"other": [1, 2]}), folder / "a.parquet")
    return rows(folder / "a.parquet")


@case
def chat_turns_of_a_wide_table(folder: Path) -> Any:
    return read_conversation({"role": ["user"] * 10, "content": [None] * 10_000_000}, "row 1")


@case
def chat_turns_of_wrong_types(folder: Path) -> Any:
    return read_conversation([{"role": ["user"], "content": {"a": 1}}], "row 1")


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
def manifest_of_nested_json(folder: Path) -> Any:
    return look_up(folder, DEEP.encode())


@case
def manifest_that_is_a_list(folder: Path) -> Any:
    return look_up(folder, b"[]")


@case
def manifest_with_nul_in_a_name(folder: Path) -> Any:
    files = {"a\0b": {"bytes": 1, "sha256": "0" * 64}}
    return look_up(folder, sealed({"files": files, "inputs": {}})).verify()


@case
def manifest_with_half_a_surrogate(folder: Path) -> Any:
    text = '{"files": {"\\ud800": {"bytes": 1, "sha256": "' + "0" * 64 + '"}}, "inputs": {}}'
    return look_up(folder, text.encode()).verify()


@case
def manifest_with_a_size_of_text(folder: Path) -> Any:
    files = {"a": {"bytes": True, "sha256": "x"}, "b": {"bytes": -1, "sha256": "0" * 64}}
    return look_up(folder, sealed({"files": files, "inputs": []})).verify()


def look_up(folder: Path, data: bytes) -> Any:
    place = folder / "tokenizer" / ("0" * 64)
    place.mkdir(parents=True)
    (place / "manifest.json").write_bytes(data)
    return Store(str(folder)).look_up("tokenizer", "0" * 64)


@case
def manifests_in_a_chain_of_2_000(folder: Path) -> Any:
    for number in range(2000):
        inputs = {"sample": f"{number + 1:064}"} if number < 1999 else {}
        place = folder / "sample" / f"{number:064}"
        place.mkdir(parents=True)
        head = {"stage": "sample", "fingerprint": f"{number:064}", "format_version": 1, "files": {}, "inputs": inputs}
        more = {"config": {"sources": []}, "summary": {"sources": {}}, "environment": {}, "created": "2026"}
        (place / "manifest.json").write_bytes(sealed({**head, **more}))
    return lineage(str(folder / "sample" / f"{0:064}"), Store(str(folder)))


@case
def address_with_nul(folder: Path) -> Any:
    return find_model(f"{folder}/a\0b")


@case
def address_with_half_a_surrogate(folder: Path) -> Any:
    return find_model("s3://x\ud800/finetune/" + "0" * 64)


@case
def address_of_a_store_with_half_a_surrogate(folder: Path) -> Any:
    return Store(f"{folder}/\ud800x").look_up("finetune", "0" * 64)


@case
def items_of_wrong_types(folder: Path) -> Any:
    pq.write_table(pa.table({"task": [1], "item": [2], "log_likelihoods": ["x"]}), folder / "items.parquet")
    pq.write_table(pa.table({"source": [None]}), folder / "texts.parquet")
    return read_scored(folder)


@case
def items_that_are_no_parquet(folder: Path) -> Any:
    (folder / "items.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    return read_scored(folder)


@case
def checkpoint_of_wrong_types(folder: Path) -> Any:
    store, spec = Store(str(folder)), StageSpec("pretrain", 1, {}, {})
    work = folder / "new"
    work.mkdir()
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write_header(work / "model.safetensors", {"a": entry}, b"1234")
    write_header(work / "optim.safetensors", {"not.a.number.at.all": entry}, b"1234")
    (work / "metrics.jsonl").write_text("[1]\nnull\n")
    head = {"step": "first", "order": "o", "data": "d"}
    store.publish_directory(f"checkpoints/{spec.fingerprint}/step-00000001-00000000", work, head)
    with Checkpoints(store, spec, folder / "work", "d") as found:
        saved = found.latest("o")
    if saved is not None:
        from vectorclm.training.checkpoint import restore

        restore(saved, torch.nn.Linear(1, 1), [])
    return saved


@case
def curves_of_wrong_types(folder: Path) -> Any:
    store, spec = Store(str(folder)), StageSpec("pretrain", 1, {}, {})
    work = folder / "new"
    work.mkdir()
    found = store.publish(spec, work, {})
    (folder / "curves").mkdir()
    pq.write_table(pa.table({"stage": [[1]], "step": ["x"]}), folder / "curves" / "a-0.parquet")
    return curves_of(found)


@case
def report_of_nested_metrics(folder: Path) -> Any:
    from flows.reports.report import lines_of

    store, spec = Store(str(folder)), StageSpec("pretrain", 1, {}, {})
    work = folder / "new"
    work.mkdir()
    (work / "metrics.jsonl").write_text(DEEP + "\n")
    return lines_of(store.publish(spec, work, {}))


@case
def report_of_cut_metrics(folder: Path) -> Any:
    from flows.reports.report import lines_of

    store, spec = Store(str(folder)), StageSpec("pretrain", 1, {}, {})
    work = folder / "new"
    work.mkdir()
    (work / "metrics.jsonl").write_text('{"step": 1\n3\n')
    return lines_of(store.publish(spec, work, {}))


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


@case
def request_of_nested_json(folder: Path) -> Any:
    return json_object(DEEP.encode())


@case
def request_with_half_a_surrogate(folder: Path) -> Any:
    return json_object(b'{"a": "\xff"}')


def outcome(name: str, folder: Path) -> tuple[str, float]:
    """What becomes of a case in a child with its limits: `typed …`, `value …`, `untyped …` or how it ended; seconds."""
    read, write = os.pipe()
    began = time.monotonic()
    if (child := os.fork()) == 0:
        os.setpgid(0, 0)
        os.dup2(write, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        said = "ended"
        try:
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            said = f"value {CASES[name](folder)!r:.60}"
        except VectorCLMError as error:
            said = f"typed {type(error).__name__}: {error}"
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            said = f"untyped {kinds[0]}: {error!r:.80}"
            if "Refusal" in kinds:
                said = f"typed Refusal: {error}"
        os.write(1, said.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(write)
    said, whole = b"", False
    while not whole and (left := SECONDS - (time.monotonic() - began)) > 0:
        if select.select([read], [], [], left)[0]:
            whole = not (part := os.read(read, 4096))
            said += part
    seconds = time.monotonic() - began
    if not whole:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(read)
    if not whole:
        return "hangs", seconds
    if os.WIFSIGNALED(status):
        return f"dies by signal {os.WTERMSIG(status)}", seconds
    return said.decode(), seconds


def main() -> None:
    """Print the table of all cases, or of those named after the folder."""
    root = Path(sys.argv[1])
    for name in sys.argv[2:] or CASES:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        said, seconds = outcome(name, root)
        sys.stdout.write(f"{name} | {seconds:.1f} s | {said[:150]!r}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
