"""Document sources: `datasets.load_dataset` arguments as they are, and the seeded sample drawn from them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from pydantic import Field, model_validator

from vectorclm.errors import ConfigError, DataError, VectorCLMError
from vectorclm.mirror import columns_of, find_files, read_file, read_rows, revision_of
from vectorclm.progress import Progress
from vectorclm.settings import Settings
from vectorclm.world import WorldConfig
from vectorclm.world import rows as world_rows

WORLD = "world"  # the `path` of the generated sources
BUILDERS = ("parquet", "json")  # the `path` of sources that are plain local files

FILE_BYTES = 256 * 1024 * 1024  # text in one file of the sample
GROUP_BYTES = 16 * 1024 * 1024  # text in one row group at the most: what the writer holds in memory
GROUP_DOCUMENTS = 1000
SCHEMA = pa.schema([("text", pa.string()), ("id", pa.string())])


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


class TextSource(Source):
    """A source of documents."""

    text_column: str = "text"
    weight: float = Field(gt=0, description="Share of the sample's bytes, relative to the other sources")


class SampleConfig(Settings):
    """How many documents are drawn, and from where."""

    sources: list[TextSource] = Field(min_length=1)
    bytes: int = Field(gt=0, description="UTF-8 bytes to draw over all sources, divided by weight")
    validation_share: float = Field(0.005, gt=0, lt=0.5, description="Share of documents held out")
    shuffle_buffer: int = Field(10_000, ge=1, description="Documents held in memory to shuffle the stream")

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        labels = [source.label for source in self.sources]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two sources share a label: {', '.join(sorted(labels))}")
        return self


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

    A mirror's place is `mirror`, else the hub id's last part and the config: `cosmopedia/stories`.
    """
    if source.path == WORLD:
        return None
    if data is not None and source.mirror is not None:
        return str(data / source.mirror)
    if source.path in BUILDERS:
        return str(source.data_dir or source.data_files)
    if Path(source.path).is_dir():
        return str(Path(source.path, source.data_dir or source.name or ""))
    return str(data / Path(source.path).name / (source.name or "")) if data is not None else None


def local_files(source: Source, data: Path | None) -> list[Path]:
    """The source's files on this machine, in the order of their content; empty where there are none.

    Raises DataError for a file that `data_files` names and that is not there.
    """
    place = local_place(source, data)
    if place is None:
        return []
    if source.path in BUILDERS and source.data_files and not (data is not None and source.mirror):
        names = [source.data_files] if isinstance(source.data_files, str) else source.data_files
        paths = [Path(source.data_dir or "", name) for name in names]
        if lost := [str(path) for path in paths if not path.exists()]:
            raise DataError(f"{describe(source)}: no such file: {', '.join(lost)}")
        return [path for found in paths for path in find_files(found, source.split)]
    return find_files(Path(place), source.split)


def open_source(
    source: Source, data: Path | None, world: WorldConfig | None, columns: Sequence[str]
) -> IterableDataset:
    """The rows of a source as a stream, with those columns only (all of them where none is named).

    `data` is a local mirror of the hub, or None. Local files are read in the order of their content. Raises
    DataError, before a row is drawn, for a source that cannot be reached, is empty, lacks a column or
    has other content than it is pinned to. Iterate with `draw`, which explains what fails later.
    """
    if source.path == WORLD:
        if world is None:
            raise ConfigError(f"{describe(source)} reads the generated world, but there is no [world]")
        rows = world_rows(world, source.name or "")
        if not rows:
            raise DataError(f"{describe(source)} is empty")
        stream = Dataset.from_list(rows).to_iterable_dataset()
    elif (place := local_place(source, data)) is not None:
        return _open_local(source, place, local_files(source, data), columns)
    else:
        stream = _open_hub(source)
    known = stream.column_names
    _require(columns, known, describe(source))
    return stream.select_columns(list(columns)) if columns else stream


def _require(columns: Sequence[str], known: Sequence[str], where: str) -> None:
    if lost := [name for name in columns if name not in known]:
        raise DataError(f"{where}: no column {', '.join(map(repr, lost))}; it has {', '.join(known)}")


def _open_local(source: Source, place: str, files: list[Path], columns: Sequence[str]) -> IterableDataset:
    if not files:
        raise DataError(f"{describe(source)}: no Parquet or JSON files of this split at {place}")
    filled = []
    for path in files:
        if known := columns_of(path):
            _require(columns, known, f"{describe(source)}, {path}")
            filled.append(path)
    if not filled:
        raise DataError(f"{describe(source)} is empty: {', '.join(map(str, files))} hold no rows")
    pinned, found = source.revision or "", revision_of(files)
    if pinned.startswith("sha256:") and pinned != found:
        raise DataError(f"{describe(source)} is pinned to {pinned}, but {place} holds {found}")
    # A list is what `shuffle` takes for shards; the columns, a tuple, go to each.
    return IterableDataset.from_generator(read_rows, gen_kwargs={"files": filled, "columns": tuple(columns)})


def _open_hub(source: Source) -> IterableDataset:
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


def draw(source: Source, stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """The rows of a stream that `open_source` opened. Raises DataError where reading fails."""
    try:
        yield from stream
    except VectorCLMError:
        raise
    except Exception as error:
        if source.path == WORLD or (source.revision or "").startswith("sha256:"):
            raise
        raise hub_error(source, error) from error


@dataclass
class _Drawn:
    """What one source gave."""

    documents: int = 0
    bytes: int = 0
    validation_documents: int = 0
    validation_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "not_text": 0, "duplicate": 0})
    exhausted: bool = True


def write_sample(
    config: SampleConfig, seed: int, out: Path, *, data: Path | None, world: WorldConfig | None
) -> dict[str, Any]:
    """Draw each source's share of `config.bytes` into `out/{label}/{train,validation}-00000.parquet`.

    A document is held out for validation by the hash of its text, so equal texts never stand on both sides;
    empty documents, those that are no text, and exact duplicates over all sources are dropped and counted.
    Memory is the shuffle buffer, one row group, and about 100 bytes a document to know duplicates by.

    Returns `{"documents", "bytes", "sources": {label: {"documents", "bytes", "validation_documents",
    "validation_bytes", "dropped": {reason: count}, "exhausted"}}}`; `documents` and `bytes` are those for
    training, and `exhausted` says that the source ended before its share was drawn. Raises DataError for a
    source that cannot be read, or that gives no document for training or none for validation.
    """
    total = sum(source.weight for source in config.sources)
    seen: set[int] = set()
    drawn: dict[str, _Drawn] = {}
    with Progress("sample", config.bytes, "bytes") as progress:
        for source in config.sources:
            stream = open_source(source, data, world, [source.text_column])
            stream = stream.shuffle(seed=seed, buffer_size=config.shuffle_buffer)
            budget = round(config.bytes * source.weight / total)
            texts = (row[source.text_column] for row in draw(source, stream))
            folder = out / source.label
            drawn[source.label] = _write_source(texts, budget, config, seed, seen, folder, progress)
            _check_split(source, drawn[source.label], config.validation_share)
    return {
        "documents": sum(item.documents for item in drawn.values()),
        "bytes": sum(item.bytes for item in drawn.values()),
        "sources": {label: vars(item) for label, item in drawn.items()},
    }


def _write_source(
    texts: Iterator[Any],
    budget: int,
    config: SampleConfig,
    seed: int,
    seen: set[int],
    folder: Path,
    progress: Progress,
) -> _Drawn:
    """Take documents until `budget` bytes are reached."""
    drawn = _Drawn()
    limit = int(config.validation_share * 2**64)
    folder.mkdir(parents=True)
    with _Writer(folder, "train") as train, _Writer(folder, "validation") as validation:
        for text in texts:
            data = _utf8(text)
            if data is None or not text.strip():
                drawn.dropped["not_text" if data is None else "empty"] += 1
                continue
            key = xxhash.xxh3_128_intdigest(data)
            if key in seen:
                drawn.dropped["duplicate"] += 1
                continue
            seen.add(key)
            held_out = xxhash.xxh3_64_intdigest(data, seed=seed) < limit
            (validation if held_out else train).add(text, f"{key:032x}", len(data))
            progress.advance(len(data), folder.name)
            if train.bytes + validation.bytes >= budget:
                drawn.exhausted = False
                break
    drawn.documents, drawn.bytes = train.documents, train.bytes
    drawn.validation_documents, drawn.validation_bytes = validation.documents, validation.bytes
    return drawn


def _utf8(text: Any) -> bytes | None:
    """The text's bytes; None for what is no string or holds half a surrogate pair, which UTF-8 cannot say."""
    try:
        return text.encode() if isinstance(text, str) else None
    except UnicodeEncodeError:
        return None


def _check_split(source: TextSource, drawn: _Drawn, share: float) -> None:
    if drawn.documents and drawn.validation_documents:
        return
    dropped = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in drawn.dropped.items() if count)
    side = "validation" if drawn.documents else "training"
    raise DataError(
        f"{describe(source)} gave {drawn.documents} documents for training and {drawn.validation_documents} "
        f"for validation (dropped: {dropped or 'none'}); {side} needs at least one. "
        f"Raise sample.bytes, or change sample.validation_share ({share})"
    )


class _Writer:
    """The documents of one split as zstd Parquet: a new file after every FILE_BYTES of text."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.documents = self.bytes = 0
        self._files = self._in_file = self._in_group = 0
        self._file: pq.ParquetWriter | None = None
        self._texts: list[str] = []
        self._ids: list[str] = []

    def __enter__(self) -> Self:
        return self

    def add(self, text: str, identifier: str, size: int) -> None:
        """One more document, of `size` UTF-8 bytes."""
        self._texts.append(text)
        self._ids.append(identifier)
        self.documents += 1
        self.bytes += size
        self._in_group += size
        if len(self._texts) >= GROUP_DOCUMENTS or self._in_group >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._texts:
            return
        if self._file is None:
            path = self.folder / f"{self.split}-{self._files:05d}.parquet"
            self._file = pq.ParquetWriter(path, SCHEMA, compression="zstd")
            self._files += 1
        self._file.write_table(pa.table([self._texts, self._ids], schema=SCHEMA))
        self._in_file += self._in_group
        self._texts, self._ids, self._in_group = [], [], 0
        if self._in_file >= FILE_BYTES:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file, self._in_file = None, 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._close()


def read_texts(directory: Path, split: str) -> Iterator[str]:
    """The documents of one split (`train`, `validation`) of one source's folder in a sample, in their order.

    Raises DataError where the folder has no such files.
    """
    paths = sorted(directory.glob(f"{split}-*.parquet"))
    if not paths:
        raise DataError(f"{directory} has no {split}-*.parquet: it is no source of a sample")
    for path in paths:
        for row in read_file(path, ("text",)):
            yield row["text"]
