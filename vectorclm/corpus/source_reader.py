"""Reads the rows of sources, one by one or in batches: local files, hub data sets and the generated world."""

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, AnyStr, NamedTuple

import pyarrow as pa

from vectorclm.corpus.file_formats import (
    column_type,
    columns_of,
    format_of,
    is_text,
    read_file_batches,
    read_rows,
    titles,
)
from vectorclm.corpus.files import revision_of
from vectorclm.corpus.filters import Filter
from vectorclm.corpus.hub import hub_error, open_hub
from vectorclm.corpus.row_batches import RowBatch, filtered, row_batches
from vectorclm.corpus.sources import (
    BUILDERS,
    GENERATED,
    Source,
    TextSource,
    describe,
    is_remote,
    local_files,
    local_place,
)
from vectorclm.corpus.synthetic_world import WorldConfig
from vectorclm.errors import ConfigError, DataError, VectorCLMError

if TYPE_CHECKING:  # `datasets` takes a second to import, and a training process reads no source
    from datasets import IterableDataset

OPEN_FILES = 8  # files of a hub repository that are read in turn


class SourceRoots(NamedTuple):
    """Where sources are read from: a local mirror of the hub, and the settings of the generated world."""

    data: Path | None = None
    world: WorldConfig | None = None


def open_source(
    source: Source, data: Path | None, world: WorldConfig | None, columns: Sequence[str]
) -> "IterableDataset":
    """Open a source as a stream of rows with the named columns, or all columns where `columns` is empty.

    `data` is a local mirror of the hub, or None. Local files are read in the order of their content hashes. Raises
    DataError, before any row is read, for a source that cannot be reached, is empty, lacks a column or differs from
    its pinned revision. Iterate with `draw`, which explains later failures.
    """
    if source.is_generated:
        from datasets import Dataset

        stream = Dataset.from_list(_generated(source, world, columns)).to_iterable_dataset()
    elif not is_remote(source, data):
        from datasets import IterableDataset

        # `datasets` splits lists into shards, so the files are a list and the columns a tuple.
        kwargs = {"files": _check_local(source, data, columns), "columns": tuple(columns)}
        return IterableDataset.from_generator(read_rows, gen_kwargs=kwargs)
    else:
        stream = open_hub(source)
        _require(columns, stream.column_names, describe(source))
        if isinstance(source, TextSource):
            _require_text(source, stream.features.arrow_schema.field(source.text_column).type, describe(source))
    return stream.select_columns(list(columns)) if columns else stream


def check_source(source: Source, data: Path | None, world: WorldConfig | None, columns: Sequence[str]) -> None:
    """Check that `open_source` can open a source, and raise what it raises.

    Of a source on this machine it imports neither `datasets` nor torch, for which a person would wait.
    """
    if source.is_generated:
        _generated(source, world, columns)
    elif is_remote(source, data):
        open_source(source, data, world, columns)
    else:
        _check_local(source, data, columns)


def _generated(source: Source, world: WorldConfig | None, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a generated source, which have the columns."""
    if world is None:
        raise ConfigError(f"{describe(source)} reads the generated world, but there is no [world]")
    rows = GENERATED[source.path](world, source.name or "")
    if not rows:
        raise DataError(f"{describe(source)} is empty")
    _require(columns, list(rows[0]), describe(source))
    if isinstance(source, TextSource) and not isinstance(rows[0][source.text_column], str):
        _require_text(source, pa.infer_type([rows[0][source.text_column]]), describe(source))
    return rows


def _require(columns: Sequence[str], known: Sequence[str], where: str) -> None:
    if lost := [name for name in columns if name not in known]:
        raise DataError(f"{where}: no column {', '.join(map(repr, lost))}; it has {', '.join(known)}")


def _require_text(source: TextSource, kind: pa.DataType, where: str) -> None:
    if not is_text(kind):
        raise DataError(f"{where}: column {source.text_column!r} is {kind}, not text: set text_column to one that is")


def _names_format(source: Source, data: Path | None) -> bool:
    """Whether the source's `path` states the format of its files, which lie in no mirror."""
    return source.path in BUILDERS and not (data is not None and source.mirror is not None)


def _check_local(source: Source, data: Path | None, columns: Sequence[str]) -> list[Path]:
    """The source's local files that have rows. Raises DataError as `open_source` does."""
    place, files = local_place(source, data), local_files(source, data)
    if not files:
        raise DataError(f"{describe(source)}: no {titles()} files of this split at {place}")
    filled = []
    for path in files:
        if _names_format(source, data) and (found := format_of(path).name) != source.path:
            raise DataError(f'{describe(source)}: {path} is not {source.path}: did you mean path = "{found}"?')
        if known := columns_of(path):
            _require(columns, known, f"{describe(source)}, {path}")
            if isinstance(source, TextSource) and (kind := column_type(path, source.text_column)) is not None:
                _require_text(source, kind, f"{describe(source)}, {path}")
            filled.append(path)
    if not filled:
        raise DataError(f"{describe(source)} is empty: no rows in {', '.join(map(str, files))}")
    pinned, found = source.revision or "", revision_of(files)
    if pinned.startswith("sha256:") and pinned != found:
        raise DataError(f"{describe(source)} is pinned to {pinned}, but {place} holds {found}")
    return filled


def draw(source: Source, stream: "IterableDataset") -> Iterator[dict[str, Any]]:
    """Iterate over a stream of `open_source`. Raises DataError where reading fails."""
    try:
        yield from stream
    except VectorCLMError:
        raise
    except Exception as error:
        if source.is_generated or (source.revision or "").startswith("sha256:"):
            raise
        raise hub_error(source, error) from error


def read_source(
    source: Source, data: Path | None, world: WorldConfig | None, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Read the rows of a source, as `open_source` and `draw` do; local files are several times as fast."""
    if source.is_generated or is_remote(source, data):
        return draw(source, open_source(source, data, world, columns))
    return read_rows(_check_local(source, data, columns), tuple(columns))


def local_bytes(source: Source, data: Path | None) -> int:
    """The size of a source's files on this machine; 0 for another source."""
    if source.is_generated or is_remote(source, data):
        return 0
    return sum(path.stat().st_size for path in local_files(source, data))


def find_row(source: Source, data: Path | None, column: str, value: Any) -> str | None:
    """The file and number of the first row with this value in a column; None where the source has no local files."""
    if source.is_generated or is_remote(source, data):
        return None
    for path in local_files(source, data):
        for number, row in enumerate(read_rows([path], (column,)), 1):
            if row[column] == value:
                return f"{path}, row {number:,}"
    return None


def checked_files(source: TextSource, data: Path | None) -> list[Path]:
    """The files of a source on this machine that have rows. Raises DataError as `open_source` does."""
    return _check_local(source, data, source.columns())


def read_batches(source: TextSource, data: Path | None, world: WorldConfig | None, seed: int) -> Iterator[RowBatch]:
    """Read the texts of a source that pass its filter, some megabytes at a time.

    A hub repository is read from OPEN_FILES files in turn, in an order that `seed` shuffles; the next file is opened
    when one ends. Raises DataError as `open_source` does, and where reading fails later.
    """
    condition = Filter(source.filter) if source.filter is not None else None
    if not (source.is_generated or is_remote(source, data)):
        for path in checked_files(source, data):
            yield from read_file_batches(path, source.text_column, condition)
        return
    stream = open_source(source, data, world, source.columns())
    if source.is_generated:
        yield from row_batches(iter(stream), source.text_column, condition, describe(source))
    else:
        try:
            for table in _round_robin(stream, seed):
                yield filtered(table, source.text_column, condition, describe(source))
        except VectorCLMError:
            raise
        except Exception as error:
            raise hub_error(source, error) from error


def _round_robin(stream: "IterableDataset", seed: int) -> Iterator[pa.Table]:
    count = stream.num_shards
    waiting = deque(random.Random(seed).sample(range(count), count))
    files: deque[Iterator[pa.Table]] = deque()
    while waiting or files:
        while waiting and len(files) < OPEN_FILES:
            part = stream.shard(count, waiting.popleft()).with_format("arrow")
            files.append(part.iter(batch_size=1000))
        file = files.popleft()
        if (table := next(file, None)) is not None:
            yield table
            files.append(file)


def in_groups(texts: Iterable[AnyStr], length: int, count: int | None = None) -> Iterator[list[AnyStr]]:
    """Group texts: a group ends when it has `length` characters or bytes, or `count` texts."""
    group: list[AnyStr] = []
    total = 0
    for text in texts:
        group.append(text)
        total += len(text)
        if total >= length or len(group) == count:
            yield group
            group, total = [], 0
    if group:
        yield group
