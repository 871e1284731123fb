"""Bits per byte on held-out text, multiple choice by log-likelihood, and whether a chat model ends its turns."""

import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from tokenizers import Tokenizer
from torch import Tensor

from vectorclm.blocks import ShardReader
from vectorclm.corpus import Source, check_labels
from vectorclm.dataset import to_batch
from vectorclm.documents import Documents
from vectorclm.errors import DataError
from vectorclm.items import ItemScores
from vectorclm.loss import IGNORE_INDEX
from vectorclm.model import CausalLM
from vectorclm.products import product
from vectorclm.progress import Progress
from vectorclm.settings import Settings
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

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        check_labels(self.tasks)
        return self


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


MARKUP = re.compile(r"\[[^\]]*\]")


def _without_markup(text: str) -> str:
    """HellaSwag's WikiHow rows carry `[title]` and other marks: a title ends a sentence, the rest is left out."""
    return MARKUP.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def read_item(task_format: Format, row: Mapping[str, Any]) -> Item:
    """A row of a benchmark as a question, worded as in EleutherAI's lm-evaluation-harness.

    HellaSwag's context is the row's `ctx` as it stands, where the harness writes its second half with a capital.
    """
    match task_format:
        case "multiple_choice":
            return Item(row["context"], tuple(row["choices"]), int(row["answer"]))
        case "hellaswag":
            context = _without_markup(f"{row['activity_label']}: {row['ctx']}")
            return Item(context, tuple(f" {_without_markup(text)}" for text in row["endings"]), int(row["label"]))
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
def token_losses(model: CausalLM, input_ids: Tensor, targets: Tensor, documents: Documents | None = None) -> Tensor:
    """Nats of each target [B, T], the token after each input; 0 where it is IGNORE_INDEX.

    Logits are built only where a target stands.
    """
    device = input_ids.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        hidden_BTD = model.model(input_ids, documents=documents)
    kept_BT = targets != IGNORE_INDEX
    losses_BT = torch.zeros(targets.shape, device=device)
    losses_BT[kept_BT] = _nats(model, hidden_BTD[kept_BT], targets[kept_BT])
    return losses_BT


def _nats(model: CausalLM, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy of each target, a few thousand logits' rows at a time."""
    weight_VD = model.model.embed_tokens.weight
    parts = [
        F.cross_entropy(product(hidden_CD.to(weight_VD.dtype), weight_VD).float(), targets_C, reduction="none")
        for hidden_CD, targets_C in zip(torch.split(hidden_ND, 2048), torch.split(targets_N, 2048), strict=True)
    ]
    return torch.cat(parts)


def windows_scores(
    model: CausalLM,
    sources: Mapping[str, ShardReader],
    token_lengths: Sequence[int],
    limit: int,
    micro_batch: int,
    device: torch.device,
    document_mask: bool = False,
    found: ItemScores | None = None,
) -> dict[str, dict[str, float]]:
    """Loss (nats a label) and bits per byte of text on the first `limit` windows of each source; 0 = all of them.

    Bits per byte compare across tokenizers, which losses do not; special tokens stand for no text and stay out. What
    each window scored is added to `found`.
    """
    model.eval()
    lengths_V = torch.tensor(token_lengths, device=device)
    scores = {}
    for label, reader in sources.items():
        nats = text_nats = 0.0
        tokens = size = 0
        for windows in reader.in_order(micro_batch, limit):
            batch = to_batch(windows, document_mask)
            targets_BT = batch.labels[:, 1:].to(device)
            documents = Documents.at(None if batch.position_ids is None else batch.position_ids[:, :-1], device)
            losses_BT = token_losses(model, batch.input_ids[:, :-1].to(device), targets_BT, documents)
            bytes_BT = lengths_V[targets_BT.clamp(min=0)] * (targets_BT != IGNORE_INDEX)
            nats += float(losses_BT.double().sum())
            tokens += int((targets_BT != IGNORE_INDEX).sum())
            text_nats += float((losses_BT.double() * (bytes_BT > 0)).sum())
            size += int(bytes_BT.sum())
            if found is not None:
                nats_B, bytes_B = (losses_BT.double() * (bytes_BT > 0)).sum(1).tolist(), bytes_BT.sum(1).tolist()
                for ids, nats_of_it, bytes_of_it in zip(batch.input_ids.numpy(), nats_B, bytes_B, strict=True):
                    found.add_text(label, ids.tobytes(), nats_of_it, bytes_of_it)
        scores[label] = {
            "loss": nats / max(1, tokens),
            "bits_per_byte": text_nats / math.log(2) / max(1, size),
        }
    return scores


def scoring_windows(ids: Sequence[int], length: int) -> Iterator[tuple[list[int], int]]:
    """A text in windows that a model of context `length` reads, and the place in each of the first token it scores.

    The first token is scored after BOS. Windows do not overlap, each beginning with the token before it (the harness's
    rolling log-likelihood, context 1). The last one is moved back to be full, so that its tokens see what came before.
    """
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        first = max(0, end - length)  # the window's first token
        yield [BOS_ID if first == 0 else ids[first - 1], *ids[first:end]], 1 + start - first


def text_scores(
    model: CausalLM, tokenizer: Tokenizer, text: str, device: torch.device, length: int | None = None
) -> dict[str, float]:
    """Bits per byte, nats per token, and the counts behind them, of any text.

    Every token is scored once, see `scoring_windows`; without `length`, windows are as long as the model's context.
    Raises DataError for an empty text.
    """
    ids = encode(tokenizer, text)
    if not ids:
        raise DataError("there is no text to score: the file is empty")
    model.eval()
    nats = 0.0
    for ids_of_window, scored in scoring_windows(ids, length or model.config.max_position_embeddings):
        window = torch.tensor(ids_of_window)
        targets = window[1:].clone()
        targets[: scored - 1] = IGNORE_INDEX
        losses = token_losses(model, window[None, :-1].to(device), targets[None].to(device))
        nats += float(losses.double().sum())
    return rates(nats, len(ids), len(text.encode()))


def rates(nats: float, tokens: int, size: int) -> dict[str, float]:
    """What a text of so many tokens and bytes costs, by each of them, when all of it costs `nats`."""
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "nats_per_token": nats / tokens,
        "tokens": tokens,
        "bytes": size,
    }


def task_scores(
    model: CausalLM,
    tokenizer: Tokenizer,
    label: str,
    items: Sequence[Item],
    micro_batch: int,
    device: torch.device,
    found: ItemScores | None = None,
) -> dict[str, Any]:
    """Accuracy by each choice's log-likelihood (`acc`), and by it over the choice's characters (`acc_norm`), the
    space before it not counted.

    Both as in EleutherAI's lm-evaluation-harness, with its standard errors `stderr` and `stderr_norm`; `chance` is a
    blind guess's. The model reads what an item's choices share once, and makes logits only where a choice is scored.
    What each item scored is added to `found`.
    """
    model.eval()
    trees = [choice_tree(tokenizer, item, model.config.max_position_embeddings) for item in items]
    order = sorted(range(len(items)), key=lambda i: -len(trees[i].ids))  # alike in length: little padding
    sums: list[list[float]] = [[] for _ in items]
    with Progress(f"evaluate {label}", len(items), "questions") as progress:
        for start in range(0, len(order), micro_batch):
            group = order[start : start + micro_batch]
            for i, values in zip(group, _tree_scores(model, [trees[i] for i in group], device), strict=True):
                sums[i] = values
            progress.advance(len(group))
    scores = accuracies(items, sums)
    if found is not None:
        for number, (item, values) in enumerate(zip(items, sums, strict=True)):
            found.add_question(label, number, json.dumps(item).encode(), answered(item, values), values)
    return scores


class Tree(NamedTuple):
    """The inputs of an item's choices in one sequence: what all begin with, then each choice's own, a branch of it."""

    ids: list[int]
    positions: list[int]  # of each id in its choice's text
    branches: list[int]  # the choice that an id belongs to; -1 where all share it
    predictors: list[list[int]]  # of each choice, the places whose next ids are scored
    targets: list[list[int]]  # and these ids


def choice_tree(tokenizer: Tokenizer, item: Item, limit: int) -> Tree:
    """The tree of an item, of which no choice is longer than `limit` inputs."""
    sequences = [choice_ids(tokenizer, item, choice, limit) for choice in range(len(item.choices))]
    inputs = [ids[:-1] for ids, _ in sequences]
    columns = enumerate(zip(*inputs, strict=False))
    shared = next((place for place, ids in columns if len(set(ids)) > 1), min(map(len, inputs)))
    tree = Tree(inputs[0][:shared], list(range(shared)), [-1] * shared, [], [])
    for choice, (ids, scored) in enumerate(sequences):
        places = [*range(shared), *range(len(tree.ids), len(tree.ids) + len(ids) - 1 - shared)]
        tree.ids.extend(ids[shared:-1])
        tree.positions.extend(range(shared, len(ids) - 1))
        tree.branches.extend([choice] * (len(ids) - 1 - shared))
        tree.predictors.append(places[-scored:])
        tree.targets.append(ids[-scored:])
    return tree


@torch.inference_mode()
def _tree_scores(model: CausalLM, trees: Sequence[Tree], device: torch.device) -> list[list[float]]:
    """Log-likelihood of each choice of each tree. An id sees the ids before it that all share, or of its own branch."""
    length = max(len(tree.ids) for tree in trees)

    def padded(rows: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)

    ids_BT, positions_BT = padded((tree.ids for tree in trees), PAD_ID), padded((tree.positions for tree in trees), 0)
    branches_BT = padded((tree.branches for tree in trees), -2)  # padding is a branch of its own
    seen_BTT = (branches_BT[:, None] == -1) | (branches_BT[:, None] == branches_BT[:, :, None])
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        hidden_BTD = model.model(ids_BT, position_ids_BT=positions_BT, mask_BTT=seen_BTT.tril())
    scored = [
        (row, place, target)
        for row, tree in enumerate(trees)
        for places, targets in zip(tree.predictors, tree.targets, strict=True)
        for place, target in zip(places, targets, strict=True)
    ]
    rows_N, places_N, targets_N = torch.tensor(scored, device=device).unbind(1)
    nats = _nats(model, hidden_BTD[rows_N, places_N], targets_N).double().cpu()
    sizes = [len(targets) for tree in trees for targets in tree.targets]
    sums = iter(-part.sum().item() for part in torch.split(nats, sizes))
    return [[next(sums) for _ in tree.targets] for tree in trees]


def choice_ids(tokenizer: Tokenizer, item: Item, choice: int, limit: int) -> tuple[list[int], int]:
    """BOS, context and choice as ids, and how many at the end are the choice's.

    The context's share is what it encodes to alone, a trailing space counted to the choice; of what is too long the
    beginning is cut, so that at most `limit` ids are inputs.
    """
    context = encode(tokenizer, item.context.rstrip())
    whole = encode(tokenizer, item.context + item.choices[choice])
    shared = len(context)
    if len(whole) <= shared:  # tokens merged over the boundary: the choice begins where the ids first differ
        shared = next(
            (place for place, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(whole) - 1
        )
    return [BOS_ID, *whole][-limit - 1 :], min(len(whole) - shared, limit)


def accuracies(items: Sequence[Item], sums: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The scores of `task_scores`, of each choice's log-likelihood. Raises DataError where one is not finite."""
    right = right_norm = 0
    for item, values in zip(items, sums, strict=True):
        if not all(math.isfinite(value) for value in values):
            raise DataError(f"the model gives no finite likelihood for {item.context[-80:]!r}: it is broken")
        by_likelihood, by_length = answered(item, values)
        right += by_likelihood
        right_norm += by_length
    n = len(items)
    acc, acc_norm = right / n, right_norm / n
    return {
        "acc": acc,
        "acc_norm": acc_norm,
        "stderr": math.sqrt(acc * (1 - acc) / max(1, n - 1)),
        "stderr_norm": math.sqrt(acc_norm * (1 - acc_norm) / max(1, n - 1)),
        "chance": sum(1 / len(item.choices) for item in items) / n,
        "items": n,
    }


def answered(item: Item, values: Sequence[float]) -> tuple[bool, bool]:
    """Whether the likeliest choice is the answer, and whether the one likeliest for its length is."""
    normed = [value / len(choice.removeprefix(" ")) for value, choice in zip(values, item.choices, strict=True)]
    return values.index(max(values)) == item.answer, normed.index(max(normed)) == item.answer


def write_scores(out: Path, scores: Mapping[str, Any], found: ItemScores) -> None:
    """Write `scores.json`, and what each item scored as Parquet."""
    found.write(out)
    (out / "scores.json").write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_items(task: TaskSource, rows: Iterable[Mapping[str, Any]], seed: int) -> list[Item]:
    """The questions of a task: all, or a seeded draw of `task.limit`. Raises DataError naming the row that is none."""
    items = []
    for number, row in enumerate(rows):
        try:
            item = read_item(task.format, row)
            if not 0 <= item.answer < len(item.choices):
                raise ValueError(f"answer {item.answer} of {len(item.choices)} choices")
            if not all(choice.strip() for choice in item.choices):
                raise ValueError("an empty choice")
            "".join([item.context, *item.choices]).encode()  # half a surrogate pair is no text
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{task.label}, row {number}: not a {task.format} question: {error!r}") from error
        items.append(item)
    if not items:
        raise DataError(f"{task.label}: no questions")
    if task.limit and task.limit < len(items):
        chosen = random.Random(f"{seed} {task.label}").sample(range(len(items)), task.limit)
        items = [items[i] for i in sorted(chosen)]
    return items
