"""Bits per byte on held-out text, multiple choice by log-likelihood, and whether a chat model ends its turns."""

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from tokenizers import Tokenizer
from torch import Tensor

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
from vectorclm.shard_reader import ShardReader
from vectorclm.train_tokenizer import BOS_ID, PAD_ID, encode, load_tokenizer

CHOICE_COLUMNS = ("context", "choices", "answer")  # of a benchmark that the harness does not define


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


class Questions(Settings):
    """What a model is asked."""

    tasks: list[TaskSource] = Field([], description="Benchmarks")
    prompts: list[str] = Field([], description="Questions whose answers are shown")
    chat_prompts: int = Field(
        100, ge=1, description="Held-out conversations whose answers are checked for the template"
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest answer to a prompt, in tokens")
    instructions: int = Field(
        0,
        ge=0,
        le=200,
        exclude_if=lambda count: count == 0,
        description="Prompts whose following a program checks, of the base and the chat model; 0 = none, 200 = all",
    )

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        check_labels(self.tasks)
        return self


class EvaluateConfig(Questions):
    """What is measured."""

    prompts: list[str] = Field(min_length=1, description="Questions the chat model answers in the summary")

    @model_validator(mode="after")
    def _is_safe(self) -> Self:
        if unsafe := [task.label for task in self.tasks if task.runs_code]:
            raise ValueError(
                f"{', '.join(unsafe)} run programs that the model writes: only `vectorclm evaluate MODEL --suite NAME "
                "--run-code` does that"
            )
        return self


class Item(NamedTuple):
    """One multiple-choice question."""

    context: str
    choices: tuple[str, ...]  # each continues the context as it stands, its leading space included
    answer: int


def open_model(folder: Path, address: str | None = None) -> tuple[CausalLM, Tokenizer]:
    """The model in a folder, known to a person by its address, and its tokenizer.

    Raises DataError where a file is not what it should be, or the tokenizer is another model's.
    """
    model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
    known, expected = tokenizer.get_vocab_size(), model.config.vocab_size
    if known != expected:
        raise DataError(
            f"{address or folder}: the tokenizer has {known:,} tokens, the model {expected:,}: copy both from one "
            "training"
        )
    return model, tokenizer


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
    """Cross-entropy of each target."""
    return torch.cat([F.cross_entropy(*part, reduction="none") for part in _logits(model, hidden_ND, targets_N)])


def _logits(model: CausalLM, hidden_ND: Tensor, targets_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets, a few thousand rows at a time."""
    weight_VD = model.model.embed_tokens.weight
    for hidden_CD, targets_C in zip(torch.split(hidden_ND, 2048), torch.split(targets_N, 2048), strict=True):
        yield product(hidden_CD.to(weight_VD.dtype), weight_VD).float(), targets_C


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
    limit = model.config.max_position_embeddings
    questions = [[pair_ids(tokenizer, item.context, choice, limit) for choice in item.choices] for item in items]
    likelihoods = log_likelihoods(model, questions, micro_batch, device, label)
    sums = [[one.log_likelihood for one in of_item] for of_item in likelihoods]
    scores = accuracies(items, sums)
    if found is not None:
        for number, (item, values) in enumerate(zip(items, sums, strict=True)):
            content, texts = json.dumps(item).encode(), [item.context, *item.choices]
            found.add_question(label, number, content, answered(item, values), values, texts=texts)
    return scores


class Likelihood(NamedTuple):
    """How well a model continues a context with a text."""

    log_likelihood: float  # nats
    greedy: bool  # whether each token is the likeliest


Pair = tuple[list[int], int]  # ids of a context and the text that continues it, and how many of them are the text's


def log_likelihoods(
    model: CausalLM,
    questions: Sequence[Sequence[Pair]],
    micro_batch: int,
    device: torch.device,
    label: str,
) -> list[list[Likelihood]]:
    """Of each pair of each question, the likelihood of the text after the context.

    The model reads what the pairs of a question share once, and makes logits only where a text is scored.
    """
    model.eval()
    trees = [pair_tree(pairs) for pairs in questions]
    order = sorted(range(len(trees)), key=lambda i: -len(trees[i].ids))  # alike in length: little padding
    found: list[list[Likelihood]] = [[] for _ in trees]
    with Progress(f"evaluate {label}", len(trees), "questions") as progress:
        for start in range(0, len(order), micro_batch):
            group = order[start : start + micro_batch]
            for i, values in zip(group, _tree_scores(model, [trees[i] for i in group], device), strict=True):
                found[i] = values
            progress.advance(len(group))
    return found


class Tree(NamedTuple):
    """The inputs of a question's pairs in one sequence: what all begin with, then each pair's own, a branch of it."""

    ids: list[int]
    positions: list[int]  # of each id in its pair
    branches: list[int]  # the pair that an id belongs to; -1 where all share it
    predictors: list[list[int]]  # of each pair, the places whose next ids are scored
    targets: list[list[int]]  # and these ids


def pair_tree(pairs: Sequence[Pair]) -> Tree:
    """The tree of a question."""
    inputs = [ids[:-1] for ids, _ in pairs]
    columns = enumerate(zip(*inputs, strict=False))
    shared = next((place for place, ids in columns if len(set(ids)) > 1), min(map(len, inputs)))
    tree = Tree(inputs[0][:shared], list(range(shared)), [-1] * shared, [], [])
    for pair, (ids, scored) in enumerate(pairs):
        places = [*range(shared), *range(len(tree.ids), len(tree.ids) + len(ids) - 1 - shared)]
        tree.ids.extend(ids[shared:-1])
        tree.positions.extend(range(shared, len(ids) - 1))
        tree.branches.extend([pair] * (len(ids) - 1 - shared))
        tree.predictors.append(places[-scored:])
        tree.targets.append(ids[-scored:])
    return tree


@torch.inference_mode()
def _tree_scores(model: CausalLM, trees: Sequence[Tree], device: torch.device) -> list[list[Likelihood]]:
    """The likelihood of each pair of each tree. An id sees the ids before it that all share, or of its own branch."""
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
    nats, likeliest = [], []
    for logits_CV, targets_C in _logits(model, hidden_BTD[rows_N, places_N], targets_N):
        nats.append(F.cross_entropy(logits_CV, targets_C, reduction="none"))
        likeliest.append(logits_CV.argmax(dim=1) == targets_C)
    sizes = [len(targets) for tree in trees for targets in tree.targets]
    nats_of, likeliest_of = (torch.split(torch.cat(values).cpu(), sizes) for values in (nats, likeliest))
    pairs = zip(nats_of, likeliest_of, strict=True)
    found = (Likelihood(-part.double().sum().item(), bool(same.all())) for part, same in pairs)
    return [[next(found) for _ in tree.targets] for tree in trees]


def pair_ids(tokenizer: Tokenizer, context: str, text: str, limit: int) -> Pair:
    """A context and the text that continues it, after BOS.

    The context's share is what it encodes to alone, a trailing space counted to the text; of what is too long the
    beginning is cut, so that at most `limit` ids are inputs.
    """
    before = encode(tokenizer, context.rstrip())
    whole = encode(tokenizer, context + text)
    shared = len(before)
    if len(whole) <= shared:  # tokens merged over the boundary: the text begins where the ids first differ
        differing = (place for place, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
        shared = next(differing, len(whole) - 1)
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
    """The questions in rows of `CHOICE_COLUMNS`: all, or a seeded draw of `task.limit`.

    Raises DataError naming the row that is none.
    """
    items = []
    for number, row in enumerate(rows):
        try:
            item = Item(row["context"], tuple(row["choices"]), int(row["answer"]))
            if not 0 <= item.answer < len(item.choices):
                raise ValueError(f"answer {item.answer} of {len(item.choices)} choices")
            if not all(choice.strip() for choice in item.choices):
                raise ValueError("an empty choice")
            "".join([item.context, *item.choices]).encode()  # half a surrogate pair is no text
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{task.label}, row {number}: not a multiple-choice question: {error!r}") from error
        items.append(item)
    if not items:
        raise DataError(f"{task.label}: no questions")
    return [items[i] for i in drawn(task, len(items), seed)]


def drawn(task: TaskSource, count: int, seed: int) -> list[int]:
    """Which of a task's `count` items are scored, in their order: all, or a seeded draw of `task.limit`."""
    if not task.limit or task.limit >= count:
        return list(range(count))
    return sorted(random.Random(f"{seed} {task.label}").sample(range(count), task.limit))
