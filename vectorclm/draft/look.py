"""A look at the first rows of sources: how much text, how many conversations and how many questions they have, about.

Nothing is downloaded: of a hub repository nothing is known before it is read.
"""

import bz2
import itertools
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from vectorclm.corpus.candidates import clean_texts
from vectorclm.corpus.decontamination import strings
from vectorclm.corpus.file_formats import PARQUET, TEXT, format_of, read_file_batches, read_rows
from vectorclm.corpus.filters import Filter
from vectorclm.corpus.lines import COMPRESSIONS, first_bytes, lines_of
from vectorclm.corpus.sources import GENERATED, Source, TaskSource, TextSource, is_remote, local_files
from vectorclm.corpus.synthetic_world import WorldConfig
from vectorclm.errors import DataError
from vectorclm.formats.limits import XZ_MEMORY
from vectorclm.formats.parquet import open_parquet
from vectorclm.shards.config import ChatSource
from vectorclm.shards.conversations import find_fault, read_conversation, without_empty_system

TEXT_BYTES = 8_000_000  # of text that are read of a source
KEPT_TEXT = 500_000  # characters that are kept
FEW_ROWS = 300  # conversations or questions that are looked at
FEW_DOCUMENTS = 400  # of the generated world
START_BYTES = 2**18  # of a compressed file
TURN_BYTES = 24  # what the chat template adds to a turn, about


@dataclass
class TextLook:
    """The text of a source: bytes that pass its filter (None = unknown), and a typical document."""

    bytes: int | None = None
    document_bytes: float = 3000.0
    generated: int = 0  # documents that are generated instead of read
    texts: list[str] = field(default_factory=list)


@dataclass
class ChatLook:
    """The conversations of a source: how many there are (None = unknown), and a typical one in bytes."""

    conversations: int | None = None
    bytes: float = 2000.0
    answers: Sequence[int] = (1200,)  # the bytes of first answers


@dataclass
class TaskLook:
    """The questions of a benchmark that are scored, and the bytes of a typical one."""

    items: int
    bytes: float = 600.0


def look_at_text(source: TextSource, data: Path | None, world: WorldConfig | None) -> TextLook:
    """The text of a source. Raises DataError where its files cannot be read."""
    if source.is_generated:
        few, times = _few(source, world, "documents", FEW_DOCUMENTS)
        texts = [str(row[source.text_column]) for row in few if row.get(source.text_column)]
        size = sum(len(text.encode()) for text in texts)
        return TextLook(round(size * times), size / max(1, len(texts)), round(len(few) * times), texts)
    if is_remote(source, data):
        return TextLook()
    found, documents, kept = TextLook(0), 0, 0
    files = local_files(source, data)
    looked = 0.0  # bytes of files as they are stored
    for path in files:
        size, share = 0, 1.0
        for text in _texts(path, source):
            size += len(text)
            documents += 1
            if kept < KEPT_TEXT:
                found.texts.append(text.decode())
                kept += len(text)
            if kept + size > TEXT_BYTES:
                share = _share_read(path, documents, source)
                break
        found.bytes = (found.bytes or 0) + size
        looked += path.stat().st_size * share
        if share < 1 or found.bytes > TEXT_BYTES:
            break
    found.document_bytes = (found.bytes or 0) / max(1, documents)
    total = sum(path.stat().st_size for path in files)
    found.bytes = round((found.bytes or 0) * total / max(1.0, looked))
    return found


def _few(source: Source, world: WorldConfig | None, count: str, few: int) -> tuple[list[dict[str, Any]], float]:
    """Some rows of the generated world, and how many times as many there are."""
    if world is None:
        raise DataError(f"{source.label} reads the generated world, but there is no [world]")
    all_rows = getattr(world, count)
    part = world.model_copy(update={count: min(few, all_rows)})
    return GENERATED[source.path](part, source.name or ""), all_rows / getattr(part, count)


def _texts(path: Path, source: TextSource) -> Iterator[bytes]:
    condition = Filter(source.filter) if source.filter is not None else None
    for batch in read_file_batches(path, source.text_column, condition):
        yield from clean_texts(source, batch.texts, Counter())


def _share_read(path: Path, rows: int, source: TextSource) -> float:
    """The share of a file that its first rows take; with a filter, of those that pass it, so about."""
    if format_of(path) is PARQUET:
        return min(1.0, rows / max(1, _parquet_rows(path)))
    if format_of(path) is TEXT or source.filter is not None:
        return min(1.0, TEXT_BYTES / unpacked_bytes(path))
    read = sum(len(line.encode(errors="surrogateescape")) for line in _lines(path, rows))
    return min(1.0, read / max(1, unpacked_bytes(path)))


def _lines(path: Path, count: int) -> Iterator[str]:
    return itertools.islice(lines_of(path, "surrogateescape"), count)


def _parquet_rows(path: Path) -> int:
    with open_parquet(path, str(path)) as file:
        return int(file.metadata.num_rows)


def unpacked_bytes(path: Path) -> int:
    """The size of a file when it is decompressed, about: its beginning tells how far it shrank."""
    size, start = path.stat().st_size, first_bytes(path, START_BYTES)
    kind = next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)
    if kind is None:
        return size
    try:
        unpacked = len(_unpacker(kind).decompress(start))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError):
        return size  # reading it will say what is wrong
    return round(size * max(1.0, unpacked / len(start)))


def _unpacker(kind: str) -> Any:
    match kind:
        case "gzip":
            return zlib.decompressobj(wbits=31)
        case "bz2":
            return bz2.BZ2Decompressor()
        case "xz":
            return lzma.LZMADecompressor(memlimit=XZ_MEMORY)
        case _:
            return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def look_at_chat(source: ChatSource, data: Path | None, world: WorldConfig | None) -> ChatLook:
    """The conversations of a source. Raises DataError where its files cannot be read."""
    if source.is_generated:
        rows, times = _few(source, world, "conversations", FEW_ROWS)
        there: int | None = round(len(rows) * times)
    elif is_remote(source, data):
        return ChatLook()
    else:
        files = local_files(source, data)
        rows = list(itertools.islice(read_rows(files, (source.column,)), FEW_ROWS))
        there = _count_rows(files)
    sizes, answers = [], []
    for row in rows:
        try:
            turns = read_conversation(without_empty_system(row.get(source.column)), "")
        except DataError:
            continue
        if find_fault(turns) is None and (said := [turn for turn in turns if turn.role == "assistant"]):
            sizes.append(sum(len(turn.content.encode()) + TURN_BYTES for turn in turns))
            answers.append(len(said[0].content.encode()))
    if not sizes:
        return ChatLook(there)
    return ChatLook(there, sum(sizes) / len(sizes), answers)


def _count_rows(files: Sequence[Path]) -> int:
    """The rows in files, about."""
    rows = 0.0
    for path in files:
        if format_of(path) is PARQUET:
            rows += _parquet_rows(path)
            continue
        lines = [len(line.encode(errors="surrogateescape")) for line in _lines(path, FEW_ROWS)]
        rows += len(lines) if len(lines) < FEW_ROWS else unpacked_bytes(path) * FEW_ROWS / max(1, sum(lines))
    return round(rows)


def look_at_task(task: TaskSource, data: Path | None, world: WorldConfig | None) -> TaskLook:
    """The questions of a benchmark. Raises DataError where its files cannot be read."""
    if is_remote(task, data):
        return TaskLook(task.limit or 1000)
    rows: Sequence[Mapping[str, Any]]
    if task.is_generated:
        assert world is not None  # else the experiment was refused
        rows = GENERATED[task.path](world, task.name or "")
        count = len(rows)
    else:
        files = local_files(task, data)
        rows = list(itertools.islice(read_rows(files, ()), FEW_ROWS))
        count = _count_rows(files)
    size = sum(len(text.encode(errors="replace")) for row in rows[:FEW_ROWS] for text in strings(dict(row)))
    return TaskLook(min(count, task.limit or count), size / max(1, min(len(rows), FEW_ROWS)))
