"""Parquet files: footer, page sizes and dictionaries are checked before a page is unpacked.

A footer's sizes are claims. The header of each page says what a reader will allocate, so these are read first
(https://parquet.apache.org/docs/file-format/, `PageHeader` in Thrift's compact protocol).
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vectorclm.errors import DataError
from vectorclm.formats.files import Failure, check_name
from vectorclm.formats.limits import (
    BATCH_BYTES,
    PAGE_BYTES,
    PARQUET_COLUMNS,
    PARQUET_FOOTER,
    PARQUET_ROW_GROUPS,
    TABLE_BYTES,
)
from vectorclm.formats.thrift import page_header

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAGIC = b"PAR1"
USUAL_BYTES = 16 * 2**20  # of a batch in memory; a single larger row is read as a whole
MOST_ROWS = 1000  # of a batch
HEADER, LONG_HEADER = 512, 2**24  # bytes of a page's header: usually, and with long statistics


class Pages(NamedTuple):
    """What the pages of some columns of a row group unpack to, in bytes."""

    total: int
    largest: int


def open_parquet(source: Path | bytes, where: str, failure: Failure = DataError) -> "pq.ParquetFile":
    """Open a Parquet file. Raises `failure` where it is damaged, or has too many columns or row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(source, Path):
        check_name(source, failure)
    _check_footer(source, where, failure)
    try:
        found = pq.ParquetFile(
            pa.BufferReader(source) if isinstance(source, bytes) else source,
            thrift_string_size_limit=PARQUET_FOOTER,
            thrift_container_size_limit=PARQUET_COLUMNS * 100,
        )
    except (OSError, pa.ArrowException, MemoryError) as error:
        raise failure(
            f"cannot read {where}: {error}; it is not a Parquet file or is cut short: download it again"
        ) from error
    about = found.metadata
    if about.num_columns > PARQUET_COLUMNS or about.num_row_groups > PARQUET_ROW_GROUPS:
        found.close()
        raise failure(
            f"cannot read {where}: it has {about.num_columns:,} columns in {about.num_row_groups:,} row groups, "
            f"{PARQUET_COLUMNS:,} in {PARQUET_ROW_GROUPS:,} at most"
        )
    return found


def _check_footer(source: Path | bytes, where: str, failure: Failure) -> None:
    """Raise `failure` where a file's footer is larger than PARQUET_FOOTER; other faults are the reader's to find."""
    try:
        end = source[-8:] if isinstance(source, bytes) else _end(source)
    except OSError as error:
        raise failure(f"cannot read {where}: {error.strerror or error}") from error
    if end[4:] == MAGIC and (size := int.from_bytes(end[:4], "little")) > PARQUET_FOOTER:
        raise failure(f"cannot read {where}: its footer claims {size:,} bytes, {PARQUET_FOOTER:,} at most")


def _end(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 8))
        return file.read()


def batches(
    source: Path | bytes, columns: Sequence[str], where: str, failure: Failure = DataError
) -> "Iterator[pa.RecordBatch]":
    """The rows of a Parquet file in batches of some megabytes, with the named columns, or all where there are none.

    Raises `failure` where the file is damaged, a page unpacks to more than PAGE_BYTES, or a column is missing.
    """
    import pyarrow as pa

    with open_parquet(source, where, failure) as file:
        known = set(file.schema_arrow.names)
        if lost := [name for name in columns if name not in known]:
            raise failure(f"{where} has no column {', '.join(map(repr, lost))}")
        for number in range(file.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            try:
                pages = _pages(source, file, number, set(columns), where, failure)
            except UnicodeDecodeError as error:
                raise failure(f"cannot read {where}: the name of a column is not UTF-8; download it again") from error
            few = min(USUAL_BYTES * rows // max(1, pages.total), BATCH_BYTES // max(1, pages.largest), MOST_ROWS)
            found = file.iter_batches(
                max(1, few), row_groups=[number], columns=list(columns) or None, use_threads=False
            )
            while True:
                try:
                    batch = next(found, None)
                except (OSError, pa.ArrowException) as error:
                    raise failure(f"cannot read {where}: {error}; download it again") from error
                if batch is None:
                    break
                yield from _pieces(batch)


def _pieces(batch: "pa.RecordBatch") -> "Iterator[pa.RecordBatch]":
    """A batch, in pieces where all its rows together are large; no byte is copied."""
    count = max(1, min(batch.num_rows, batch.nbytes // (4 * USUAL_BYTES)))
    step = -(-batch.num_rows // count)
    for start in range(0, max(1, batch.num_rows), max(1, step)):
        yield batch.slice(start, step)


def _pages(
    source: Path | bytes, file: "pq.ParquetFile", number: int, columns: set[str], where: str, failure: Failure
) -> Pages:
    """The sizes of all pages of the columns in a row group. Raises `failure` for a page beyond PAGE_BYTES."""
    group = file.metadata.row_group(number)
    if group.num_columns != file.metadata.num_columns:  # Arrow aborts the process on a column that the schema lacks
        raise failure(f"cannot read {where}: row group {number} has {group.num_columns:,} columns; download it again")
    total = max(0, group.total_byte_size)
    largest = found = 0
    with _Bytes(source) as data:
        for place in range(group.num_columns):
            chunk = group.column(place)
            if (
                columns
                and chunk.path_in_schema.partition(".")[0] not in columns
                and chunk.path_in_schema not in columns
            ):
                continue
            starts = [at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at is not None and at > 0]
            at, end = min(starts, default=0), min(starts, default=0) + chunk.total_compressed_size
            while at < min(end, data.size):
                try:
                    length, unpacked, packed = data.header(at)
                except ValueError as error:
                    raise failure(f"cannot read {where}: {error}; download it again") from error
                if unpacked > PAGE_BYTES:
                    raise failure(
                        f"cannot read {where}: a page of {chunk.path_in_schema!r:.100} unpacks to {unpacked:,} bytes, "
                        f"{PAGE_BYTES:,} at most"
                    )
                largest, found = max(largest, unpacked), found + unpacked
                at += length + packed
    return Pages(max(total, found), largest)


class _Bytes:
    """Page headers of a file on disk or in memory."""

    def __init__(self, source: Path | bytes) -> None:
        self._data = source if isinstance(source, bytes) else None
        self._file = source.open("rb") if isinstance(source, Path) else None
        self.size = len(source) if isinstance(source, bytes) else source.stat().st_size

    def __enter__(self) -> "_Bytes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def header(self, at: int) -> tuple[int, int, int]:
        """Length, unpacked and packed bytes of the page whose header is at a place. Raises ValueError."""
        for size in (HEADER, LONG_HEADER):
            try:
                return page_header(self._read(at, size))
            except IndexError:
                continue
        raise ValueError("the header of a page is cut short")

    def _read(self, at: int, size: int) -> bytes:
        if self._data is not None:
            return self._data[at : at + size]
        assert self._file is not None
        self._file.seek(at)
        return self._file.read(size)


def read_small_table(
    source: Path | bytes, schema: "pa.Schema", filled: Sequence[str], where: str, failure: Failure = DataError
) -> "pa.Table":
    """The columns of a schema that a file has, as a table of at most TABLE_BYTES.

    Raises `failure` where a column has another type, or one of `filled` is missing or has nulls.
    """
    import pyarrow as pa

    with open_parquet(source, where, failure) as file:
        found = file.schema_arrow
    for field in schema:
        if field.name in found.names and found.field(field.name).type != field.type:
            raise failure(f"{where}: the column {field.name!r} is {found.field(field.name).type}, not {field.type}")
    names = [field.name for field in schema if field.name in found.names]
    if lost := [name for name in filled if name not in names]:
        raise failure(f"{where} has no column {', '.join(map(repr, lost))}")
    parts: list[pa.RecordBatch] = []
    size = 0
    for batch in batches(source, names, where, failure):
        size += batch.nbytes
        if size > TABLE_BYTES:
            raise failure(f"{where} has more than {TABLE_BYTES:,} bytes in memory")
        parts.append(batch)
    table = pa.Table.from_batches(parts, pa.schema([schema.field(name) for name in names]))
    for name in filled:
        if table[name].null_count:
            raise failure(f"{where}: the column {name!r} has empty places")
    try:
        table.validate(full=True)
    except pa.ArrowException as error:
        raise failure(f"cannot read {where}: {error}") from error
    return table
