"""Readers of data files: Parquet, JSON Lines and plain text, recognised by their content and their suffixes.

To add a format, add one row to FORMATS.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vectorclm.corpus.filters import Filter
from vectorclm.corpus.lines import COMPRESSED_SUFFIXES, LONGEST, first_bytes, lines_of
from vectorclm.corpus.row_batches import BATCH_ROWS, RowBatch, filtered, row_batches
from vectorclm.corpus.text_files import text_batches, text_columns, text_rows
from vectorclm.errors import DataError
from vectorclm.formats.json_files import parse_line
from vectorclm.formats.parquet import batches as parquet_batches
from vectorclm.formats.parquet import open_parquet

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET_MAGIC = b"PAR1"
REFUSED = {
    **dict.fromkeys((".csv", ".tsv", ".csv.gz"), "a table of separated values"),
    **dict.fromkeys((".zip", ".tar", ".tar.gz", ".tgz", ".7z"), "an archive"),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".odt", ".epub", ".html", ".htm"), "a document with formatting"),
    **dict.fromkeys((".arrow", ".feather", ".xlsx", ".npy", ".bin", ".pt", ".safetensors"), "binary data"),
}


@dataclass(frozen=True)
class FileFormat:
    """How files of one format are recognised and read. Every reader raises DataError naming the file."""

    name: str  # the `path` of a source whose `data_files` have this format
    title: str  # the name in messages
    suffixes: tuple[str, ...]
    columns: Callable[[Path], list[str]]  # a file's columns; empty for a file without rows
    column_type: "Callable[[Path, str], pa.DataType | None]"  # a column's type; None where the format has no types
    # Rows with these columns, or with all columns where the tuple is empty.
    rows: Callable[[Path, tuple[str, ...]], Iterator[dict[str, Any]]]
    batches: Callable[[Path, str, Filter | None], Iterator[RowBatch]]  # the texts of one column


def format_of(path: Path) -> FileFormat:
    """The format of a data file: Parquet by its first bytes, the others by suffix, or else by the first character.

    Raises DataError for a file that cannot be read, and for an archive or another kind of file.
    """
    start = first_bytes(path)
    if start.startswith(PARQUET_MAGIC):
        return PARQUET
    if (named := suffix_format(path)) is not None:
        return named
    if refused := next((what for suffix, what in REFUSED.items() if path.name.lower().endswith(suffix)), None):
        raise DataError(f"{path} is {refused}, which is not read: convert it to {titles()}")
    first = next((line for line in lines_of(path, "surrogateescape") if line.strip()), "").lstrip()
    return JSON if first.startswith(("{", "[")) else TEXT


def suffix_format(path: Path) -> FileFormat | None:
    """The format whose suffix a file's name has; None for another suffix. The file is not read."""
    return next((known for known in FORMATS if path.name.lower().endswith(known.suffixes)), None)


def titles(*, tables: bool = False) -> str:
    """The formats that are read, as in "Parquet, JSON or text"; with `tables`, those of rows with columns."""
    *others, last = (known.title for known in FORMATS if not (tables and known is TEXT))
    return f"{', '.join(others)} or {last}"


def named_format(address: str) -> FileFormat:
    """The format of the files at an address or a pattern of addresses, by the suffix in its last part; else text."""
    name = address.rpartition("/")[2].lower()
    return next((known for known in FORMATS if any(suffix in name for suffix in known.suffixes)), TEXT)


def _with_compressed(*suffixes: str) -> tuple[str, ...]:
    return tuple(suffix + end for suffix in suffixes for end in ("", *COMPRESSED_SUFFIXES))


def columns_of(path: Path) -> list[str]:
    """The columns of a file; empty for a file without rows. Raises DataError where it cannot be read."""
    return format_of(path).columns(path)


def column_type(path: Path, column: str) -> "pa.DataType | None":
    """The type of a column of a file; None where its format has no types."""
    return format_of(path).column_type(path, column)


def is_text(kind: "pa.DataType") -> bool:
    """Whether a column of this type holds texts, or bytes that may be text."""
    import pyarrow as pa

    try:
        pa.array([], kind).cast(pa.large_binary())
    except pa.ArrowException:
        return False
    return True


def read_file_batches(path: Path, column: str, condition: Filter | None) -> Iterator[RowBatch]:
    """Read the texts in `column` of a file, some megabytes at a time, from the rows that pass the filter `condition`.

    In JSON, bytes that are not UTF-8 become lone surrogates. Raises DataError naming a file that cannot be read, or
    whose column types the filter cannot compare.
    """
    yield from format_of(path).batches(path, column, condition)


def read_rows(files: Sequence[Path], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Read the rows of `files` in turn, with the named columns, or all columns where `columns` is empty.

    Raises DataError naming a file (and line) that cannot be read.
    """
    for path in files:
        yield from format_of(path).rows(path, columns)


def read_parquet(source: Path | bytes, columns: tuple[str, ...], where: str) -> Iterator[dict[str, Any]]:
    """Read the rows of a Parquet file on disk or in memory; `where` names the file in errors. See `read_rows`."""
    for batch in parquet_batches(source, columns, where):
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(f"{where} holds text that is not UTF-8: {error}") from error


def _parquet_columns(path: Path) -> list[str]:
    with open_parquet(path, str(path)) as file:
        return list(file.schema_arrow.names) if file.metadata.num_rows else []


def _parquet_type(path: Path, column: str) -> "pa.DataType | None":
    with open_parquet(path, str(path)) as file:
        if column not in file.schema_arrow.names:
            raise DataError(f"{path} has no column {column!r}")
        return file.schema_arrow.field(column).type


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    return read_parquet(path, columns, str(path))


def _parquet_texts(path: Path, column: str, condition: Filter | None) -> Iterator[RowBatch]:
    import pyarrow as pa

    columns = tuple(dict.fromkeys([column, *(condition.columns if condition else [])]))
    for batch in parquet_batches(path, columns, str(path)):
        yield filtered(pa.Table.from_batches([batch]), column, condition, str(path))


def _no_type(path: Path, column: str) -> "pa.DataType | None":
    return None


def _json_columns(path: Path) -> list[str]:
    """The columns of the first rows together, because a JSON row may omit null columns."""
    rows = itertools.islice(_labelled(path, errors="surrogateescape"), BATCH_ROWS)
    return list(dict.fromkeys(name for row in rows for name in row))


def _json_rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for row in _labelled(path):
        # A JSON row may omit null columns.
        yield {name: row.get(name) for name in columns} if columns else row


def _json_texts(path: Path, column: str, condition: Filter | None) -> Iterator[RowBatch]:
    yield from row_batches(_read_json(path, errors="surrogateescape"), column, condition, str(path))


def labels_of(path: Path) -> Path | None:
    """The file of answers beside a file of questions, one answer a line, as in PIQA: `X-labels.lst` for `X.jsonl`."""
    name = path.name
    stem, _, rest = name.partition(".jsonl")
    labels = path.with_name(f"{stem}-labels.lst{rest}")
    return labels if ".jsonl" in name and labels.is_file() else None


def _labelled(path: Path, errors: str = "strict") -> Iterator[dict[str, Any]]:
    labels = labels_of(path)
    if labels is None:
        yield from _read_json(path, errors)
        return
    try:
        answers = [int(line) for line in lines_of(labels) if line.strip()]
    except ValueError as error:
        raise DataError(f"{labels}: every line must be one number: {error}") from error
    rows = list(_read_json(path, errors))
    if len(rows) != len(answers):
        raise DataError(f"{path} has {len(rows)} rows, but {labels} has {len(answers)} labels")
    for row, answer in zip(rows, answers, strict=True):
        yield {**row, "label": answer}


def _read_json(path: Path, errors: str = "strict") -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, or of a file that is one JSON array."""
    lines = lines_of(path, errors)
    first = next(lines, "")
    if first.lstrip().startswith("["):
        for number, row in enumerate(_parsed(_whole([first], lines, path), path, 1), 1):
            yield _object(row, path, number)
        return
    for number, line in enumerate(itertools.chain([first], lines), 1):
        if line.strip():
            yield _object(_parsed(line, path, number), path, number)


def _whole(parts: list[str], lines: Iterator[str], path: Path) -> str:
    """Join `parts` and all remaining `lines`. Raises DataError beyond LONGEST characters."""
    length = sum(map(len, parts))
    for number, line in enumerate(lines, len(parts) + 1):
        length += len(line)
        if length > LONGEST:
            raise DataError(
                f"{path}, line {number}: the JSON array has more than {LONGEST:,} characters; write it as JSON Lines"
            )
        parts.append(line)
    return "".join(parts)


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return parse_line(text)
    except ValueError as error:
        raise DataError(f"{path}, line {line}: {error}") from error


def _object(row: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path}, row {line}: expected an object of columns, found {type(row).__name__}")
    return row


PARQUET_SUFFIXES = (".parquet", ".pq")
JSON_SUFFIXES = _with_compressed(".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = _with_compressed(".txt", ".md", ".text", ".markdown")
PARQUET = FileFormat(
    "parquet", "Parquet", PARQUET_SUFFIXES, _parquet_columns, _parquet_type, _parquet_rows, _parquet_texts
)
JSON = FileFormat("json", "JSON", JSON_SUFFIXES, _json_columns, _no_type, _json_rows, _json_texts)
TEXT = FileFormat("text", "text", TEXT_SUFFIXES, text_columns, _no_type, text_rows, text_batches)
FORMATS = (PARQUET, JSON, TEXT)
