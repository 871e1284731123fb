"""Bits per byte on held-out text, multiple choice by log-likelihood, and whether a chat model ends its turns."""

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor

from vectorclm.corpus import Source
from vectorclm.dataset import collate
from vectorclm.errors import DataError
from vectorclm.loss import IGNORE_INDEX
from vectorclm.model import CausalLM
from vectorclm.progress import Progress
from vectorclm.settings import Settings
from vectorclm.shards import Windows
from vectorclm.train_tokenizer import BOS_ID, PAD_ID, encode

Format = Literal["multiple_choice", "hellaswag", "arc", "piqa", "blimp"]


class TaskSource(Source):
    """A multiple-choice benchmark."""

    format: Format = Field(description="How a row reads as context and choices")
    limit: int = Field(0, ge=0, description="Items to score, a seeded draw; 0 = all")


class EvaluateConfig(Settings):
    """What is measured."""

    tasks: list[TaskSource] = Field(default=[])
    prompts: list[str] = Field(min_length=1, description="Questions the chat model answers in the summary")
    chat_prompts: int = Field(
        100, ge=1, description="Held-out conversations whose answers are checked for the template"
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest answer to a prompt, in tokens")


class Item(NamedTuple):
    """One multiple-choice question."""

    context: str
    choices: tuple[str, ...]  # each continues the context as it stands, its leading space included
    answer: int


FORMAT_COLUMNS: Mapping[Format, tuple[str, ...]] = {
    "multiple_choice": ("context", "choices", "answer"),
    "hellaswag": ("activity_label", "ctx", "endings", "label"),
    "arc": ("question", "choices", "answerKey"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "blimp": ("sentence_good", "sentence_bad"),
}


def read_item(task_format: Format, row: Mapping[str, Any]) -> Item:
    """A row of a benchmark as a question, worded as in EleutherAI's lm-evaluation-harness."""
    match task_format:
        case "multiple_choice":
            return Item(row["context"], tuple(row["choices"]), int(row["answer"]))
        case "hellaswag":
            context = f"{row['activity_label']}: {row['ctx']}"
            return Item(context, tuple(f" {ending}" for ending in row["endings"]), int(row["label"]))
        case "arc":
            texts, labels = row["choices"]["text"], row["choices"]["label"]
            context = f"Question: {row['question']}\nAnswer:"
            return Item(context, tuple(f" {text}" for text in texts), list(labels).index(row["answerKey"]))
        case "piqa":
            context = f"Question: {row['goal']}\nAnswer:"
            return Item(context, (f" {row['sol1']}", f" {row['sol2']}"), int(row["label"]))
        case "blimp":
            return Item("", (row["sentence_good"], row["sentence_bad"]), 0)


@torch.inference_mode()
def token_losses(model: CausalLM, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target [B, T], the token after each input; 0 where it is IGNORE_INDEX.

    Logits are built only where a target stands.
    """
    device = input_ids.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        hidden_BTD = model.model(input_ids)
    kept_BT = targets != IGNORE_INDEX
    losses_BT = torch.zeros(targets.shape, device=device)
    weight_VD = model.model.embed_tokens.weight
    pairs = zip(torch.split(hidden_BTD[kept_BT], 2048), torch.split(targets[kept_BT], 2048), strict=True)
    parts = [
        F.cross_entropy(F.linear(hidden_ND.to(weight_VD.dtype), weight_VD).float(), targets_N, reduction="none")
        for hidden_ND, targets_N in pairs
    ]
    losses_BT[kept_BT] = torch.cat(parts)
    return losses_BT


def windows_scores(
    model: CausalLM,
    sources: Mapping[str, Sequence[Windows]],
    token_lengths: Sequence[int],
    limit: int,
    micro_batch: int,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Loss (nats a label) and bits per byte of text on the first `limit` windows of each source; 0 = all of them.

    Bits per byte compare across tokenizers, which losses do not; special tokens stand for no text and stay out.
    """
    model.eval()
    lengths_V = torch.tensor(token_lengths, device=device)
    scores = {}
    for label, shards in sources.items():
        nats = text_nats = 0.0
        tokens = size = 0
        for rows in _micro_batches(shards, limit, micro_batch):
            input_ids, labels = (tensor.to(device) for tensor in collate(rows))
            targets_BT = labels[:, 1:]
            losses_BT = token_losses(model, input_ids[:, :-1], targets_BT)
            bytes_BT = lengths_V[targets_BT.clamp(min=0)] * (targets_BT != IGNORE_INDEX)
            nats += float(losses_BT.double().sum())
            tokens += int((targets_BT != IGNORE_INDEX).sum())
            text_nats += float((losses_BT.double() * (bytes_BT > 0)).sum())
            size += int(bytes_BT.sum())
        scores[label] = {
            "loss": nats / max(1, tokens),
            "bits_per_byte": text_nats / math.log(2) / max(1, size),
        }
    return scores


def _micro_batches(shards: Sequence[Windows], limit: int, micro_batch: int) -> Iterator[list[Any]]:
    rows = [(shard, i) for shard in shards for i in range(len(shard.input_ids))][: limit or None]
    for start in range(0, len(rows), micro_batch):
        yield [
            (shard.input_ids[i], None if shard.supervised is None else shard.supervised[i])
            for shard, i in rows[start : start + micro_batch]
        ]


def text_scores(model: CausalLM, tokenizer: Tokenizer, text: str, device: torch.device) -> dict[str, float]:
    """Bits per byte, nats per token, and the counts behind them, of any text.

    Every token is scored once, the first after BOS. A text longer than the model's context is read in windows that
    do not overlap, each beginning with the token before it (the harness's rolling log-likelihood, context 1). The
    last window is moved back to be full, so that its tokens see what came before. Raises DataError for an empty text.
    """
    ids = encode(tokenizer, text)
    if not ids:
        raise DataError("there is no text to score: the file is empty")
    model.eval()
    length = model.config.max_position_embeddings
    nats = 0.0
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        first = max(0, end - length)  # the window's first token
        window = torch.tensor([BOS_ID if first == 0 else ids[first - 1], *ids[first:end]])
        targets = window[1:].clone()
        targets[: start - first] = IGNORE_INDEX  # scored in the window before
        losses = token_losses(model, window[None, :-1].to(device), targets[None].to(device))
        nats += float(losses.double().sum())
    size = len(text.encode())
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "nats_per_token": nats / len(ids),
        "tokens": len(ids),
        "bytes": size,
    }


def task_scores(
    model: CausalLM,
    tokenizer: Tokenizer,
    label: str,
    items: Sequence[Item],
    micro_batch: int,
    device: torch.device,
) -> dict[str, Any]:
    """Accuracy by each choice's log-likelihood (`acc`), and by it over the choice's characters (`acc_norm`).

    Both as in EleutherAI's lm-evaluation-harness, with its standard error of `acc`; `chance` is a blind guess's.
    """
    model.eval()
    requests = [(number, c) for number, item in enumerate(items) for c in range(len(item.choices))]
    sequences = [choice_ids(tokenizer, items[n], c, model.config.max_position_embeddings) for n, c in requests]
    sums = [0.0] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: -len(sequences[i][0]))  # alike in length: little padding
    with Progress(f"evaluate {label}", len(requests), "choices") as progress:
        for start in range(0, len(order), micro_batch):
            group = order[start : start + micro_batch]
            length = len(sequences[group[0]][0])
            ids = torch.full((len(group), length), PAD_ID)
            targets = torch.full((len(group), length - 1), IGNORE_INDEX)
            for row, i in enumerate(group):
                sequence, scored = sequences[i]
                ids[row, : len(sequence)] = torch.tensor(sequence)
                targets[row, len(sequence) - 1 - scored : len(sequence) - 1] = torch.tensor(sequence[-scored:])
            losses = token_losses(model, ids[:, :-1].to(device), targets.to(device))
            for i, nats in zip(group, losses.double().sum(dim=1).tolist(), strict=True):
                sums[i] = -nats
            progress.advance(len(group))
    return _accuracies(items, requests, sums)


def choice_ids(tokenizer: Tokenizer, item: Item, choice: int, limit: int) -> tuple[list[int], int]:
    """BOS, context and choice as ids, and how many at the end are the choice's.

    The context's share is what it encodes to alone, a trailing space counted to the choice; of what is too long the
    beginning is cut, so that at most `limit` ids are inputs.
    """
    context = item.context.rstrip()
    whole = encode(tokenizer, item.context + item.choices[choice])
    scored = len(whole) - len(encode(tokenizer, context))
    return [BOS_ID, *whole][-limit - 1 :], min(scored, limit)


def _accuracies(items: Sequence[Item], requests: Sequence[tuple[int, int]], sums: Sequence[float]) -> dict[str, Any]:
    by_item: list[list[float]] = [[] for _ in items]
    for (number, _), value in zip(requests, sums, strict=True):
        by_item[number].append(value)
    right = right_norm = 0
    for item, values in zip(items, by_item, strict=True):
        normed = [value / len(choice) for value, choice in zip(values, item.choices, strict=True)]
        right += values.index(max(values)) == item.answer
        right_norm += normed.index(max(normed)) == item.answer
    n = len(items)
    acc = right / n
    return {
        "acc": acc,
        "acc_norm": right_norm / n,
        "stderr": math.sqrt(acc * (1 - acc) / max(1, n - 1)),
        "chance": sum(1 / len(item.choices) for item in items) / n,
        "items": n,
    }


def write_scores(out: Path, scores: Mapping[str, Any]) -> None:
    """Write `scores.json`."""
    (out / "scores.json").write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_items(task: TaskSource, rows: Iterable[Mapping[str, Any]], seed: int) -> list[Item]:
    """The questions of a task: all, or a seeded draw of `task.limit`. Raises DataError naming the row that is none."""
    items = []
    for number, row in enumerate(rows):
        try:
            item = read_item(task.format, row)
            if not 0 <= item.answer < len(item.choices):
                raise ValueError(f"answer {item.answer} of {len(item.choices)} choices")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{task.label}, row {number}: not a {task.format} question: {error!r}") from error
        items.append(item)
    if not items:
        raise DataError(f"{task.label}: no questions")
    if task.limit and task.limit < len(items):
        chosen = random.Random(f"{seed} {task.label}").sample(range(len(items)), task.limit)
        items = [items[i] for i in sorted(chosen)]
    return items
