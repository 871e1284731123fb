"""Text of one's own: plain text, compressed files, sub-folders, addresses, and paths relative to the experiment."""

import bz2
import codecs
import gzip
import json
import lzma
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.corpus.source_files import source
from vectorclm.config import load_experiment
from vectorclm.corpus.file_formats import columns_of, format_of, read_file_batches, read_rows
from vectorclm.corpus.files import list_folder
from vectorclm.corpus.source_reader import read_batches, read_source
from vectorclm.corpus.sources import TextSource, left_out
from vectorclm.errors import DataError

TEXT = "One.\nStill one.\n\n\n  \nTwo: é\u2028 and more.\n"
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def texts(asked: TextSource) -> list[str]:
    """The documents of a source, by both ways of reading."""
    rows = [row[asked.text_column] for row in read_source(asked, None, None, asked.columns())]
    batches = [text for batch in read_batches(asked, None, None, 1) for text in batch.texts]
    assert [text.decode() if isinstance(text, bytes) else text for text in batches] == rows
    return rows


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_text_file_is_a_document_or_its_parts_are(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"a.txt{suffix}", PACKERS[suffix](TEXT.encode()))
    asked = source(path="text", data_files=str(file))
    assert texts(asked) == [TEXT]
    assert texts(asked.model_copy(update={"text_column": "part"})) == ["One.\nStill one.\n", "Two: é\u2028 and more.\n"]
    assert columns_of(file) == ["text", "part", "page"]
    rows = write(tmp_path / f"b.jsonl{suffix}", PACKERS[suffix](b'{"text": "x"}\n{"more": 1, "text": "y"}\n'))
    assert texts(source(path="json", data_files=str(rows))) == ["x", "y"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_that_is_cut_short_is_named(tmp_path: Path, suffix: str) -> None:
    data = PACKERS[suffix](json.dumps({"text": "".join(map(str, range(9999)))}).encode())
    file = write(tmp_path / f"a.jsonl{suffix}", data[:-20])
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl"):
        list(read_rows([file], ("text",)))


def test_the_content_decides_the_format(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.pq")
    pq.write_table(pa.table({"text": ["y"]}), tmp_path / "b")
    write(tmp_path / "c", b'  \n{"text": "z"}\n')
    write(tmp_path / "d.log", TEXT)
    write(tmp_path / "e.JSONL", gzip.compress(b'{"text": "packed"}'))
    found = {name: format_of(tmp_path / name).name for name in ("a.pq", "b", "c", "d.log", "e.JSONL")}
    assert found == {"a.pq": "parquet", "b": "parquet", "c": "json", "d.log": "text", "e.JSONL": "json"}
    assert [row["text"] for row in read_rows([tmp_path / name for name in "bc"], ("text",))] == ["y", "z"]
    assert texts(source(path=str(tmp_path / "a.pq"))) == ["x"]
    write(tmp_path / "t.csv", b"text\nx\n")
    with pytest.raises(DataError, match=r"t\.csv is a table of separated values, which is not read: convert"):
        texts(source(path=str(tmp_path / "t.csv")))
    with pytest.raises(DataError, match=r'd\.log is not json: did you mean path = "text"'):
        texts(source(path="json", data_files=str(tmp_path / "d.log")))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", codecs.BOM_UTF8 + b'{"text": "x"}\n')
    array = write(tmp_path / "a.json", codecs.BOM_UTF8 + b'[{"text": "x"}]')
    plain = write(tmp_path / "a.txt", codecs.BOM_UTF8 + b"x")
    assert [row["text"] for row in read_rows([lines, array, plain], ("text",))] == ["x"] * 3
    settings = write(tmp_path / "own.toml", codecs.BOM_UTF8 + load_experiment("tiny")[1].read_bytes())
    assert load_experiment(str(settings))[0] == load_experiment("tiny")[0]


def test_a_column_that_the_first_row_lacks_is_known(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"id": 1}\n{"id": 2, "text": "x"}\n')
    assert columns_of(file) == ["id", "text"]
    assert texts(source(path="json", data_files=str(file))) == [None, "x"]


def test_a_zstd_window_beyond_the_reader_is_named(tmp_path: Path) -> None:
    options = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    file = write(tmp_path / "a.jsonl.zst", packer.compress(b'{"text": "x"}\n') + packer.flush())
    with pytest.raises(DataError, match="window above 128 MiB; compress it again"):
        list(read_file_batches(file, "text", None))


def test_folders_within_folders_are_read_and_the_rest_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "deep/er/b.jsonl", "deep/c.jsonl.xz"):
        packed = PACKERS[".xz" if name.endswith(".xz") else ""]
        write(tmp_path / "own" / name, packed(json.dumps({"text": name}).encode()))
    write(tmp_path / "own/.hidden.jsonl", "no")
    write(tmp_path / "own/LICENSE.txt", "no")
    write(tmp_path / "own/deep/scan.pdf", "no")
    (tmp_path / "own/again").symlink_to(tmp_path / "own/deep")
    asked = source(path=str(tmp_path / "own"))
    assert sorted(texts(asked)) == ["a.jsonl", "deep/c.jsonl.xz", "deep/er/b.jsonl"]
    said = left_out(asked, None)
    assert said is not None
    for part in ("LICENSE.txt (text beside", "deep/scan.pdf (its format is not read)", "again (a link to a folder)"):
        assert part in said
    assert "hidden" not in said


def test_names_that_state_a_split_are_named_where_others_do_not(tmp_path: Path) -> None:
    for name in ("books", "train-manuals", "dev-blog"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": name}))
    asked = source(path=str(tmp_path))
    assert texts(asked) == ["train-manuals"]
    said = left_out(asked, None)
    assert said is not None and "books.jsonl (other names state a split, and this one does not)" in said
    (tmp_path / "books.jsonl").unlink()
    assert left_out(asked, None) is None  # every name states its split
    for split in ("train", "test"):
        write(tmp_path / "clone/data" / f"{split}-00000-of-00001.jsonl", json.dumps({"text": split}))
        write(tmp_path / "folders" / split / "x.txt", split)
    for folder in ("clone", "folders"):
        assert texts(source(path=str(tmp_path / folder))) == ["train"]
        assert texts(source(path=str(tmp_path / folder), split="test")) == ["test"]
    assert list_folder(tmp_path / "nowhere", "train").read == []


def test_paths_are_relative_to_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir("/")
    for place in ("files/a.txt", "home/b.txt", "texts/c.txt", "texts/d.txt"):
        write(tmp_path / place, place)
    values = json.loads(load_experiment("tiny")[0].model_dump_json(exclude_none=True))
    named: list[dict[str, Any]] = [
        {"path": "text", "data_files": "../files/*.txt"},
        {"path": "text", "data_files": ["~/b.txt", "../texts/c.txt"]},
        {"path": "text", "data_dir": "../texts"},
        {"path": "../texts", "data_files": "d.txt"},
        {"path": "~"},
    ]
    values["sample"]["sources"] = [{"label": f"s{i}", "weight": 1, **item} for i, item in enumerate(named)]
    values["pretrain"]["phases"] = [{"tokens": 10_000}]
    experiment, _ = load_experiment(str(write(tmp_path / "here/own.json", json.dumps(values))))
    found = [sorted(texts(item)) for item in experiment.sample.sources]
    assert found == [
        ["files/a.txt"],
        ["home/b.txt", "texts/c.txt"],
        ["texts/c.txt", "texts/d.txt"],
        ["texts/d.txt"],
        ["home/b.txt"],
    ]
    values["sample"]["sources"] = [{"label": "x", "weight": 1, "path": "json", "data_files": "five.jsonl"}]
    experiment, _ = load_experiment(str(write(tmp_path / "here/own.json", json.dumps(values))))
    with pytest.raises(DataError, match=f"no such file: {tmp_path}/here/five.jsonl"):
        texts(experiment.sample.sources[0])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server of the folder `web`."""
    (tmp_path / "web").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "web"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_files_of_the_web_are_read(tmp_path: Path, cache: Path, web: str) -> None:
    write(tmp_path / "web/a.jsonl.gz", gzip.compress(b'{"text": "far"}'))
    assert texts(source(path="json", data_files=f"{web}/a.jsonl.gz")) == ["far"]
    with pytest.raises(DataError, match=rf"source books .*no files at {web}/b\.jsonl"):
        texts(source(path="json", data_files=f"{web}/b.jsonl"))


def test_folders_and_patterns_at_addresses_are_read_again_after_a_change(cache: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name in ("a", "deep/b"):
        fs.pipe(f"/own-files/{name}.txt", name.encode())
    assert sorted(texts(source(path="memory://own-files"))) == ["a", "deep/b"]
    assert texts(source(path="text", data_files="memory://own-files/*.txt")) == ["a"]
    assert texts(source(path="text", data_files="memory://own-files/deep/b.txt")) == ["deep/b"]
    fs.pipe("/own-files/a.txt", b"changed")
    assert texts(source(path="text", data_files="memory://own-files/*.txt")) == ["changed"]
    with pytest.raises(DataError, match="use a local path, or one of s3://"):
        texts(source(path="text", data_files="ftp://somewhere/a.txt"))


def test_text_in_a_bucket_is_read(s3: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in s3.environment().items():
        monkeypatch.setenv(key, value)
    fs, _ = fsspec.core.url_to_fs(f"s3://{s3.bucket}", skip_instance_cache=True)
    fs.pipe(f"{s3.bucket}/own-text/a.txt", b"in a bucket")
    assert texts(source(path=f"s3://{s3.bucket}/own-text")) == ["in a bucket"]
    assert texts(source(path="text", data_files=f"s3://{s3.bucket}/own-text/a.txt")) == ["in a bucket"]
