"""Batches of rows: the texts of one column, from the rows that pass a filter."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from vectorclm.corpus.filters import Filter
from vectorclm.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1000


class RowBatch(NamedTuple):
    """A batch of rows: the number of rows read, and the texts of the rows that pass the filter.

    A text is bytes (from Parquet), a string, or a value of another type where the column holds no text.
    """

    rows: int
    texts: list[Any]


def row_batches(
    rows: Iterator[dict[str, Any]], column: str, condition: Filter | None, where: str
) -> Iterator[RowBatch]:
    """Batch rows that are dictionaries, such as those of JSON; see `read_file_batches`."""
    import pyarrow as pa

    while part := list(itertools.islice(rows, BATCH_ROWS)):
        kept = part
        if condition is not None:
            try:
                table = pa.table({name: [row.get(name) for row in part] for name in condition.columns})
                kept = [part[number] for number in condition.holds(table)]
            except pa.ArrowException as error:
                raise _no_filter(condition, where, error) from error
        yield RowBatch(len(part), [row.get(column) for row in kept])


def filtered(table: "pa.Table", column: str, condition: Filter | None, where: str) -> RowBatch:
    """The texts in `column`, as bytes, of the table's rows that pass the filter.

    Raises DataError where the filter cannot compare the columns' types.
    """
    import pyarrow as pa

    texts = table[column]
    if condition is not None:
        try:
            texts = texts.take(pa.array(condition.holds(table.select(condition.columns)), pa.int64()))
        except pa.ArrowException as error:
            raise _no_filter(condition, where, error) from error
    try:
        return RowBatch(len(table), texts.cast(pa.large_binary()).to_pylist())
    except pa.ArrowException as error:
        raise DataError(f"{where}: the column {column!r} holds {texts.type}, not text") from error


def _no_filter(condition: Filter, where: str, error: "pa.ArrowException") -> DataError:
    return DataError(f"{where}: the filter {condition.text!r} does not fit the columns' types: {error}")
