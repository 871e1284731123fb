"""Instruction tuning: three chat schemas to one conversation type, and a loss on the assistant's tokens only."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer

from vectorclm.corpus import Source
from vectorclm.dataset import CurriculumPlan, StreamingLanguageModelDataset
from vectorclm.errors import ConfigError, DataError
from vectorclm.model import CausalLM
from vectorclm.progress import Progress
from vectorclm.settings import Settings, canonical_json
from vectorclm.shards import SPLITS, ShardWriter, read_windows
from vectorclm.train import TrainConfig, Work, train
from vectorclm.train_tokenizer import BOS_ID, IM_END_ID, IM_START_ID, PAD_ID, encode

OPEN_WINDOWS = 64  # windows kept open while packing


class ChatSource(Source):
    """A source of conversations."""

    column: str = Field("messages", description="The column that holds the turns")
    conversations: int = Field(gt=0, description="How many to draw at the most")


class ChatConfig(Settings):
    """The conversations of instruction tuning."""

    sources: list[ChatSource] = Field(min_length=1)
    sequence_length: int = Field(ge=8, description="Tokens in a window of packed conversations")
    validation_share: float = Field(0.01, gt=0, lt=0.5, description="Share of conversations held out")
    shuffle_buffer: int = Field(10_000, ge=1, description="Conversations held in memory to shuffle the stream")


class FinetuneConfig(TrainConfig):
    """Instruction tuning of the base model."""

    epochs: float = Field(gt=0, description="How often the conversations are read")


class Turn(NamedTuple):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


# SmolTalk and Tulu-3 write {role, content}; SlimOrca writes {from, value}.
ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


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
        conversation.append(Turn(ROLES[role], content))
    return conversation


def render(tokenizer: Tokenizer, conversation: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation in the chat template, and which of them carry loss.

    Supervised are the assistant's words and the end-of-turn token after them; nothing else. Special tokens that
    users write in their messages stay text.
    """
    ids, supervised = [BOS_ID], [False]
    newline = encode(tokenizer, "\n")
    for turn in conversation:
        if turn.role == "assistant":
            head, body = (
                [IM_START_ID, *encode(tokenizer, "assistant\n")],
                [*encode(tokenizer, turn.content), IM_END_ID],
            )
        else:
            head, body = [IM_START_ID, *encode(tokenizer, f"{turn.role}\n{turn.content}"), IM_END_ID], []
        ids += head + body + newline
        supervised += [False] * len(head) + [True] * len(body) + [False] * len(newline)
    return ids, supervised


def render_prompt(tokenizer: Tokenizer, conversation: Sequence[Turn]) -> list[int]:
    """Token ids of a conversation that waits for the assistant's answer."""
    ids, _ = render(tokenizer, conversation)
    return [*ids, IM_START_ID, *encode(tokenizer, "assistant\n")]


def fit(tokenizer: Tokenizer, conversation: Sequence[Turn], length: int) -> tuple[list[int], list[bool]] | str:
    """The conversation in at most `length` tokens, its last turns left off as needed; or why it is of no use."""
    if any(not turn.content.strip() for turn in conversation):
        return "empty turn"
    kept = list(conversation)
    while kept and kept[-1].role != "assistant":
        kept.pop()  # nothing after the last answer is learnt from
    if not kept:
        return "no assistant turn"
    while kept:
        ids, supervised = render(tokenizer, kept)
        if len(ids) <= length and any(supervised):
            return ids, supervised
        kept.pop()
        while kept and kept[-1].role != "assistant":
            kept.pop()
    return "longer than a window"


class Item(NamedTuple):
    """A rendered conversation."""

    ids: NDArray[Any]  # [n]
    supervised: NDArray[np.uint8]  # [n]


def pack(items: Iterable[Item], length: int) -> Iterator[list[Item]]:
    """What stands in each window of `length` tokens: an item goes into the fullest open window with room (best fit)."""
    windows: list[list[Item]] = []
    sizes: list[int] = []
    for item in items:
        fitting = [i for i, size in enumerate(sizes) if size + len(item.ids) <= length]
        if fitting:
            best = max(fitting, key=lambda i: sizes[i])
            windows[best].append(item)
            sizes[best] += len(item.ids)
            continue
        if len(windows) == OPEN_WINDOWS:
            fullest = sizes.index(max(sizes))
            yield windows.pop(fullest)
            sizes.pop(fullest)
        windows.append([item])
        sizes.append(len(item.ids))
    yield from windows


def write_chat_shards(
    config: ChatConfig, rows: Mapping[str, Iterable[Any]], tokenizer: Tokenizer, seed: int, out: Path
) -> dict[str, Any]:
    """Render and pack the conversations of all sources: `chat/{split}-00000.arrow`, and held-out `prompts.jsonl`.

    `rows[label]` yields the turns of one row after another. Returns counts per source, what was left out and why.
    Raises DataError where a source has nothing usable, or nothing supervised is left for a split.
    """
    summary: dict[str, Any] = {"sources": {}}
    kept: dict[str, list[Item]] = {split: [] for split in SPLITS}
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 65_536 else np.uint32
    prompts: list[dict[str, Any]] = []
    with Progress("chat_shards", sum(s.conversations for s in config.sources), "conversations") as progress:
        for source in config.sources:
            counts: Counter[str] = Counter()
            for number, turns in enumerate(rows[source.label]):
                if number >= source.conversations:
                    break
                conversation = read_conversation(turns, f"{source.label}, row {number}, column {source.column}")
                split = "validation" if _is_held_out(conversation, seed, config.validation_share) else "train"
                item = fit(tokenizer, conversation, config.sequence_length)
                progress.advance(1)
                if isinstance(item, str):
                    counts[item] += 1
                    continue
                counts[split] += 1
                kept[split].append(Item(np.array(item[0], dtype), np.array(item[1], np.uint8)))
                if split == "validation":
                    prompts.append(_prompt(source.label, conversation))
            if not counts["train"]:
                raise DataError(
                    f"{source.label}: no usable conversation; left out: {dict(counts) or 'the source is empty'}"
                )
            summary["sources"][source.label] = dict(counts)
    order = np.random.Generator(np.random.Philox(key=[seed, len(kept["train"])])).permutation(len(kept["train"]))
    kept["train"] = [kept["train"][i] for i in order]
    for split, items in kept.items():
        summary[split] = _write_packed(out / "chat" / split, items, config.sequence_length, dtype)
    with (out / "prompts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(canonical_json(prompt) + "\n" for prompt in prompts)
    return summary


def _is_held_out(conversation: Sequence[Turn], seed: int, share: float) -> bool:
    return xxhash.xxh3_64_intdigest(canonical_json(conversation).encode(), seed=seed) < share * 2**64


def _prompt(label: str, conversation: Sequence[Turn]) -> dict[str, Any]:
    """What stands before the first answer, and that answer."""
    first = next(i for i, turn in enumerate(conversation) if turn.role == "assistant")
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation[:first]]
    return {"source": label, "messages": messages, "answer": conversation[first].content}


def _write_packed(prefix: Path, items: Iterable[Item], length: int, dtype: Any) -> dict[str, int]:
    writer = ShardWriter(prefix, length, 64 * 1024 * 1024)
    tokens = supervised_tokens = 0
    for window in pack(items, length):
        row, mask = np.full((1, length), PAD_ID, dtype), np.zeros((1, length), np.uint8)
        size = sum(len(item.ids) for item in window)
        row[0, :size] = np.concatenate([item.ids for item in window])
        mask[0, :size] = np.concatenate([item.supervised for item in window])
        writer.write(input_ids=row, supervised=mask)
        tokens += size
        supervised_tokens += int(mask.sum())
    windows = writer.close()
    if not supervised_tokens:
        raise DataError(f"{prefix.name}: no supervised token; draw more conversations or raise chat.validation_share")
    return {"windows": windows, "tokens": tokens, "supervised_tokens": supervised_tokens}


def finetune(
    config: FinetuneConfig, base: Path, chat_shards: Path, token_lengths: Sequence[int], seed: int, work: Work
) -> tuple[CausalLM, dict[str, Any]]:
    """Train the base model on the packed conversations; the loop is pretraining's.

    Raises ConfigError where they are fewer than one step takes.
    """
    training = {"chat": read_windows(chat_shards / "chat", "train")}
    windows = sum(len(shard.input_ids) for shard in training["chat"])
    plan = CurriculumPlan([(round(config.epochs * windows), {"chat": 1.0})], {"chat": windows}, seed)
    dataset = StreamingLanguageModelDataset(training, plan, config.batch_size)
    if dataset.steps == 0:
        raise ConfigError(f"{windows} windows of conversations make no step of finetune.batch_size {config.batch_size}")
    model = CausalLM.from_pretrained(base)
    validation = {"chat": read_windows(chat_shards / "chat", "validation")}
    return model, train(model, config, dataset, validation, token_lengths, seed, work)


def read_prompts(chat_shards: Path) -> list[tuple[list[Turn], str]]:
    """The held-out conversations up to the first answer, and that answer."""
    with (chat_shards / "prompts.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(read_conversation(row["messages"], "prompts.jsonl"), row["answer"]) for row in rows]
