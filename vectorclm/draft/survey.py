"""A look at one's own text and conversations: size, documents, duplicates, lengths and script."""

import glob
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import xxhash

from vectorclm.corpus.candidates import clean_texts
from vectorclm.corpus.file_formats import (
    TEXT,
    column_type,
    columns_of,
    format_of,
    is_text,
    named_format,
    read_rows,
    suffix_format,
)
from vectorclm.corpus.remote_files import is_address
from vectorclm.corpus.source_reader import read_batches, read_source
from vectorclm.corpus.sources import HUB_ID, TextSource, left_out, local_files
from vectorclm.corpus.summary import drop_counts
from vectorclm.errors import DataError
from vectorclm.shards.config import ChatSource
from vectorclm.shards.conversations import (
    MalformedConversationError,
    Turn,
    find_fault,
    read_conversation,
    without_empty_system,
)

READ_BYTES = 200_000_000  # text that is read; of more, the rest is not looked at
HUB_BYTES = 20_000_000  # the same for a hub repository
CONVERSATIONS = 50_000  # conversations that are read
FEW_FILES = 40  # of fewer text files, each blank-line-separated part is a document
PREFERRED = ("text", "content", "body", "document", "article", "story", "markdown", "passage")
CHAT_COLUMNS = ("messages", "conversations", "conversation", "turns", "dialog", "dialogue", "chat")
LONGEST_QUESTION = 120  # characters of a question that is shown in summaries
KEPT_TEXT = 4_000_000  # characters of text that are kept for the tokenizer
SCRIPT_LETTERS = 20_000  # letters whose script is looked at


@dataclass
class TextSurvey:
    """What a source of documents holds."""

    source: TextSource
    label: str
    place: str  # as it was named
    files: int
    documents: int = 0
    bytes: int = 0
    duplicates: int = 0
    whole: bool = True  # whether all of the text was read
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    ranks: list[tuple[int, int]] = field(default_factory=list)  # where a document falls when some are held out; bytes
    texts: list[str] = field(default_factory=list)  # of the first documents
    note: str | None = None  # the files that are not read

    @property
    def median_bytes(self) -> float:
        """The length of a typical document, in bytes."""
        return float(median(self.lengths)) if self.lengths else 0.0

    @property
    def script(self) -> str:
        """The script of most letters, such as Latin or Cyrillic."""
        letters: Counter[str] = Counter()
        for text in self.texts:
            letters.update(unicodedata.name(c, "other").split()[0] for c in text[:2000] if c.isalpha())
            if letters.total() > SCRIPT_LETTERS:
                break
        return letters.most_common(1)[0][0].capitalize() if letters else "no letters"


@dataclass
class ChatSurvey:
    """What a source of conversations holds."""

    source: ChatSource
    place: str
    conversations: int = 0
    bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    questions: list[str] = field(default_factory=list)


def survey_text(place: str, label: str, folder: Path, seed: int) -> TextSurvey:
    """Look at the documents of a file, folder, pattern, hub id or address. Raises DataError where there are none."""
    named = _source_of(place, folder)
    probe = TextSource(label=label, weight=1.0, **named)
    files = local_files(probe, None) if "/" not in probe.path or _is_own(place) else []
    column = _text_column(probe, files)
    source = probe.model_copy(update={"text_column": column})
    found = TextSurvey(source, label, place, len(files), note=left_out(source, None))
    limit, seen, kept = READ_BYTES if files else HUB_BYTES, set[int](), 0
    batches = read_batches(source, None, None, seed)
    for text in (text for batch in batches for text in clean_texts(source, batch.texts, found.dropped)):
        keyed = xxhash.xxh3_128_intdigest(text, seed=seed)
        if keyed in seen:
            found.duplicates += 1
            continue
        seen.add(keyed)
        found.documents += 1
        found.bytes += len(text)
        found.lengths.append(len(text))
        found.ranks.append((keyed & 0xFFFFFFFFFFFFFFFF, len(text)))
        if kept < KEPT_TEXT:
            found.texts.append(text.decode())
            kept += len(text)
        if found.bytes >= limit:
            found.whole = False
            break
    if not found.documents:
        lost = f" ({drop_counts(found.dropped, {})})" if found.dropped else ""
        raise DataError(f"{place} has no documents{lost}: name a folder, a file or a column of text")
    return found


def _is_own(place: str) -> bool:
    """Whether a place is on this machine or at an address, and not a hub id."""
    local = Path(place).expanduser()
    return (
        is_address(place)
        or suffix_format(local) is not None
        or local.exists()
        or glob.has_magic(place)
        or HUB_ID.fullmatch(place) is None
    )


def _source_of(place: str, folder: Path) -> dict[str, Any]:
    """The `path` and `data_files` of a source at a place; local paths are absolute here. Raises DataError."""
    if not _is_own(place):
        return {"path": place}
    if is_address(place):
        names_file = glob.has_magic(place) or re.search(r"\.\w{2,8}$", place.rpartition("/")[2])
        return {"path": named_format(place).name, "data_files": place} if names_file else {"path": place}
    local = folder / Path(place).expanduser()
    if glob.has_magic(str(local)) and not local.exists():
        found = [Path(name) for name in glob.glob(str(local), recursive=True) if Path(name).is_file()]  # noqa: PTH207
        kinds = {format_of(path).name for path in found}
        if len(kinds) != 1:
            raise DataError(f"{local} matches {'files of ' + ' and '.join(sorted(kinds)) if kinds else 'no files'}")
        return {"path": kinds.pop(), "data_files": str(local)}
    if local.is_file():
        return {"path": format_of(local).name, "data_files": str(local)}
    if not local.is_dir():
        raise DataError(f"there is nothing at {local}: name a file, a folder, a pattern, a hub id or an address")
    return {"path": str(local)}


def _text_column(source: TextSource, files: Sequence[Path]) -> str:
    """The column with the documents: of text files the file or its parts, else the strings with the most text."""
    if files and all(format_of(path) is TEXT for path in files):
        return "text" if len(files) >= FEW_FILES else "part"
    if files:
        known = [name for name in columns_of(files[0]) if _may_be_text(files[0], name)]
        rows: Iterator[Mapping[str, Any]] = read_rows(files[:1], ())
    else:
        rows = read_source(source, None, None, ())
        known = []
    lengths: Counter[str] = Counter()
    for _, row in zip(range(200), rows, strict=False):
        lengths.update({name: len(value) for name, value in row.items() if isinstance(value, str)})
    usual = [name for name in PREFERRED if lengths[name] * 4 > max(lengths.values(), default=0) > 0]
    if not lengths:
        raise DataError(f"{source.path}: no column of its {', '.join(known) or 'rows'} has text")
    return usual[0] if usual else lengths.most_common(1)[0][0]


def _may_be_text(path: Path, column: str) -> bool:
    kind = column_type(path, column)
    return kind is None or is_text(kind)


def survey_chat(place: str, label: str, folder: Path) -> ChatSurvey:
    """Look at the conversations at a place, as `survey_text`. Raises DataError where there are none."""
    probe = ChatSource(label=label, conversations=1, **_source_of(place, folder))
    rows = read_source(probe, None, None, ())
    column, found = None, ChatSurvey(probe, place)
    for _, row in zip(range(CONVERSATIONS), rows, strict=False):
        column = column or _chat_column(row)
        if column is None:
            continue
        try:
            turns = read_conversation(without_empty_system(row.get(column)), place)
        except MalformedConversationError as error:
            found.dropped[error.reason] += 1
            continue
        fault = find_fault(turns)
        if fault or not any(turn.role == "assistant" for turn in turns):
            found.dropped[fault[0] if fault else "no_assistant"] += 1
            continue
        _count(found, turns)
    if column is None or not found.conversations:
        raise DataError(f"{place} has no conversations: a column such as messages holds lists of role and content")
    found.source = probe.model_copy(update={"column": column, "conversations": found.conversations})
    return found


def _count(found: ChatSurvey, turns: Sequence[Turn]) -> None:
    found.conversations += 1
    found.bytes += sum(len(turn.content.encode()) + 16 for turn in turns)
    question = next(turn.content for turn in turns if turn.role == "user")
    if len(found.questions) < 3 and len(question) < LONGEST_QUESTION and "\n" not in question:
        found.questions.append(question)


def _chat_column(row: Mapping[str, Any]) -> str | None:
    """The column of a row that holds turns."""
    for name in sorted(row, key=lambda name: name not in CHAT_COLUMNS):
        value = row[name]
        if isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            try:
                turns = read_conversation(without_empty_system(value), "")
            except DataError:
                continue
            if len(turns) > 1:
                return name
    return None


def relative(place: str, folder: Path) -> str:
    """A local path as an experiment file in `folder` writes it."""
    if is_address(place) or not Path(place).is_absolute():
        return place
    inside = os.path.relpath(place, folder)
    if inside.startswith("../.."):
        return os.path.normpath(place)
    return inside if inside.startswith("..") else f"./{inside}"
