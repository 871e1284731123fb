"""Rows, documents and conversations from damaged files: a value or one typed error, within memory and time."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import strategies as st

from tests.formats.mutations import TEXTS, damaged_bytes, damaged_trees, fuzzed
from vectorclm.corpus.file_formats import columns_of, read_file_batches, read_rows
from vectorclm.errors import DataError
from vectorclm.evaluation.item_scores import ITEMS, ITEMS_SCHEMA, TEXTS_SCHEMA, read_scored
from vectorclm.evaluation.item_scores import TEXTS as TEXTS_FILE
from vectorclm.formats import limits, parquet, thrift
from vectorclm.shards.conversations import MalformedConversationError, Turn, read_conversation

PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
ROWS = [{"text": "One.\nTwo: é", "n": 1, "more": {"a": [1, None]}}, {"text": None}, {"text": "x\u2028" * 40}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PLACE = Path(tempfile.mkdtemp(prefix="formats-"))


def teardown_module() -> None:
    shutil.rmtree(PLACE)


def read_all(file: Path, columns: tuple[str, ...] = ("text",)) -> list[Any]:
    """All rows of a file, after it was read by batches, too."""
    columns_of(file)
    for batch in read_file_batches(file, columns[0], None):
        assert batch.rows >= len(batch.texts)
    return [row.get(columns[0]) for row in read_rows([file], columns)]


def allowed(file: Path, columns: tuple[str, ...] = ("text",)) -> None:
    """Reading a file ends in values or in a DataError of a line or two."""
    try:
        read_all(file, columns)
    except DataError as error:
        assert str(error) and len(str(error)) < 3000


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


@fuzzed(st.tuples(st.sampled_from(sorted(PACKERS)), st.lists(TEXTS, min_size=1, max_size=5)))
def test_rows_that_are_written_are_read(drawn: tuple[str, list[str]]) -> None:
    suffix, texts = drawn
    file = PLACE / f"a.jsonl{suffix}"
    file.write_bytes(PACKERS[suffix]("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    assert read_all(file) == texts


@fuzzed(st.sampled_from(sorted(PACKERS)).flatmap(lambda s: st.tuples(st.just(s), damaged_bytes(PACKERS[s](JSONL)))), 2)
def test_damaged_rows(drawn: tuple[str, bytes]) -> None:
    (PLACE / f"b.jsonl{drawn[0]}").write_bytes(drawn[1])
    allowed(PLACE / f"b.jsonl{drawn[0]}")


@fuzzed(damaged_trees(ROWS))
def test_rows_of_other_types(rows: Any) -> None:
    text = json.dumps(rows)
    (PLACE / "c.json").write_text(text)
    allowed(PLACE / "c.json")


@fuzzed(
    st.tuples(st.sampled_from(sorted(PACKERS)), st.sampled_from(["text", "part", "page"])).flatmap(
        lambda s: st.tuples(st.just(s), damaged_bytes(PACKERS[s[0]](b" = A = \n\nOne.\n\n = B = \nTwo \xc3\xa9\n")))
    )
)
def test_damaged_documents(drawn: tuple[tuple[str, str], bytes]) -> None:
    (suffix, column), data = drawn
    (PLACE / f"d.txt{suffix}").write_bytes(data)
    allowed(PLACE / f"d.txt{suffix}", (column,))


TABLE = pa.table(
    {"text": ["One", None, "é" * 50, "One"], "n": [1, 2, 3, 4], "turns": [[{"role": "user", "content": "a"}]] * 4}
)
PARQUETS = [
    parquet_bytes(TABLE, compression=c, data_page_version=v) for c in ("zstd", "snappy", "none") for v in ("1.0", "2.0")
]


@fuzzed(
    st.lists(st.none() | TEXTS, max_size=20).flatmap(
        lambda t: st.tuples(st.just(t), st.sampled_from(["zstd", "snappy", "gzip"]))
    )
)
def test_tables_that_are_written_are_read(drawn: tuple[list[str | None], str]) -> None:
    texts, compression = drawn
    table = pa.table({"text": pa.array(texts, pa.string())})
    (PLACE / "e.parquet").write_bytes(parquet_bytes(table, compression=compression, row_group_size=7))
    assert read_all(PLACE / "e.parquet") == texts


@fuzzed(st.sampled_from(PARQUETS).flatmap(damaged_bytes), 2)
def test_damaged_tables(data: bytes) -> None:
    (PLACE / "f.parquet").write_bytes(data)
    allowed(PLACE / "f.parquet")
    with contextlib.suppress(DataError):
        list(read_rows([PLACE / "f.parquet"], ()))


HEADER = bytes.fromhex(
    "1500151e15222c15041510150615061c180802000000000000001808010000000000000016002808020000000000000018080100000000000000000000"
)


@fuzzed(damaged_bytes(HEADER), 2)
def test_damaged_headers_of_pages(data: bytes) -> None:
    try:
        length, unpacked, packed = thrift.page_header(data)
        assert length <= len(data) and unpacked >= 0 and packed >= 0
    except (ValueError, IndexError):
        pass


ITEM = {
    "task": "a",
    "part": None,
    "number": 0,
    "item": "0",
    "correct": True,
    "correct_norm": None,
    "log_likelihoods": [0.5],
}
TEXT = {"source": "a", "number": 0, "item": "0", "nats": 1.0, "bytes": 4}


@fuzzed(damaged_trees([[ITEM, ITEM], [TEXT]]))
def test_scores_of_other_types(tables: Any) -> None:
    for rows, name, schema in zip(tables, (ITEMS, TEXTS_FILE), (ITEMS_SCHEMA, TEXTS_SCHEMA), strict=False):
        for wanted in (schema, None):  # Arrow may refuse to write such rows with the schema, or at all
            with contextlib.suppress(Exception):
                pq.write_table(pa.Table.from_pylist(rows, wanted), PLACE / name)
                break
    with contextlib.suppress(DataError):
        assert all(isinstance(name, str) for name in read_scored(PLACE))


SCHEMAS = [
    [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ],  # SmolTalk, Tulu
    [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}],  # SlimOrca
    [{"role": "user", "content": [{"type": "text", "text": "b"}]}, {"role": "assistant", "content": "c"}],  # OpenAI
    {"role": ["user", "assistant"], "content": ["b", "c"]},  # `datasets`
]


@fuzzed(st.sampled_from(range(4)).flatmap(lambda n: st.tuples(st.just(n), TEXTS)))
def test_conversations_in_all_schemas_are_read(drawn: tuple[int, str]) -> None:
    number, text = drawn
    said = json.loads(json.dumps(SCHEMAS[number]).replace('"b"', json.dumps(text)))
    assert Turn("user", text) in read_conversation(said, "row 1")


@fuzzed(st.sampled_from(SCHEMAS).flatmap(damaged_trees), 2)
def test_conversations_of_other_types(turns: Any) -> None:
    try:
        for turn in read_conversation(turns, "row 1"):
            assert isinstance(turn, Turn) and turn.content.encode() is not None
    except MalformedConversationError as error:
        assert len(str(error)) < 500


def test_the_limits_of_tables_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    data = parquet_bytes(pa.table({"text": ["a" * 1000] * 50, "n": range(50)}), row_group_size=5, compression="zstd")
    schema = pa.schema([("text", pa.string())])
    assert parquet.read_small_table(data, schema, ("text",), "x").num_rows == 50
    for name, value, message in (
        ("PAGE_BYTES", 900, "unpacks to"),
        ("PARQUET_COLUMNS", 1, "2 columns in 10 row groups"),
        ("PARQUET_ROW_GROUPS", 9, "2 columns in 10 row groups"),
        ("PARQUET_FOOTER", 100, "its footer claims"),
        ("TABLE_BYTES", 10_000, "more than 10,000 bytes"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(parquet, name, value)
            with pytest.raises(DataError, match=message):
                parquet.read_small_table(data, schema, ("text",), "x")
    with pytest.raises(DataError, match="has no column 'b'"):
        parquet.read_small_table(data, pa.schema([("b", pa.string())]), ("b",), "x")
    holed = parquet_bytes(pa.table({"text": ["a", None]}))
    with pytest.raises(DataError, match="empty places"):
        parquet.read_small_table(holed, schema, ("text",), "x")
    assert limits.PAGE_BYTES > 2**28


def test_a_batch_of_large_rows_comes_in_pieces() -> None:
    data = parquet_bytes(pa.table({"text": ["a" * 2**20] * 200}), compression="zstd")
    sizes = [batch.num_rows for batch in parquet.batches(data, ("text",), "x")]
    assert sum(sizes) == 200 and max(sizes) <= 64
