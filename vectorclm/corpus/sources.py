"""Document sources: `datasets.load_dataset` arguments as they are, and their rows, one by one or in batches."""

import glob
import random
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, AnyStr, Self

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from vectorclm.corpus.file_formats import (
    FORMATS,
    RowBatch,
    column_type,
    columns_of,
    filtered,
    is_text,
    read_file_batches,
    read_rows,
    row_batches,
)
from vectorclm.corpus.files import content_hash, find_files, revision_of
from vectorclm.corpus.filters import Filter
from vectorclm.corpus.synthetic_world import WorldConfig
from vectorclm.corpus.synthetic_world import rows as world_rows
from vectorclm.errors import ConfigError, DataError, VectorCLMError
from vectorclm.settings import Settings

if TYPE_CHECKING:  # `datasets` takes a second to import, and a process that trains reads no source
    from datasets import IterableDataset


CHOICE_COLUMNS = ("context", "choices", "answer")  # of a benchmark that the harness does not define


GENERATED = {"world": world_rows}  # the `path` of generated sources, and what returns the rows of one by its name
BUILDERS = tuple(known.name for known in FORMATS if known.in_folders)  # the `path` of plain local files
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
OPEN_FILES = 8  # of a hub repository that documents are drawn from by turns


class Source(Settings):
    """Arguments of `datasets.load_dataset`, and a label.

    `revision` is the commit of the hub repository, or `sha256:` of the content of local files.
    """

    label: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="Names its files and metrics")
    path: str = Field(description="Hub id, local folder, parquet or json (with data_files), or world")
    name: str | None = Field(None, description="The hub's config")
    split: str = "train"
    data_dir: str | None = None
    data_files: str | list[str] | None = None
    revision: str | None = Field(None, description="Left out, the first run pins it in the lock file")
    mirror: str | None = Field(None, description="Folder or file of this source in `--data DIR`")

    @field_validator("path")
    @classmethod
    def _is_read(cls, path: str) -> str:
        if "/" in path or path in (*GENERATED, *BUILDERS):
            return path
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

        if path in _PACKAGED_DATASETS_MODULES:
            raise ValueError(
                f"{path} files are not read: of local files, only {' and '.join(BUILDERS)} are, so write them as JSON "
                f"Lines or Parquet (a folder of this name is ./{path})"
            )
        return path

    @property
    def is_generated(self) -> bool:
        """Whether its rows are generated here, from the experiment's [world], and not read."""
        return self.path in GENERATED


class TextSource(Source):
    """A source of documents."""

    text_column: str = "text"
    weight: float = Field(gt=0, description="Share of the sample's bytes, relative to the other sources")
    filter: str | None = Field(None, description="Rows to draw from, such as int_score >= 3 and token_count < 8000")
    min_bytes: int = Field(1, ge=1, description="Shorter documents are dropped (UTF-8 bytes)")
    max_bytes: int = Field(10_000_000, ge=1, lt=2**31, description="Longer documents are dropped (UTF-8 bytes)")

    @field_validator("filter")
    @classmethod
    def _is_filter(cls, text: str | None) -> str | None:
        if text is not None:
            Filter(text)
        return text

    def columns(self) -> tuple[str, ...]:
        """The columns that are read: the text, and what the filter compares."""
        others = Filter(self.filter).columns if self.filter is not None else []
        return tuple(dict.fromkeys([self.text_column, *others]))


class BenchmarkSource(Source):
    """Texts that no document for training may repeat."""

    columns: list[str] = Field(description="Columns with the texts, lists and tables included; none = all")


class CorpusConfig(Settings):
    """How many documents are drawn, and from where."""

    sources: list[TextSource] = Field(min_length=1)
    bytes: int = Field(gt=0, description="UTF-8 bytes to draw over all sources, divided by weight")
    validation_share: float = Field(0.005, gt=0, lt=0.5, description="Share of documents held out")
    decontaminate: bool = Field(
        True, description="Drop what shares 13 words in a row with a benchmark, conversations too"
    )
    decontaminate_with: list[BenchmarkSource] = Field([], description="Benchmarks beside those of evaluate.tasks")

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        check_labels(self.sources)
        check_labels(self.decontaminate_with)
        return self


def check_labels(sources: Sequence[Source]) -> None:
    """Raise ValueError where two sources share a label: one would take the other's place."""
    labels = [source.label for source in sources]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two sources share a label: {', '.join(sorted(labels))}")


def identity(source: Source) -> dict[str, Any]:
    """What of a source enters a fingerprint: never where it lies; of local content not even its name."""
    by_content = (source.revision or "").startswith("sha256:")
    where = {"path", "name", "split", "data_dir", "data_files", "mirror"} if by_content else {"mirror"}
    return source.model_dump(mode="json", exclude=where)


def describe(source: Source) -> str:
    """The source as error messages name it."""
    config = f", config {source.name}" if source.name else ""
    return f"source {source.label} ({source.path}{config}, split {source.split})"


def local_place(source: Source, data: Path | None) -> str | None:
    """Where on this machine the source's files lie; None for a hub repository and for the generated world.

    A mirror's place is `mirror`, else the hub id's last part and the config: `cosmopedia/stories`. Raises DataError for
    a source that names no files, and for a path that is neither a folder here nor the id of a hub repository.
    """
    if source.is_generated:
        return None
    if data is not None and source.mirror is not None:
        return str(data / source.mirror)
    if source.path in BUILDERS:
        if not (source.data_dir or source.data_files):
            mirror = ", or give its mirror with --data DIR" if source.mirror is not None else ""
            raise DataError(f"{describe(source)} names no files: set data_files or data_dir{mirror}")
        return str(source.data_dir or source.data_files)
    if (folder := _own_folder(source)) is not None:
        return str(folder)
    if data is not None:
        return str(data / Path(source.path).name / (source.name or ""))
    if Path(source.path).is_file():
        raise DataError(
            f'{describe(source)}: {source.path} is a file: write path = "json" or "parquet", and data_files with it'
        )
    if not HUB_ID.fullmatch(source.path) and not (source.revision or "").startswith("sha256:"):
        home = " (~ must be written out)" if source.path.startswith("~") else ""
        raise DataError(
            f"{describe(source)}: there is no folder {source.path}{home}, and it is no id of a hub repository"
        )
    return None


def _own_folder(source: Source) -> Path | None:
    """The folder that the source itself names, and its `data_files` are in; None for a hub repository."""
    if source.path in BUILDERS:
        return Path(source.data_dir or "")
    return Path(source.path, source.data_dir or source.name or "") if Path(source.path).is_dir() else None


def local_files(source: Source, data: Path | None) -> list[Path]:
    """The source's files on this machine, in the order of their content; empty where there are none.

    Files that `data_files` names come in its order, those of a pattern (`*`, `**`) in that of their content. Raises
    DataError for one that is not there.
    """
    place = local_place(source, data)
    if place is None:
        return []
    mirrored = data is not None and source.mirror is not None
    if not source.data_files or mirrored or (folder := _own_folder(source)) is None:
        return find_files(Path(place), source.split)
    names = [source.data_files] if isinstance(source.data_files, str) else source.data_files
    found = {name: _named(folder, name, source.split) for name in names}
    if lost := [str(folder / name) for name, files in found.items() if files is None]:
        raise DataError(f"{describe(source)}: no such file: {', '.join(lost)}")
    return [path for name in names for path in found[name] or ()]


def _named(folder: Path, name: str, split: str) -> list[Path] | None:
    """The files that one name or pattern in `data_files` stands for; None where nothing is there."""
    if (folder / name).exists():
        return find_files(folder / name, split)
    files = [folder / found for found in glob.glob(name, root_dir=folder, recursive=True)]  # noqa: PTH207 - absolute, too
    return sorted((path for path in files if path.is_file()), key=content_hash) or None


def open_source(
    source: Source, data: Path | None, world: WorldConfig | None, columns: Sequence[str]
) -> "IterableDataset":
    """The rows of a source as a stream, with those columns only (all of them where none is named).

    `data` is a local mirror of the hub, or None. Local files are read in the order of their content. Raises
    DataError, before a row is drawn, for a source that cannot be reached, is empty, lacks a column or
    has other content than it is pinned to. Iterate with `draw`, which explains what fails later.
    """
    if source.is_generated:
        from datasets import Dataset

        if world is None:
            raise ConfigError(f"{describe(source)} reads the generated world, but there is no [world]")
        rows = GENERATED[source.path](world, source.name or "")
        if not rows:
            raise DataError(f"{describe(source)} is empty")
        stream = Dataset.from_list(rows).to_iterable_dataset()
    elif not is_remote(source, data):
        from datasets import IterableDataset

        # A list is what `shuffle` takes for shards; the columns, a tuple, go to each.
        kwargs = {"files": _check_local(source, data, columns), "columns": tuple(columns)}
        return IterableDataset.from_generator(read_rows, gen_kwargs=kwargs)
    else:
        stream = _open_hub(source)
    known = stream.column_names
    _require(columns, known, describe(source))
    if isinstance(source, TextSource):
        _require_text(source, stream.features.arrow_schema.field(source.text_column).type, describe(source))
    return stream.select_columns(list(columns)) if columns else stream


def _require(columns: Sequence[str], known: Sequence[str], where: str) -> None:
    if lost := [name for name in columns if name not in known]:
        raise DataError(f"{where}: no column {', '.join(map(repr, lost))}; it has {', '.join(known)}")


def _require_text(source: TextSource, kind: pa.DataType, where: str) -> None:
    if not is_text(kind):
        raise DataError(f"{where}: column {source.text_column!r} is {kind}, not text: set text_column to one that is")


def _check_local(source: Source, data: Path | None, columns: Sequence[str]) -> list[Path]:
    """The source's files on this machine that hold rows. Raises DataError as `open_source` does."""
    place, files = local_place(source, data), local_files(source, data)
    if not files:
        raise DataError(f"{describe(source)}: no Parquet or JSON files of this split at {place}")
    filled = []
    for path in files:
        if known := columns_of(path):
            _require(columns, known, f"{describe(source)}, {path}")
            if isinstance(source, TextSource) and (kind := column_type(path, source.text_column)) is not None:
                _require_text(source, kind, f"{describe(source)}, {path}")
            filled.append(path)
    if not filled:
        raise DataError(f"{describe(source)} is empty: {', '.join(map(str, files))} hold no rows")
    pinned, found = source.revision or "", revision_of(files)
    if pinned.startswith("sha256:") and pinned != found:
        raise DataError(f"{describe(source)} is pinned to {pinned}, but {place} holds {found}")
    return filled


def _open_hub(source: Source) -> "IterableDataset":
    from datasets import load_dataset
    from huggingface_hub import HfApi

    if (source.revision or "").startswith("sha256:"):
        raise DataError(
            f"{describe(source)} is pinned to local content ({source.revision}): "
            "give the folder that holds it with --data DIR"
        )
    try:
        # Asked first: load_dataset answers some failures with whatever an older run left in the cache.
        HfApi().dataset_info(source.path, revision=source.revision, timeout=60)
        stream = load_dataset(
            source.path,
            name=source.name,
            data_dir=source.data_dir,
            data_files=source.data_files,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        return stream if stream.column_names else stream._resolve_features()
    except Exception as error:
        raise hub_error(source, error) from error


def hub_error(source: Source, error: Exception) -> DataError:
    """What a failure of the hub or its client means, and what to do."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where, mirror = describe(source), "or give a local mirror with --data DIR"
    if isinstance(error, RevisionNotFoundError):
        return DataError(
            f"{where}: the hub has no revision {source.revision} (any more). Take it out of the experiment, "
            f"or of the .lock.json beside it, to pin the current one, {mirror}"
        )
    if isinstance(error, GatedRepoError):
        return DataError(f"{where} is gated: accept its terms on the hub and log in, {mirror}")
    if isinstance(error, RepositoryNotFoundError | DatasetNotFoundError):
        return DataError(f"{where}: the hub has no such data set, or it is private: check the id, {mirror}")
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, ValueError | TypeError | KeyError | DatasetsError):
        return DataError(f"{where}: {first}")
    return DataError(f"{where}: cannot read from the hub: {first}. Check the network and HF_ENDPOINT, {mirror}")


def draw(source: Source, stream: "IterableDataset") -> Iterator[dict[str, Any]]:
    """The rows of a stream that `open_source` opened. Raises DataError where reading fails."""
    try:
        yield from stream
    except VectorCLMError:
        raise
    except Exception as error:
        if source.is_generated or (source.revision or "").startswith("sha256:"):
            raise
        raise hub_error(source, error) from error


def is_remote(source: Source, data: Path | None) -> bool:
    """Whether the source is read from the hub, where only as much is read as is needed."""
    return not source.is_generated and local_place(source, data) is None


def read_source(
    source: Source, data: Path | None, world: WorldConfig | None, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The rows that `open_source` and `draw` give, of local files several times as fast."""
    if source.is_generated or is_remote(source, data):
        return draw(source, open_source(source, data, world, columns))
    return read_rows(_check_local(source, data, columns), tuple(columns))


def read_batches(source: TextSource, data: Path | None, world: WorldConfig | None, seed: int) -> Iterator[RowBatch]:
    """The texts of a source where its filter holds, some megabytes at a time.

    Of a repository of the hub, batches come by turns from OPEN_FILES of its files, which `seed` chooses and the next
    of which is opened where one ends. Raises DataError as `open_source` does, and where reading fails later.
    """
    condition = Filter(source.filter) if source.filter is not None else None
    if not (source.is_generated or is_remote(source, data)):
        for path in _check_local(source, data, source.columns()):
            yield from read_file_batches(path, source.text_column, condition)
        return
    stream = open_source(source, data, world, source.columns())
    if source.is_generated:
        yield from row_batches(iter(stream), source.text_column, condition, describe(source))
    else:
        try:
            for table in _by_turns(stream, seed):
                yield filtered(table, source.text_column, condition, describe(source))
        except VectorCLMError:
            raise
        except Exception as error:
            raise hub_error(source, error) from error


def _by_turns(stream: "IterableDataset", seed: int) -> Iterator[pa.Table]:
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
    """The texts some at a time: as many as have `length` characters or bytes, and no more than `count`."""
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


class TaskSource(Source):
    """A benchmark: a task as EleutherAI's lm-evaluation-harness defines it, or rows of context, choices and answer."""

    task: str | None = Field(None, description="Name of the harness's task or group; without, rows as they are")
    columns: dict[str, str] = Field(
        {}, description="Columns that the task reads and a mirror's files lack: Jinja expressions over theirs"
    )
    subset: str | None = Field(None, description="Of a group: the column that says which task's data a row is")
    shots: int | None = Field(None, ge=0, description="Worked examples before each item; without, the task's number")
    runs_code: bool = Field(False, description="Runs the programs that the model writes, and only if that is allowed")
    texts: list[str] = Field([], description="Columns that no document for training may repeat; none = all")
    limit: int = Field(0, ge=0, description="Items to score, a seeded draw; 0 = all")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns with the benchmark's texts; none = all."""
        return tuple(self.texts) if self.task is not None else CHOICE_COLUMNS


def drawn(task: TaskSource, count: int, seed: int) -> list[int]:
    """Which of a task's `count` items are scored, in their order: all, or a seeded draw of `task.limit`."""
    if not task.limit or task.limit >= count:
        return list(range(count))
    return sorted(random.Random(f"{seed} {task.label}").sample(range(count), task.limit))
