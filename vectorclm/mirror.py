"""Local data files: which of a folder's files hold a split, what they contain, and their rows.

Neither the names of the files nor where they lie may change a result, so their SHA-256 orders them.
"""

import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from vectorclm.errors import DataError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".json", ".json.zst", ".json.gz")

# The words by which `datasets` tells the split of a file from its name, and the split they stand for.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


def find_files(place: Path, split: str) -> list[Path]:
    """The data files of `split` at `place`, in the order of their content.

    `place` is a folder or one file. In a folder the split is a word of the file's name, as in
    `test-00000-of-00002.parquet`; where no name says any, all are `train`. A single file is taken whatever
    the split. Empty where there are none.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        return []
    files = [path for path in place.iterdir() if path.is_file() and path.name.endswith(SUFFIXES)]
    files = [path for path in files if not path.name.startswith(".")]
    splits = {path: _split_in(path.name) for path in files}
    if any(splits.values()):
        files = [path for path in files if splits[path] == SPLIT_WORDS.get(split, split)]
    elif split != "train":
        files = []
    return sorted(files, key=content_hash)


def _split_in(name: str) -> str | None:
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def content_hash(path: Path) -> str:
    """SHA-256 of a data file (and of the labels beside it). Raises DataError where it cannot be read."""
    try:
        own = _sha256(path, *_identity(path))
        labels = labels_of(path)
        return own if labels is None else _joined([own, _sha256(labels, *_identity(labels))])
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def revision_of(files: Iterable[Path]) -> str:
    """`sha256:` of the files' content, whatever they are called and in whatever order they come."""
    return "sha256:" + _joined(sorted(content_hash(path) for path in files))


def labels_of(path: Path) -> Path | None:
    """The answers beside the questions, one on a line, as PIQA has them: `X-labels.lst` for `X.jsonl`."""
    name = path.name
    stem, _, rest = name.partition(".jsonl")
    labels = path.with_name(f"{stem}-labels.lst{rest}")
    return labels if ".jsonl" in name and labels.is_file() else None


def _joined(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{item}\n" for item in hashes).encode()).hexdigest()


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.cache
def _sha256(path: Path, size: int, mtime: int) -> str:
    """Size and time are there for the cache alone: a changed file is hashed again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def columns_of(path: Path) -> list[str]:
    """The columns of a file; none where it has no rows. Raises DataError where it cannot be read."""
    if path.suffix == ".parquet":
        with _parquet(path) as file:
            return list(file.schema_arrow.names) if file.metadata.num_rows else []
    return list(next(read_file(path, ()), ()))


def read_rows(files: Sequence[Path], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of `files`, one file after the other: those columns only, or all where none is named.

    Raises DataError naming the file (and line) that cannot be read.
    """
    for path in files:
        yield from read_file(path, columns)


def read_file(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of one Parquet, JSON or JSON Lines file; see `read_rows`."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, columns)
        return
    for row in _labelled(path):
        # JSON leaves out what is null.
        yield {name: row.get(name) for name in columns} if columns else row


def _read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    with _parquet(path) as file:
        batches = file.iter_batches(batch_size=1000, columns=list(columns) or None, use_threads=False)
        while True:
            try:
                rows = next(batches).to_pylist()
            except StopIteration:
                return
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"cannot read {path}: {error}; fetch it again") from error
            yield from rows


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}; it is no Parquet file, or cut short: fetch it again") from error


def _labelled(path: Path) -> Iterator[dict[str, Any]]:
    labels = labels_of(path)
    if labels is None:
        yield from _read_json(path)
        return
    try:
        answers = [int(line) for line in _lines(labels) if line.strip()]
    except ValueError as error:
        raise DataError(f"{labels}: expected one number on a line: {error}") from error
    rows = list(_read_json(path))
    if len(rows) != len(answers):
        raise DataError(f"{path} has {len(rows)} rows, but {labels} has {len(answers)} labels")
    for row, answer in zip(rows, answers, strict=True):
        yield {**row, "label": answer}


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, or of one array."""
    lines = _lines(path)
    first = next(lines, "")
    if first.lstrip().startswith("["):
        for number, row in enumerate(_parsed("".join([first, *lines]), path, 1), 1):
            yield _object(row, path, number)
        return
    for number, line in enumerate(itertools.chain([first], lines), 1):
        if line.strip():
            yield _object(_parsed(line, path, number), path, number)


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}, line {line}: {error}") from error


def _object(row: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path}, row {line}: expected an object of columns, found {type(row).__name__}")
    return row


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, decompressed. By Arrow, as zstandard's reader ends a cut file silently."""
    try:
        with pa.input_stream(str(path)) as stream:
            text: TextIO = io.TextIOWrapper(stream, encoding="utf-8", newline="\n")
            yield from text
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; it may be cut short: fetch it again") from error
