"""Settings of data sources, in the terms of `datasets.load_dataset`, and where their files lie on this machine."""

import glob
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from vectorclm.corpus.file_formats import FORMATS
from vectorclm.corpus.files import content_hash, find_files, list_folder, why_left_out
from vectorclm.corpus.filters import Filter
from vectorclm.corpus.remote_files import fetch, is_address
from vectorclm.corpus.synthetic_world import rows as world_rows
from vectorclm.errors import DataError
from vectorclm.formats.files import is_there
from vectorclm.settings import LARGEST_WEIGHT, NAME, NAME_LENGTH, Settings

CHOICE_COLUMNS = ("context", "choices", "answer")  # columns of a benchmark that the harness does not define


GENERATED = {"world": world_rows}  # `path` of a generated source -> function that returns its rows by name
BUILDERS = tuple(known.name for known in FORMATS)  # the `path` of a source of files
MEANT = {suffix.lstrip("."): known.name for known in FORMATS for suffix in known.suffixes} | {"jsonlines": "json"}
OWN_FILES = ("manifest.json", "prompts.jsonl")  # of artifacts whose folders have the names of labels
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Source(Settings):
    """A data set to read: the arguments of `datasets.load_dataset`, and a label.

    `revision` is a commit of the hub repository, or `sha256:` of the content of local files.
    """

    label: str = Field(pattern=NAME, max_length=NAME_LENGTH, description="Name of the source in file names and metrics")
    path: str = Field(
        description="Hub id, local folder or file, s3://…, "
        f"{', '.join(BUILDERS[:-1])} or {BUILDERS[-1]} (with data_files), or {' or '.join(GENERATED)}"
    )
    name: str | None = Field(default=None, description="The hub's config")
    split: str = Field(default="train", description="Split of the data set")
    data_dir: str | None = Field(default=None, description="Folder of the files inside `path`")
    data_files: str | list[str] | None = Field(default=None, description="Files, or patterns such as texts/*.jsonl")
    revision: str | None = Field(
        default=None, description="Commit, branch or tag; if unset, the first run pins the commit in the lock file"
    )
    mirror: str | None = Field(default=None, description="Folder or file of this source inside `--data DIR`")

    @field_validator("label")
    @classmethod
    def _is_free(cls, label: str) -> str:
        if label in OWN_FILES:
            raise ValueError("an artifact has a file of this name: choose another label")
        return label

    @field_validator("path")
    @classmethod
    def _is_read(cls, path: str) -> str:
        if "/" in path or path in (*GENERATED, *BUILDERS):
            return path
        if (meant := MEANT.get(path.lower().lstrip("."), path.lower())) in BUILDERS:
            raise ValueError(f"did you mean {meant!r}? (write ./{path} for a folder of this name)")
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

        if path in _PACKAGED_DATASETS_MODULES:
            raise ValueError(
                f"{path} files are not supported: local files must be {' or '.join(BUILDERS)}, so convert them "
                f"(write ./{path} for a folder of this name)"
            )
        return path

    @property
    def is_generated(self) -> bool:
        """Whether the rows are generated from the experiment's [world] instead of read from files."""
        return self.path in GENERATED


class TextSource(Source):
    """A source of documents for training."""

    text_column: str = Field(default="text", description="Column with the documents")
    weight: float = Field(
        gt=0, le=LARGEST_WEIGHT, description="Share of the sample's bytes, relative to the other sources"
    )
    filter: str | None = Field(
        default=None, description="Condition on the rows, such as int_score >= 3 and token_count < 8000"
    )
    min_bytes: int = Field(default=1, ge=1, description="Shorter documents are dropped (UTF-8 bytes)")
    max_bytes: int = Field(default=10_000_000, ge=1, lt=2**31, description="Longer documents are dropped (UTF-8 bytes)")

    @field_validator("filter")
    @classmethod
    def _is_filter(cls, text: str | None) -> str | None:
        if text is not None:
            Filter(text)
        return text

    def columns(self) -> tuple[str, ...]:
        """The columns to read: the text, and the columns of the filter."""
        others = Filter(self.filter).columns if self.filter is not None else []
        return tuple(dict.fromkeys([self.text_column, *others]))


class BenchmarkSource(Source):
    """A benchmark whose texts must not occur in training documents."""

    columns: list[str] = Field(description="Columns with the texts, nested ones included; empty = all")


class CorpusConfig(Settings):
    """Sources of the training text, and the size of the sample drawn from them."""

    sources: list[TextSource] = Field(min_length=1)
    bytes: int = Field(gt=0, description="UTF-8 bytes to draw from all sources together, divided by weight")
    validation_share: float = Field(default=0.005, gt=0, lt=0.5, description="Share of documents held out")
    decontaminate: bool = Field(
        default=True, description="Drop documents and conversations that share 13 words in a row with a benchmark"
    )
    decontaminate_with: list[BenchmarkSource] = Field(
        default=[], description="Further benchmarks, in addition to evaluate.tasks"
    )

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        check_labels(self.sources)
        check_labels(self.decontaminate_with)
        return self


def check_labels(sources: Sequence[Source]) -> None:
    """Raise ValueError where two sources share a label, because labels name files and metrics."""
    labels = [source.label for source in sources]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two sources share a label: {', '.join(sorted(labels))}")


S = TypeVar("S", bound=Source)


def identity(source: Source) -> dict[str, Any]:
    """The fields of a source that enter a fingerprint: never its location, and for local content not its name."""
    by_content = (source.revision or "").startswith("sha256:")
    where = {"path", "name", "split", "data_dir", "data_files", "mirror"} if by_content else {"mirror"}
    return source.model_dump(mode="json", exclude=where)


def describe(source: Source) -> str:
    """The source's name in error messages."""
    config = f", config {source.name}" if source.name else ""
    return f"source {source.label} ({source.path}{config}, split {source.split})"


def local_place(source: Source, data: Path | None) -> str | None:
    """The location of the source's files on this machine; None for a hub repository and for the generated world.

    In a local mirror, the location is `mirror`, or else the last part of the hub id and the config, such as
    `cosmopedia/stories`. Raises DataError for a source that names no files, and for a path that is neither a local
    folder nor a hub id.
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
    if (file := Path(source.path).expanduser()).is_file():
        return str(file)
    if data is not None:
        return str(data / Path(source.path).name / (source.name or ""))
    if not HUB_ID.fullmatch(source.path) and not (source.revision or "").startswith("sha256:"):
        raise DataError(
            f"{describe(source)}: there is no folder {Path(source.path).expanduser().absolute()}, and it is not the id "
            "of a hub repository"
        )
    return None


def _own_folder(source: Source) -> Path | None:
    """The local folder of the source, which holds its `data_files`; None for a hub repository."""
    if source.path in BUILDERS:
        return Path(source.data_dir or "").expanduser()
    if is_address(source.path):
        return _fetched(source, source.path) / (source.data_dir or source.name or "")
    folder = Path(source.path).expanduser()
    return folder / (source.data_dir or source.name or "") if folder.is_dir() else None


def _fetched(source: Source, address: str) -> Path:
    try:
        return fetch(address)
    except DataError as error:
        raise DataError(f"{describe(source)}: {error}") from error


def local_files(source: Source, data: Path | None) -> list[Path]:
    """The source's files on this machine, ordered by the SHA-256 of their content; empty where there are none.

    Files that `data_files` names keep its order; the files of one pattern (`*`, `**`) are ordered by content. Raises
    DataError for a named file that does not exist.
    """
    place = local_place(source, data)
    if place is None:
        return []
    mirrored = data is not None and source.mirror is not None
    if not source.data_files or mirrored or (folder := _own_folder(source)) is None:
        return find_files(Path(place), source.split)
    names = [source.data_files] if isinstance(source.data_files, str) else source.data_files
    found = {name: _named(source, folder, name) for name in names}
    if lost := [str((folder / Path(name).expanduser()).absolute()) for name, files in found.items() if files is None]:
        raise DataError(f"{describe(source)}: no such file: {', '.join(lost)}")
    return [path for name in names for path in found[name] or ()]


def _named(source: Source, folder: Path, name: str) -> list[Path] | None:
    """The files that a name, a pattern or an address in `data_files` matches; None where there is no match."""
    if is_address(name):
        return find_files(_fetched(source, name), source.split)
    name = str(Path(name).expanduser())
    if (folder / name).exists():
        return find_files(folder / name, source.split)
    files = [folder / found for found in glob.glob(name, root_dir=folder, recursive=True)]  # noqa: PTH207 - absolute, too
    return sorted((path for path in files if path.is_file()), key=content_hash) or None


def left_out(source: Source, data: Path | None) -> str | None:
    """The files in the source's own folder that are not read, and why, in one line; None where all are read."""
    if source.is_generated or source.data_files or (data is not None and source.mirror is not None):
        return None
    folder = _own_folder(source)
    if folder is None or not folder.is_dir():
        return None
    others = list_folder(folder, source.split).left_out
    expected = {path: why for path, why in others.items() if not why.startswith("its name says")}
    if not expected:  # a folder whose files are all named by splits
        return None
    return f"{describe(source)} does not read {why_left_out(others, folder)}"


def anchored(source: S, folder: Path) -> S:
    """The source with its local paths relative to a folder, in which `~` is the home folder."""

    def local(text: str) -> str:
        return text if is_address(text) else str(folder / Path(text).expanduser())

    if source.path in BUILDERS:
        if source.data_dir is not None:
            return source.model_copy(update={"data_dir": local(source.data_dir)})
        files = source.data_files
        named = None if files is None else local(files) if isinstance(files, str) else [local(name) for name in files]
        return source.model_copy(update={"data_files": named})
    marked = source.path.startswith(("./", "../", "~")) or source.path in (".", "..")
    if source.is_generated or is_address(source.path) or not (marked or is_there(folder / source.path)):
        return source
    return source.model_copy(update={"path": local(source.path)})


def is_remote(source: Source, data: Path | None) -> bool:
    """Whether the source is read from the hub, and so only as far as needed."""
    return not source.is_generated and local_place(source, data) is None


class TaskSource(Source):
    """A benchmark: a task defined by EleutherAI's lm-evaluation-harness, or rows of context, choices and answer."""

    task: str | None = Field(
        default=None,
        description="Task or group of lm-evaluation-harness; if unset, rows have context, choices (each choice begins "
        "with its space) and answer (an index from 0)",
    )
    columns: dict[str, str] = Field(
        default={},
        description="Columns that the task needs and the files lack, as Jinja expressions of their columns; with task, "
        "of a mirror's files only",
    )
    subset: str | None = Field(default=None, description="For a group: the column that names the task of a row")
    shots: int | None = Field(
        default=None, ge=0, description="Worked examples before each item; if unset, the task's own number"
    )
    runs_code: bool = Field(
        default=False, description="Whether scoring executes programs that the model writes, which needs permission"
    )
    texts: list[str] = Field(default=[], description="Columns to decontaminate the training text against; empty = all")
    limit: int = Field(default=0, ge=0, description="Items to score, drawn with the seed; 0 = all")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns with the benchmark's texts; empty = all."""
        return self.row_columns or tuple(self.texts)

    @property
    def row_columns(self) -> tuple[str, ...]:
        """The columns that the files must have; empty = all are read, which the task or `columns` may need."""
        return CHOICE_COLUMNS if self.task is None and not self.columns else ()


def benchmark_sources(config: CorpusConfig, tasks: Sequence[TaskSource]) -> list[BenchmarkSource]:
    """The benchmarks to decontaminate against: all items of `tasks`, whatever their limit, and `decontaminate_with`.

    Raises ValueError where two of them share a label.
    """
    if not config.decontaminate:
        return []
    of_tasks = [
        BenchmarkSource(**task.model_dump(include=set(Source.model_fields)), columns=list(task.text_columns))
        for task in tasks
    ]
    sources = [*of_tasks, *config.decontaminate_with]
    check_labels(sources)
    return sources


def drawn(task: TaskSource, count: int, seed: int) -> list[int]:
    """Indices of the items to score, sorted: all `count` of a task, or a seeded draw of `task.limit`."""
    if not task.limit or task.limit >= count:
        return list(range(count))
    return sorted(random.Random(f"{seed} {task.label}").sample(range(count), task.limit))
