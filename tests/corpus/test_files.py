"""Local data files: which are read, in which order, and what is said of broken ones."""

import gzip
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.corpus.source_files import source
from vectorclm.corpus import file_formats
from vectorclm.corpus.file_formats import columns_of, read_rows
from vectorclm.corpus.files import find_files, list_folder, revision_of
from vectorclm.corpus.source_reader import read_source
from vectorclm.errors import DataError

ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "é\u2028"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        ("a.jsonl.zst", b"".join(zstandard.compress(line) for line in LINES.splitlines(keepends=True))),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
    ],
)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str, data: bytes) -> None:
    path = write(tmp_path / name, data)
    assert list(read_rows([path], ())) == ROWS
    assert list(read_rows([path], ("b",))) == [{"b": row["b"]} for row in ROWS]
    assert columns_of(path) == ["a", "b"]


def test_json_is_what_python_reads_of_it(tmp_path: Path) -> None:
    odd = [r'"half \ud800 a pair"', "[" * 400 + "]" * 400, f"{9**40}", "-0.0", "1e400", "Infinity"]
    lines = [f'{{"a": 1, "a": {value}}}' for value in odd]
    path = write(tmp_path / "a.jsonl", "\n".join(lines).encode())
    assert repr(list(read_rows([path], ()))) == repr([json.loads(line) for line in lines])


def test_parquet_gives_the_named_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert list(read_rows([path], ())) == ROWS
    assert list(read_rows([path, path], ("b",))) == [{"b": row["b"]} for row in ROWS * 2]


def test_the_split_is_a_word_of_the_name(tmp_path: Path) -> None:
    for name in (
        "train-00000-of-00001.jsonl",
        "smol_test.jsonl",
        "x.valid.jsonl.zst",
        ".train-part.jsonl",
        "train.md",
    ):
        write(tmp_path / name, name.encode())
    found = {split: [path.name for path in find_files(tmp_path, split)] for split in ("train", "test", "validation")}
    assert found == {
        "train": ["train-00000-of-00001.jsonl"],
        "test": ["smol_test.jsonl"],
        "validation": ["x.valid.jsonl.zst"],
    }


def test_a_row_of_the_table_of_formats_is_read_in_folders_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replace(file_formats.JSON, name="made", title="made-up", suffixes=(".made",))
    *tables, text = file_formats.FORMATS
    monkeypatch.setattr(file_formats, "FORMATS", (*tables, made, text))
    path, licence = write(tmp_path / "books" / "a.made", LINES), write(tmp_path / "books" / "licence.txt", b"MIT")
    why = "text beside Parquet, JSON or made-up files"
    assert list_folder(tmp_path / "books", "train") == ([path], {licence: why})
    own = source(path=str(tmp_path), data_dir="books", text_column="b")
    for asked, data in ((own, None), (source(mirror="books", text_column="b"), tmp_path)):
        assert list(read_source(asked, data, None, ("a", "b"))) == ROWS
    path.unlink()
    licence.unlink()
    with pytest.raises(DataError, match="no Parquet, JSON, made-up or text files of this split"):
        list(read_source(own, None, None, ()))


def test_files_without_a_split_are_for_training(tmp_path: Path) -> None:
    path = write(tmp_path / "000_00000.jsonl", LINES)
    assert find_files(tmp_path, "train") == [path]
    assert find_files(tmp_path, "test") == []
    assert find_files(path, "test") == [path]
    assert find_files(tmp_path / "gone", "train") == []


def test_order_and_revision_are_those_of_the_content(tmp_path: Path) -> None:
    contents = [b'{"a": %d}\n' % number for number in range(5)]
    for number, data in enumerate(contents):
        write(tmp_path / "one" / f"{number}.jsonl", data)
        write(tmp_path / "two" / f"{9 - number}-train.jsonl", data)
    one, two = (find_files(tmp_path / name, "train") for name in ("one", "two"))
    assert list(read_rows(one, ())) == list(read_rows(two, ()))
    assert revision_of(one) == revision_of(reversed(two))
    assert revision_of(one) != revision_of(one[1:])
    write(one[0], b'{"a": 77}\n')
    assert revision_of(one) != revision_of(two)


def test_labels_beside_a_file_are_its_label_column(tmp_path: Path) -> None:
    path = write(tmp_path / "piqa.jsonl", LINES)
    alone = revision_of([path])
    labels = write(tmp_path / "piqa-labels.lst", b"1\n0\n")
    assert [row["label"] for row in read_rows([path], ("a", "label"))] == [1, 0]
    assert revision_of([path]) != alone
    write(labels, b"1\n")
    with pytest.raises(DataError, match=r"has 2 rows, but .*piqa-labels\.lst has 1 labels"):
        list(read_rows([path], ()))
    write(labels, b"1\nx\n")
    with pytest.raises(DataError, match="every line must be one number"):
        list(read_rows([path], ()))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "row 2: expected an object of columns, found list"),
        ("a.jsonl", b'{"a": "\xff"}\n', "cut short"),
        ("a.json", b'[{"a": 1}', "line 1"),
        ("a.jsonl.zst", zstandard.compress(LINES * 999)[:-9], "Truncated"),
        ("a.jsonl.gz", gzip.compress(LINES * 999, mtime=0)[:-20], "Truncated"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:4] + LINES, "a.jsonl.zst"),
        ("a.parquet", b"PAR1nothing", "not a Parquet file or is cut short"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000, "line 2: its lists and tables are more than 500 deep"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=message) as raised:
        list(read_rows([path], ("a",)))
    assert str(path) in str(raised.value)


def test_a_large_document_is_read_and_one_that_unpacks_without_end_is_named(tmp_path: Path) -> None:
    packer, megabyte = zstandard.ZstdCompressor(), b"x" * 2**20
    document = b'{"a": "' + megabyte * 48 + b'"}\n'
    path = write(tmp_path / "a.jsonl.zst", packer.compress(LINES + document))
    assert [len(str(row["a"])) for row in read_rows([path], ("a",))] == [1, 1, 48 * 2**20]

    endless = packer.compress(LINES) + packer.compress(megabyte) * 300  # 300 MiB without an end of line, in a few KB
    path = write(tmp_path / "b.jsonl.zst", endless)
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    with pytest.raises(DataError, match=r"b\.jsonl\.zst, line 3: the line has more than 67,108,864 characters"):
        list(read_rows([path], ("a",)))
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()

    array = packer.compress(b"[\n") + packer.compress(b'"' + megabyte + b'",\n') * 65
    path = write(tmp_path / "c.json.zst", array)
    with pytest.raises(DataError, match=r"c\.json\.zst, line 65: the JSON array has more than"):
        list(read_rows([path], ("a",)))


def test_a_page_that_does_not_decode_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [f"{number}" * 50 for number in range(2000)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[200:400] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet"):
        list(read_rows([path], ("a",)))
