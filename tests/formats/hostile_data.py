"""Hostile settings, rows, tables and conversations."""

import gzip
import lzma
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from tests.formats.samples import (
    DEEP,
    case,
    rows,
)
from vectorclm.config import load_experiment, load_suite
from vectorclm.lineage.pinning import Lock
from vectorclm.shards.conversations import read_conversation


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
