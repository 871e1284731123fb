"""Instruction tuning: three chat schemas to one conversation type, and a loss on the assistant's tokens only."""

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field, model_validator
from tokenizers import Tokenizer

from vectorclm.artifact import Artifact
from vectorclm.corpus import Source, check_labels
from vectorclm.decontamination import Benchmarks
from vectorclm.errors import ConfigError, DataError
from vectorclm.model import CausalLM
from vectorclm.packing import Packing, pack
from vectorclm.plan import MIX_BLOCK, CurriculumPlan, Stretch
from vectorclm.progress import Progress
from vectorclm.sampling import losses
from vectorclm.settings import Settings, canonical_json
from vectorclm.shard_reader import ShardReader, open_shards
from vectorclm.shards import SPLITS, ShardWriter, token_dtype
from vectorclm.train import TrainConfig, Work, own_share, train
from vectorclm.train_tokenizer import BOS_ID, IM_END_ID, IM_START_ID, PAD_ID, encode

logger = logging.getLogger(__name__)


class ChatSource(Source):
    """A source of conversations."""

    column: str = Field("messages", description="The column that holds the turns")
    conversations: int = Field(gt=0, description="How many to draw at the most")
    weight: float = Field(
        1.0,
        gt=0,
        exclude_if=lambda weight: weight == 1,
        description="Share of chat.tokens, relative to the other sources",
    )


class ChatConfig(Settings):
    """The conversations of instruction tuning."""

    sources: list[ChatSource] = Field(min_length=1)
    tokens: int = Field(
        0,
        ge=0,
        exclude_if=lambda tokens: tokens == 0,
        description="Budget for training, shared by the sources' weights; each source then has windows of its own. "
        "0 = all conversations drawn, packed together",
    )
    sequence_length: int = Field(ge=8, description="Tokens in a window of packed conversations")
    validation_share: float = Field(0.01, gt=0, lt=0.5, description="Share of conversations held out")
    shuffle_buffer: int = Field(10_000, ge=1, description="Conversations held in memory to shuffle the stream")
    packing: Packing = Field("best_fit", description="Conversations stay whole, or are cut where a window ends")
    malformed: Literal["refuse", "drop"] = Field(
        "refuse", description="An empty turn or roles out of order: stop and say where, or leave out and count"
    )

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        check_labels(self.sources)
        return self

    def budget(self, source: ChatSource) -> int | None:
        """Tokens of a source to train on; None = all."""
        return round(self.tokens * source.weight / sum(s.weight for s in self.sources)) if self.tokens else None


class FinetuneConfig(TrainConfig):
    """Instruction tuning of the base model."""

    epochs: float = Field(gt=0, description="How often the conversations are read")
    replay: float = Field(
        0.0,
        ge=0,
        lt=1,
        exclude_if=lambda share: share == 0,
        description="Share of the windows that is pretraining text once more, against forgetting it",
    )


class Turn(NamedTuple):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Fitted(NamedTuple):
    """What of a conversation fits in a window."""

    turns: list[Turn]
    ids: list[int]
    supervised: list[bool]


# SmolTalk and Tulu-3 write {role, content}; SlimOrca writes {from, value}.
ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# What may follow what: an optional system turn, then the user and the assistant by turns.
FOLLOWS = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}
BATCH = 256  # conversations that are looked up in the benchmarks at a time


def read_conversation(turns: Any, where: str) -> list[Turn]:
    """A row's turns, whichever of the three schemas they have.

    Raises DataError, with `where`, for another schema, an unknown role or a text that is none.
    """
    conversation = []
    for turn in turns if isinstance(turns, list | tuple) else [turns]:
        if not isinstance(turn, Mapping) or not (
            {"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys()
        ):
            raise DataError(f"{where}: a turn must hold role and content, or from and value; found {turn!r:.200}")
        role, content = (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
        if role not in ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}: role must be one of {', '.join(ROLES)} and the text a string; found {turn!r:.200}"
            )
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: half a surrogate pair at character {error.start}: mend the text") from error
        conversation.append(Turn(ROLES[role], content))
    return conversation


def find_fault(conversation: Sequence[Turn]) -> tuple[str, str] | None:
    """What is wrong with the turns, `empty_turn` or `role_order`, and where; None where nothing is."""
    before = None
    for number, turn in enumerate(conversation):
        if not turn.content.strip():
            return "empty_turn", f"turn {number}, the {turn.role}'s, is empty"
        if turn.role not in FOLLOWS[before]:
            place = f"after the {before}'s" if before else "first"
            return "role_order", f"turn {number}, the {turn.role}'s, stands {place}: {turn.content!r:.200}"
        before = turn.role
    return None


def render(tokenizer: Tokenizer, conversation: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation in the chat template, and which of them carry loss.

    Supervised are the assistant's words and the end-of-turn token after them; nothing else. Special tokens that
    users write in their messages stay text.
    """
    return _joined([_render_turn(tokenizer, turn) for turn in conversation])


def _render_turn(tokenizer: Tokenizer, turn: Turn) -> tuple[list[int], list[bool]]:
    if turn.role == "assistant":
        head, body = [IM_START_ID, *encode(tokenizer, "assistant\n")], [*encode(tokenizer, turn.content), IM_END_ID]
    else:
        head, body = [IM_START_ID, *encode(tokenizer, f"{turn.role}\n{turn.content}"), IM_END_ID], []
    newline = encode(tokenizer, "\n")
    return head + body + newline, [False] * len(head) + [True] * len(body) + [False] * len(newline)


def _joined(turns: Iterable[tuple[list[int], list[bool]]]) -> tuple[list[int], list[bool]]:
    ids, supervised = [BOS_ID], [False]
    for turn_ids, turn_supervised in turns:
        ids += turn_ids
        supervised += turn_supervised
    return ids, supervised


def render_prompt(tokenizer: Tokenizer, conversation: Sequence[Turn]) -> list[int]:
    """Token ids of a conversation that waits for the assistant's answer."""
    ids, _ = render(tokenizer, conversation)
    return [*ids, IM_START_ID, *encode(tokenizer, "assistant\n")]


def fit(tokenizer: Tokenizer, conversation: Sequence[Turn], length: int) -> Fitted | str:
    """The conversation in at most `length` tokens; or why it is of no use: `no_assistant`, `too_long`.

    Left off are the turns after the last answer, from which nothing is learnt, and of what is too long as few of the
    first questions as will do, each with its answer. The system turn stays wherever the last question and answer
    leave room for it. Where these two alone are too long, so is the conversation.
    """
    answers = [number for number, turn in enumerate(conversation) if turn.role == "assistant"]
    if not answers:
        return "no_assistant"
    turns = list(conversation[: answers[-1] + 1])
    rendered = [_render_turn(tokenizer, turn) for turn in turns]
    sizes = [len(ids) for ids, _ in rendered]
    system = int(turns[0].role == "system")
    # What may be kept, the most first. With the system turn or, where it leaves too little room, without.
    for first in range(system, -1, -1):
        for start in (number for number in range(system, len(turns)) if turns[number].role == "user"):
            if 1 + sum(sizes[:first]) + sum(sizes[start:]) <= length:  # 1 for BOS
                ids, supervised = _joined(rendered[:first] + rendered[start:])
                return Fitted(turns[:first] + turns[start:], ids, supervised)
    return "too_long"


@dataclass
class _Read:
    """What became of the conversations of one source."""

    read: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    shortened: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    contaminated: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        splits = {split: self.splits[split] for split in SPLITS}
        counts = {name: dict(sorted(getattr(self, name).items())) for name in ("dropped", "contaminated")}
        return {**splits, "read": self.read, "shortened": self.shortened, **counts}


def write_chat_shards(
    config: ChatConfig,
    rows: Mapping[str, Iterable[Any]],
    tokenizer: Tokenizer,
    seed: int,
    out: Path,
    benchmarks: Benchmarks | None = None,
) -> dict[str, Any]:
    """Render and pack the conversations of all sources: `chat/{split}-00000.arrow`, and held-out `prompts.jsonl`.

    With a budget of `config.tokens`, a source is read until its share of it is there for training, and its windows lie
    in `{label}/{split}-00000.arrow`.

    `rows[label]` yields the turns of one row after another. Dropped and counted are: `duplicate` (the same turns stood
    in this source or one before it), `contaminated` (shares words with `benchmarks`), `no_assistant` (nothing to
    learn), `too_long` (not even its last question and answer fit in a window), and, where `config.malformed` says so,
    `empty_turn` and `role_order`; `over_budget` are those that were read beside the last one that a budget has room
    for. `shortened` are those that `fit` left turns off.

    Returns `{"sources": {label: {"train", "validation", "read", "shortened", "dropped": {reason: count},
    "contaminated": {benchmark: count}}}, "train": {"windows", "tokens", …}, "validation": {…}}`. Raises DataError for a
    malformed row, where a source has nothing usable, and where nothing supervised is left for a split.
    """
    summary: dict[str, Any] = {"sources": {}, **{split: Counter[str]() for split in SPLITS}}
    kept: dict[str, dict[str, list[NDArray[Any]]]] = {}  # by folder and split, ids and supervision [2, n]
    dtype = token_dtype(tokenizer.get_vocab_size())
    prompts: list[dict[str, Any]] = []
    seen: set[int] = set()
    with Progress("chat_shards", sum(s.conversations for s in config.sources), "conversations") as progress:
        for source in config.sources:
            found, before, left = _Read(), progress.tick.done, config.budget(source)
            mine = kept.setdefault("chat" if left is None else source.label, {split: [] for split in SPLITS})
            for conversation in _distinct(source, rows[source.label], config, benchmarks, seen, found):
                progress.at(before + found.read)
                split = "validation" if _is_held_out(conversation, seed, config.validation_share) else "train"
                item = fit(tokenizer, conversation, config.sequence_length)
                if isinstance(item, str):
                    found.dropped[item] += 1
                    continue
                found.splits[split] += 1
                found.shortened += len(item.turns) < len(conversation)
                mine[split].append(np.array([item.ids, item.supervised], dtype))
                found.tokens[split] += len(item.ids)
                if split == "validation":
                    prompts.append(_prompt(source.label, item.turns))
                if left is not None and found.tokens["train"] >= left:
                    over = found.read - found.splits.total() - found.dropped.total()
                    found.dropped.update({"over_budget": over} if over else {})
                    break
            summary["sources"][source.label] = found.summary()
            if left is not None:
                summary["sources"][source.label]["tokens"] = {"budget": left, **found.tokens}
            if not found.splits["train"]:
                lost = losses(found.dropped, found.contaminated) if found.read else "the source is empty"
                raise DataError(f"{source.label}: no usable conversation for training; left out: {lost}")
    parts = ((folder, split, items) for folder, splits in kept.items() for split, items in splits.items())
    for number, (folder, split, items) in enumerate(parts):
        summary[split].update(_write_packed(out / folder / split, items, config, seed << 32 | number))
    with (out / "prompts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(canonical_json(prompt) + "\n" for prompt in prompts)
    return summary


def told(summary: Mapping[str, Any]) -> list[str]:
    """What `write_chat_shards` kept and dropped, a line for each source."""
    lines = []
    for label, source in summary["sources"].items():
        kept = sum(source[split] for split in SPLITS)
        lost = losses(source["dropped"], source["contaminated"])
        read, short = f"{kept:,} of {source['read']:,} conversations kept", f"{source['shortened']:,} shortened"
        of = f", {source['tokens']['train']:,} of {source['tokens']['budget']:,} tokens" if "tokens" in source else ""
        lines.append(f"chat_shards {label}: {read}{of}, {short}; dropped: {lost}")
    return lines


def _distinct(
    source: ChatSource,
    rows: Iterable[Any],
    config: ChatConfig,
    benchmarks: Benchmarks | None,
    seen: set[int],
    found: _Read,
) -> Iterator[list[Turn]]:
    """The well-formed conversations that no benchmark shares words with, each once; the others are counted."""
    drawn = islice(rows, source.conversations)
    while batch := list(islice(drawn, BATCH)):
        fresh = []
        for number, row in enumerate(batch, found.read):
            where = f"{source.label}, row {number} as drawn, column {source.column}"
            conversation = read_conversation(row, where)
            if fault := find_fault(conversation):
                if config.malformed == "refuse":
                    raise DataError(f"{where}: {fault[1]}. Mend it, or set chat.malformed to drop")
                found.dropped[fault[0]] += 1
                continue
            if (key := xxhash.xxh3_128_intdigest(canonical_json(conversation).encode())) in seen:
                found.dropped["duplicate"] += 1
                continue
            seen.add(key)
            fresh.append(conversation)
        found.read += len(batch)
        texts = ["\n".join(turn.content for turn in conversation).encode() for conversation in fresh]
        shared = benchmarks.found(texts) if benchmarks is not None else {}
        for labels in shared.values():
            found.dropped["contaminated"] += 1
            found.contaminated.update(labels)
        yield from (conversation for number, conversation in enumerate(fresh) if number not in shared)


def _is_held_out(conversation: Sequence[Turn], seed: int, share: float) -> bool:
    return xxhash.xxh3_64_intdigest(canonical_json(conversation).encode(), seed=seed) < share * 2**64


def _prompt(label: str, conversation: Sequence[Turn]) -> dict[str, Any]:
    """What stands before the first answer, and that answer."""
    first = next(i for i, turn in enumerate(conversation) if turn.role == "assistant")
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation[:first]]
    return {"source": label, "messages": messages, "answer": conversation[first].content}


def _write_packed(prefix: Path, items: Sequence[NDArray[Any]], config: ChatConfig, seed: int) -> dict[str, int]:
    length = config.sequence_length
    writer = ShardWriter(prefix, length, 64 * 1024 * 1024)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(items))
    supervised_tokens = 0
    # In another order, so that one buffer, too, is of all sources.
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


def finetune(
    config: FinetuneConfig,
    base: Path,
    chat_shards: Artifact,
    token_lengths: Sequence[int],
    seed: int,
    work: Work,
    texts: tuple[Artifact, Mapping[str, float]] | None = None,
) -> tuple[CausalLM, dict[str, Any]]:
    """Train the base model on the packed conversations; the loop is pretraining's.

    `texts` are the shards of pretraining and the weights of their sources, for the share `config.replay` of all
    windows; their held-out windows are validated on, too. The conversations are read as often as without them. Raises
    ConfigError where they are fewer than one step takes.
    """
    with ExitStack() as stack:

        def opened(split: str) -> dict[str, ShardReader]:
            artifacts = [chat_shards, *(texts[:1] if texts is not None else [])]
            parts = [open_shards(artifact, split, cache=work.runtime.block_cache) for artifact in artifacts]
            return {label: reader for part in parts for label, reader in stack.enter_context(part).items()}

        training, validation = opened("train"), opened("validation")
        replayed = replay_weights(config.replay, texts[1]) if texts is not None else {}
        chats = {label: len(reader) for label, reader in training.items() if reader.has_mask}
        windows, share = sum(chats.values()), 1 - config.replay
        weights = {**{label: share * size / windows for label, size in chats.items()}, **replayed}
        sizes = {label: len(training[label]) for label in weights}
        phase = Stretch(round(config.epochs * windows / share), weights)
        per_block = next(iter(training.values())).block_windows
        plan = CurriculumPlan([phase], sizes, seed, windows_per_block=per_block)
        dataset = own_share(training, plan, config, work.group)
        if dataset.steps == 0:
            raise ConfigError(
                f"{windows} windows of conversations make no step of finetune.batch_size {config.batch_size}"
            )
        model = CausalLM.from_pretrained(base)
        summary = train(model, config, dataset, validation, token_lengths, seed, work)
        if len(sizes) > 1:
            epochs = plan.epochs(dataset.steps * config.batch_size)
            summary["epochs"] = {label: round(value, 3) for label, value in epochs.items()}
        return model, summary


def replay_weights(share: float, weights: Mapping[str, float]) -> dict[str, float]:
    """The part of each source of text in a tuning that reads `share` of it again; too small ones are told and left."""
    if not share:
        return {}
    total = sum(weights.values())
    found = {label: share * weight / total for label, weight in weights.items() if weight}
    small = sorted(label for label, part in found.items() if part * MIX_BLOCK < 1)
    if len(small) == len(found):
        raise ConfigError(f"finetune.replay {share} leaves each source less than 1/{MIX_BLOCK}: give it more, or 0")
    if not small:
        return found
    logger.warning("finetune.replay leaves out %s, of less than 1/%d each", ", ".join(small), MIX_BLOCK)
    return replay_weights(share, {label: weights[label] for label in found if label not in small})


def read_prompts(chat_shards: Path, limit: int, seed: int) -> list[tuple[list[Turn], str]]:
    """Held-out conversations up to the first answer, and that answer: a seeded draw of `limit` over all sources."""
    with (chat_shards / "prompts.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = random.Random(f"{seed} prompts").sample(rows, min(limit, len(rows)))
    return [(read_conversation(row["messages"], "prompts.jsonl"), row["answer"]) for row in rows]
