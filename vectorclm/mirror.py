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
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json

from vectorclm.errors import DataError
from vectorclm.filters import Filter

LONGEST = 2**26  # characters of a line, or of a file that is one array: all of it is in memory at once
BATCH_ROWS = 1000
BATCH_BYTES = 16 * 1024 * 1024  # of Parquet in memory at once, or one row where that has more
SUFFIXES = (".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".json", ".json.zst", ".json.gz")
PAGES = (".txt", ".txt.zst", ".txt.gz")  # WikiText's own files, taken only where a source names one

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
        with _parquet(path, str(path)) as file:
            return list(file.schema_arrow.names) if file.metadata.num_rows else []
    return list(next(_labelled(path, errors="surrogateescape"), ()))


def parquet_type(path: Path, column: str) -> pa.DataType | None:
    """The type of a column of a Parquet file; None for a JSON file, which has none."""
    if path.suffix != ".parquet":
        return None
    with _parquet(path, str(path)) as file:
        return file.schema_arrow.field(column).type


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts, or bytes that may be text."""
    try:
        pa.array([], kind).cast(pa.large_binary())
    except pa.ArrowException:
        return False
    return True


class Batch(NamedTuple):
    """Some rows of a source: how many were read, and the texts of those for which the filter holds.

    A text is bytes as a Parquet file has them, a string, or what else stands in its place.
    """

    rows: int
    texts: list[Any]


def read_file_batches(path: Path, column: str, condition: Filter | None) -> Iterator[Batch]:
    """The texts in `column` of one file, some megabytes at a time, of the rows for which `condition` holds.

    In JSON, bytes that are not UTF-8 become halves of surrogate pairs. Raises DataError naming the file that cannot be
    read, or whose columns have types that the filter cannot compare.
    """
    if path.suffix == ".parquet":
        columns = tuple(dict.fromkeys([column, *(condition.columns if condition else [])]))
        for batch in _parquet_batches(path, columns, str(path)):
            yield filtered(pa.Table.from_batches([batch]), column, condition, str(path))
    else:
        yield from row_batches(_read_json(path, errors="surrogateescape"), column, condition, str(path))


def row_batches(rows: Iterator[dict[str, Any]], column: str, condition: Filter | None, where: str) -> Iterator[Batch]:
    """The texts in `column` of rows from JSON or the like; see `read_file_batches`."""
    while part := list(itertools.islice(rows, BATCH_ROWS)):
        kept = part
        if condition is not None:
            try:
                table = pa.table({name: [row.get(name) for row in part] for name in condition.columns})
                kept = [part[number] for number in condition.holds(table)]
            except pa.ArrowException as error:
                raise _no_filter(condition, where, error) from error
        yield Batch(len(part), [row.get(column) for row in kept])


def filtered(table: pa.Table, column: str, condition: Filter | None, where: str) -> Batch:
    """The texts in `column` of the table's rows for which `condition` holds, as bytes. Raises DataError as above."""
    texts = table[column]
    if condition is not None:
        try:
            texts = texts.take(condition.holds(table.select(condition.columns)))
        except pa.ArrowException as error:
            raise _no_filter(condition, where, error) from error
    return Batch(len(table), texts.cast(pa.large_binary()).to_pylist())


def _no_filter(condition: Filter, where: str, error: pa.ArrowException) -> DataError:
    return DataError(f"{where}: the filter {condition.text!r} does not fit the columns' types: {error}")


def read_rows(files: Sequence[Path], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of `files`, one file after the other: those columns only, or all where none is named.

    Raises DataError naming the file (and line) that cannot be read.
    """
    for path in files:
        yield from read_file(path, columns)


def read_file(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of one Parquet, JSON or JSON Lines file; see `read_rows`."""
    if path.suffix == ".parquet":
        yield from read_parquet(path, columns, str(path))
        return
    for row in _labelled(path):
        # JSON leaves out what is null.
        yield {name: row.get(name) for name in columns} if columns else row


def read_parquet(source: Path | bytes, columns: tuple[str, ...], where: str) -> Iterator[dict[str, Any]]:
    """The rows of one Parquet file, which may be in memory; `where` names it in errors. See `read_rows`."""
    for batch in _parquet_batches(source, columns, where):
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(f"{where} holds text that is not UTF-8: {error}") from error


def _parquet_batches(source: Path | bytes, columns: tuple[str, ...], where: str) -> Iterator[pa.RecordBatch]:
    with _parquet(source, where) as file:
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            rows = BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
            batches = file.iter_batches(
                max(1, min(BATCH_ROWS, rows)), row_groups=[number], columns=list(columns) or None, use_threads=False
            )
            while True:
                try:
                    batch = next(batches, None)
                except (OSError, pa.ArrowException) as error:
                    raise DataError(f"cannot read {where}: {error}; fetch it again") from error
                if batch is None:
                    break
                yield batch


def _parquet(source: Path | bytes, where: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {where}: {error}; it is no Parquet file, or cut short: fetch it again") from error


def _labelled(path: Path, errors: str = "strict") -> Iterator[dict[str, Any]]:
    if path.name.endswith(PAGES):
        yield from ({"page": page} for page in _pages(path, errors))
        return
    labels = labels_of(path)
    if labels is None:
        yield from _read_json(path, errors)
        return
    try:
        answers = [int(line) for line in _lines(labels) if line.strip()]
    except ValueError as error:
        raise DataError(f"{labels}: expected one number on a line: {error}") from error
    rows = list(_read_json(path, errors))
    if len(rows) != len(answers):
        raise DataError(f"{path} has {len(rows)} rows, but {labels} has {len(answers)} labels")
    for row, answer in zip(rows, answers, strict=True):
        yield {**row, "label": answer}


def _pages(path: Path, errors: str) -> Iterator[str]:
    """The articles of a WikiText file, each from its title `= Title =` on, as the hub's document-level set has them."""
    lines: list[str] = []
    for line in _lines(path, errors):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            if (page := "".join(lines).removesuffix("\n")).strip():
                yield page
            lines = []
        lines.append(line)
    yield "".join(lines)


def _read_json(path: Path, errors: str = "strict") -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, or of one array."""
    lines = _lines(path, errors)
    first = next(lines, "")
    if first.lstrip().startswith("["):
        for number, row in enumerate(_parsed(_whole([first], lines, path), path, 1), 1):
            yield _object(row, path, number)
        return
    for number, line in enumerate(itertools.chain([first], lines), 1):
        if line.strip():
            yield _object(_parsed(line, path, number), path, number)


def _whole(parts: list[str], lines: Iterator[str], path: Path) -> str:
    """The text of `parts` and all `lines` after them."""
    length = sum(map(len, parts))
    for number, line in enumerate(lines, len(parts) + 1):
        length += len(line)
        if length > LONGEST:
            raise DataError(f"{path}, line {number}: an array of more than {LONGEST:,} characters; write a row a line")
        parts.append(line)
    return "".join(parts)


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        try:
            return from_json(text, cache_strings="keys")  # three times as fast
        except (ValueError, TypeError):  # Python's reads what this one refuses: halves of surrogate pairs, deep nests
            return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {line}: {error}") from error


def _object(row: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path}, row {line}: expected an object of columns, found {type(row).__name__}")
    return row


def _lines(path: Path, errors: str = "strict") -> Iterator[str]:
    """The lines of a UTF-8 file, decompressed, each within LONGEST: little data may unpack to more than memory holds.

    By Arrow, as zstandard's reader ends a cut file silently.
    """
    try:
        with pa.input_stream(str(path)) as stream:
            text: TextIO = io.TextIOWrapper(stream, encoding="utf-8", errors=errors, newline="\n")
            for number in itertools.count(1):
                line = text.readline(LONGEST + 1)
                if len(line) > LONGEST:
                    raise DataError(f"{path}, line {number}: more than {LONGEST:,} characters; split what it holds")
                if not line:
                    return
                yield line
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; it may be cut short: fetch it again") from error
