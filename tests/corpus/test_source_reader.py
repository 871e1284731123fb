"""Rows of sources: from any place, by column name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.corpus.source_files import documents, source, write_parquet
from vectorclm.corpus.source_reader import draw, open_source, read_source
from vectorclm.corpus.synthetic_world import WorldConfig
from vectorclm.errors import ConfigError, DataError


def test_a_mirror_is_read_by_column_name_whatever_the_order(tmp_path: Path) -> None:
    rows = [{"text": "one", "n": 1}, {"n": 2, "text": "two"}, {"n": 3}]
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stream = open_source(source(), tmp_path, None, ["text"])
    assert [row["text"] for row in draw(source(), stream)] == ["one", "two", None]
    assert list(open_source(source(), tmp_path, None, []))[1] == rows[1]


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({}, "books/data.parquet"),
        ({"name": "novels"}, "books/novels/data.parquet"),
        ({"mirror": "elsewhere/old"}, "elsewhere/old/data.parquet"),
        ({"mirror": "elsewhere/one.parquet"}, "elsewhere/one.parquet"),
        ({"mirror": "[odd] *name"}, "[odd] *name/train-00000-of-00001.parquet"),
    ],
)
def test_where_a_mirror_keeps_a_source(tmp_path: Path, values: dict[str, str], place: str) -> None:
    write_parquet(tmp_path / place, ["here"])
    asked = source(**values)
    assert [row["text"] for row in draw(asked, open_source(asked, tmp_path, None, ["text"]))] == ["here"]


def test_local_sources_without_a_mirror(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "folder" / "a.parquet", ["here"])
    for asked in (source(path="parquet", data_files=str(path)), source(path=str(tmp_path / "folder"))):
        assert list(open_source(asked, None, None, ["text"])) == [{"text": "here"}]


def test_a_folder_gives_the_files_that_data_files_names(tmp_path: Path) -> None:
    for name in ("a", "b", "inner/c"):
        write_parquet(tmp_path / "own" / f"{name}.parquet", [name])

    def texts(**values: Any) -> list[str]:
        asked = source(path=str(tmp_path / "own"), **values)
        found = [row["text"] for row in open_source(asked, None, None, ["text"])]
        assert found == [row["text"] for row in read_source(asked, None, None, ["text"])]
        return found

    assert sorted(texts()) == ["a", "b", "inner/c"]
    assert texts(data_files="a.parquet") == ["a"]
    assert texts(data_files=["b.parquet", "inner/c.parquet"]) == ["b", "inner/c"]
    assert texts(data_dir="inner", data_files="c.parquet") == ["inner/c"]
    with pytest.raises(DataError, match=r"no such file: .*own/d\.parquet"):
        texts(data_files="d.parquet")


def test_patterns_in_data_files_are_expanded(tmp_path: Path) -> None:
    for name in ("a", "b", "inner/c", "[odd]*"):
        write_parquet(tmp_path / f"[x]/{name}.parquet", [name])
    folder = tmp_path / "[x]"

    def texts(pattern: str, **values: Any) -> list[str]:
        asked = source(**{"path": str(folder), "data_files": pattern, **values})
        return sorted(row["text"] for row in open_source(asked, None, None, ["text"]))

    assert texts("*.parquet") == texts("*.parquet", path="parquet", data_dir=str(folder)) == ["[odd]*", "a", "b"]
    assert texts("**/[a-c].parquet", split="test") == ["a", "b", "inner/c"]
    assert texts("[odd]*.parquet") == ["[odd]*"]
    assert texts(str(tmp_path / "?x?" / "inner" / "*"), path="parquet") == ["inner/c"]
    with pytest.raises(DataError, match=r"no such file: .*\*\.jsonl"):
        texts("*.jsonl")


def test_the_world_is_a_source() -> None:
    asked = source(path="world", name="stories")
    stream = open_source(asked, None, WorldConfig(seed=1), ["text"])
    row = next(draw(asked, stream))
    assert list(row) == ["text"] and row["text"]
    with pytest.raises(ConfigError, match=r"no \[world\]"):
        open_source(asked, None, None, ["text"])


def test_a_missing_column_is_named_before_any_row_is_drawn(tmp_path: Path) -> None:
    write_parquet(tmp_path / "books" / "a.parquet", ["x"], column="body")
    with pytest.raises(DataError, match=r"source books .*a\.parquet: no column 'text'; it has n, body"):
        open_source(source(), tmp_path, None, ["text"])
    with pytest.raises(DataError, match=r"no column 'txt'; it has .*text"):
        open_source(source(path="world", name="stories"), None, WorldConfig(seed=1), ["txt"])


def test_empty_missing_and_broken_sources_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source books .*no Parquet, JSON or text files of this split at .*books"):
        open_source(source(), tmp_path, None, ["text"])
    with pytest.raises(DataError, match=f"no such file: {Path.cwd()}/gone\\.parquet"):
        open_source(source(path="parquet", data_files="gone.parquet"), None, None, ["text"])
    path = write_parquet(tmp_path / "books" / "a.parquet", [])
    with pytest.raises(DataError, match=r"source books .* is empty: .*a\.parquet"):
        open_source(source(), tmp_path, None, ["text"])
    write_parquet(path, documents(100))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet.*cut short"):
        open_source(source(), tmp_path, None, ["text"])


def test_content_is_held_to_its_pin(tmp_path: Path) -> None:
    write_parquet(tmp_path / "books" / "a.parquet", ["x"])
    pinned = source(revision="sha256:" + "0" * 64)
    with pytest.raises(DataError, match=r"is pinned to sha256:0+, but .*books holds sha256:"):
        open_source(pinned, tmp_path, None, ["text"])
    with pytest.raises(DataError, match="give the folder that holds it with --data DIR"):
        open_source(pinned, None, None, ["text"])


def test_a_column_that_holds_no_text_is_told_before_any_row_is_drawn(tmp_path: Path) -> None:
    write_parquet(tmp_path / "books" / "a.parquet", documents(3))
    with pytest.raises(DataError, match=r"books .*a\.parquet: column 'n' is int64, not text: set text_column"):
        open_source(source(text_column="n"), tmp_path, None, ["n"])


CHECKED = """
import sys
from pathlib import Path
from vectorclm.config import load_experiment
from vectorclm.lineage.pinning import check_sources, pin

experiment, _ = load_experiment("tiny")
check_sources(pin(experiment, Path(sys.argv[1]), None, resolve=True)[0], None, hub=True)
assert not {"torch", "datasets", "pandas"} & set(sys.modules), "a person waits for them"
"""


def test_sources_of_this_machine_are_checked_without_what_takes_seconds_to_import(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHECKED, str(tmp_path / "tiny.toml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
