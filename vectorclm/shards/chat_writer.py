"""Writes chat shards for instruction tuning: filters, renders and packs conversations, and holds some out."""

import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vectorclm.corpus.decontamination import Benchmarks
from vectorclm.corpus.summary import drop_counts
from vectorclm.errors import DataError
from vectorclm.formats.json_files import table_lines
from vectorclm.runtime.progress import Progress
from vectorclm.runtime.workers import Shared, current_workers
from vectorclm.settings import canonical_json
from vectorclm.shards.config import SPLITS, ChatConfig, ChatSource
from vectorclm.shards.conversations import (
    MalformedConversationError,
    Turn,
    find_fault,
    fit,
    read_conversation,
    without_empty_system,
)
from vectorclm.shards.packing import pack
from vectorclm.shards.writer import ShardWriter, token_dtype
from vectorclm.store.artifact import Artifact
from vectorclm.tokenizer import PAD_ID

BATCH = 256  # conversations checked against the benchmarks at a time


class MalformedRowError(DataError):
    """A row of a source is no conversation; `at` says where it stands."""

    def __init__(self, source: ChatSource, row: Any, number: int, fault: str) -> None:
        self.source, self.row, self.fault = source, row, fault.removeprefix(": ")
        super().__init__(self._message(f"row {number} as drawn"))

    def at(self, place: str) -> DataError:
        """The same error with the place of the row in the source's files."""
        return DataError(self._message(place))

    def _message(self, place: str) -> str:
        return (
            f"{self.source.label}, {place}, column {self.source.column}: {self.fault}. "
            "Fix the row, or set chat.malformed to drop"
        )


@dataclass
class _Read:
    """Counts of one source's conversations: kept, shortened and dropped."""

    read: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    shortened: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    contaminated: Counter[str] = field(default_factory=Counter)

    def drop_unread(self) -> None:
        """Count conversations that were read, but neither kept nor dropped, as `over_budget`."""
        over = self.read - self.splits.total() - self.dropped.total()
        self.dropped.update({"over_budget": over} if over else {})

    def summary(self) -> dict[str, Any]:
        splits = {split: self.splits[split] for split in SPLITS}
        counts = {name: dict(sorted(getattr(self, name).items())) for name in ("dropped", "contaminated")}
        return {**splits, "read": self.read, "shortened": self.shortened, **counts}

    def check(self, label: str) -> None:
        """Raise DataError if the source gave no conversation to train on."""
        if not self.splits["train"]:
            lost = drop_counts(self.dropped, self.contaminated) if self.read else "the source is empty"
            raise DataError(f"{label}: no usable conversation for training; dropped: {lost}")


def write_chat_shards(
    config: ChatConfig,
    rows: Mapping[str, Iterable[Any]],
    tokenizer: Tokenizer,
    seed: int,
    out: Path,
    benchmarks: Benchmarks | None = None,
) -> dict[str, Any]:
    """Render and pack the conversations of all sources: `chat/{split}-00000.arrow`, and held-out `prompts.jsonl`.

    With a budget of `config.tokens`, a source is read until its share of the training tokens is reached, and its
    windows go to `{label}/{split}-00000.arrow`.

    `rows[label]` yields the turns of each row. Dropped conversations are counted by reason: `duplicate` (the same turns
    occurred before, in this source or an earlier one), `contaminated` (shares words with `benchmarks`), `no_assistant`
    (nothing to learn), `too_long` (the last question and answer do not fit in a window), `over_budget` (read, but not
    needed), and with `config.malformed` "drop" those of MalformedConversationError. `shortened` counts conversations
    from which `fit` removed turns.

    Returns `{"sources": {label: {"train", "validation", "read", "shortened", "dropped": {reason: count},
    "contaminated": {benchmark: count}}}, "train": {"windows", "tokens", …}, "validation": {…}}`. Raises
    MalformedRowError for a malformed row, and DataError for a source without usable conversations or a split without
    supervised tokens.
    """
    summary: dict[str, Any] = {"sources": {}, **{split: Counter[str]() for split in SPLITS}}
    kept: dict[str, dict[str, list[NDArray[Any]]]] = {}  # by folder and split, ids and supervision [2, n]
    prompts: list[dict[str, Any]] = []
    seen: set[int] = set()
    preparation = current_workers().share(_Preparation(config, tokenizer, seed, benchmarks))
    with Progress("chat_shards", sum(s.conversations for s in config.sources), "conversations") as progress:
        for source in config.sources:
            found, before, left = _Read(), progress.tick.done, config.budget(source)
            mine = kept.setdefault("chat" if left is None else source.label, {split: [] for split in SPLITS})
            for split, item in _distinct(source, rows[source.label], preparation, config.malformed, seen, found):
                progress.at(before + found.read)
                if isinstance(item, str):
                    found.dropped[item] += 1
                    continue
                found.splits[split] += 1
                found.shortened += item.shortened
                mine[split].append(item.tokens)
                found.tokens[split] += item.tokens.shape[1]
                if item.prompt is not None:
                    prompts.append({"source": source.label, **item.prompt})
                if left is not None and found.tokens["train"] >= left:
                    found.drop_unread()
                    break
            summary["sources"][source.label] = found.summary()
            if left is not None:
                summary["sources"][source.label]["tokens"] = {"budget": left, **found.tokens}
            found.check(source.label)
    parts = [(folder, split, items) for folder, splits in kept.items() for split, items in splits.items()]
    for number, (folder, split, items) in enumerate(parts):
        summary[split].update(_write_packed(out / folder / split, items, config, seed << 32 | number))
    with (out / "prompts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(canonical_json(prompt) + "\n" for prompt in prompts)
    return summary


class _Item(NamedTuple):
    """A conversation that fits in a window."""

    tokens: NDArray[Any]  # ids and supervision [2, n]
    shortened: bool
    prompt: dict[str, Any] | None  # of a held-out conversation


class _Prepared(NamedTuple):
    """A well-formed conversation: what is left to do depends on the conversations before it."""

    key: int  # hash of the turns
    labels: set[str]  # of benchmarks that share words with it
    split: str
    item: _Item | str  # or why it is dropped


@dataclass(frozen=True)
class _Preparation:
    """Prepares batches of rows, each by itself."""

    config: ChatConfig
    tokenizer: Tokenizer
    seed: int
    benchmarks: Benchmarks | None

    def rows(self, batch: Sequence[Any]) -> list[_Prepared | tuple[str, str]]:
        """Each row as a conversation; of a malformed row, the reason and the message of the error."""
        drops = self.config.malformed == "drop"
        found: list[Any] = []
        for row in batch:
            try:
                found.append(_well_formed(row, drops=drops))
            except MalformedConversationError as error:
                found.append((error.reason, str(error)))
        fine = [number for number, one in enumerate(found) if isinstance(one, list)]
        texts = ["\n".join(turn.content for turn in found[number]).encode() for number in fine]
        shared = self.benchmarks.found(texts) if self.benchmarks is not None else {}
        for place, number in enumerate(fine):
            found[number] = self._prepared(found[number], shared.get(place, set()))
        return found

    def _prepared(self, conversation: list[Turn], labels: set[str]) -> _Prepared:
        text = canonical_json(conversation).encode()
        held_out = xxhash.xxh3_64_intdigest(text, seed=self.seed) < self.config.validation_share * 2**64
        item = "contaminated" if labels else self._item(conversation, held_out)
        return _Prepared(xxhash.xxh3_128_intdigest(text), labels, "validation" if held_out else "train", item)

    def _item(self, conversation: list[Turn], held_out: bool) -> _Item | str:
        fitted = fit(self.tokenizer, conversation, self.config.sequence_length)
        if isinstance(fitted, str):
            return fitted
        tokens = np.array([fitted.ids, fitted.supervised], token_dtype(self.tokenizer.get_vocab_size()))
        return _Item(tokens, len(fitted.turns) < len(conversation), _prompt(fitted.turns) if held_out else None)


def _prepared_rows(preparation: Shared, batch: Sequence[Any]) -> list[_Prepared | tuple[str, str]]:
    found: _Preparation = preparation.value()
    return found.rows(batch)


def _distinct(
    source: ChatSource, rows: Iterable[Any], preparation: Shared, malformed: str, seen: set[int], found: _Read
) -> Iterator[tuple[str, _Item | str]]:
    """The split and the item of each distinct conversation that shares no words with a benchmark.

    The others are counted. Batches are prepared by the workers.
    """
    drawn, batches = islice(rows, source.conversations), deque[Sequence[Any]]()

    def calls() -> Iterator[tuple[Shared, Sequence[Any]]]:
        while batch := list(islice(drawn, BATCH)):
            batches.append(batch)
            yield preparation, batch

    for prepared in current_workers().each(_prepared_rows, calls()):
        batch, fresh = batches.popleft(), list[_Prepared]()
        for number, one in enumerate(prepared):
            if not isinstance(one, _Prepared):
                if malformed == "refuse":
                    raise MalformedRowError(source, batch[number], found.read + number, one[1])
                found.dropped[one[0]] += 1
            elif one.key in seen:
                found.dropped["duplicate"] += 1
            else:
                seen.add(one.key)
                fresh.append(one)
        found.read += len(batch)
        for one in (one for one in fresh if one.labels):
            found.dropped["contaminated"] += 1
            found.contaminated.update(one.labels)
        yield from ((one.split, one.item) for one in fresh if not one.labels)


def _well_formed(row: Any, *, drops: bool) -> list[Turn]:
    """The turns of a row. Raises MalformedConversationError where they are no conversation.

    Where such rows are dropped, an empty system turn is left out instead of costing the whole conversation.
    """
    conversation = read_conversation(without_empty_system(row) if drops else row, "")
    if fault := find_fault(conversation):
        raise MalformedConversationError(*fault)
    return conversation


def _prompt(conversation: Sequence[Turn]) -> dict[str, Any]:
    """The messages before the first answer, and this answer."""
    first = next(i for i, turn in enumerate(conversation) if turn.role == "assistant")
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation[:first]]
    return {"messages": messages, "answer": conversation[first].content}


def _write_packed(prefix: Path, items: Sequence[NDArray[Any]], config: ChatConfig, seed: int) -> dict[str, int]:
    length = config.sequence_length
    writer = ShardWriter(prefix, length, 64 * 1024 * 1024)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(items))
    supervised_tokens = 0
    # Shuffled, so that a single buffer also mixes all sources.
    for packed in pack((items[i] for i in order), length, (PAD_ID, 0), config.packing, seed):
        ids, supervised = packed.columns
        writer.write(packed.pieces, input_ids=ids, supervised=supervised.astype(np.uint8))
        supervised_tokens += int(supervised.sum())
    windows, tokens = writer.close(), sum(item.shape[1] for item in items)
    if not supervised_tokens:
        what = f"{prefix.parent.name} {prefix.name}"
        raise DataError(f"{what}: no supervised token; draw more conversations or raise chat.validation_share")
    return {
        "windows": windows,
        "tokens": tokens,
        "padding_tokens": windows * length - tokens,
        "supervised_tokens": supervised_tokens,
    }


def read_prompts(chat_shards: Artifact, limit: int, seed: int) -> list[tuple[list[Turn], str]]:
    """Draw `limit` held-out prompts over all sources by seed: turns up to the first answer, and the answer."""
    rows = list(table_lines(chat_shards.read("prompts.jsonl"), f"{chat_shards.uri}/prompts.jsonl"))
    rows = random.Random(f"{seed} prompts").sample(rows, min(limit, len(rows)))
    return [(read_conversation(row["messages"], "prompts.jsonl"), row["answer"]) for row in rows]
