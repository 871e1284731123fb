"""Multiple choice by log-likelihood: the tokens that the choices of a question share are read once."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from vectorclm.corpus.sources import TaskSource, drawn
from vectorclm.errors import DataError
from vectorclm.evaluation.bits_per_byte import logits
from vectorclm.evaluation.item_scores import ItemScore, ItemScores
from vectorclm.evaluation.statistics import share_stderr
from vectorclm.inference.model_slices import by_model
from vectorclm.model import CausalLM
from vectorclm.runtime.progress import Progress
from vectorclm.tokenizer import BOS_ID, PAD_ID, encode


class Item(NamedTuple):
    """One multiple-choice question."""

    context: str
    choices: tuple[str, ...]  # each continues the context, leading space included
    answer: int


def task_scores(
    model: CausalLM,
    tokenizer: Tokenizer,
    label: str,
    items: Sequence[Item],
    micro_batch: int,
    found: ItemScores | None = None,
) -> dict[str, Any]:
    """Accuracy by the log-likelihood of each choice (`acc`), and by the log-likelihood per character (`acc_norm`).

    The space before a choice is not counted. Both are those of EleutherAI's lm-evaluation-harness, with its standard
    errors `stderr` and `stderr_norm`; `chance` is the accuracy of a blind guess. The model reads what the choices of an
    item share once, and logits are computed only where a choice is scored. The score of each item is added to `found`.
    """
    limit = model.config.max_position_embeddings
    questions = [[pair_ids(tokenizer, item.context, choice, limit) for choice in item.choices] for item in items]
    likelihoods = log_likelihoods(model, questions, micro_batch, label)
    sums = [[one.log_likelihood for one in of_item] for of_item in likelihoods]
    scores = accuracies(items, sums)
    if found is not None:
        for number, (item, values) in enumerate(zip(items, sums, strict=True)):
            content, texts = json.dumps(item).encode(), [item.context, *item.choices]
            found.add_question(label, number, ItemScore(content, *answered(item, values), values, texts))
    return scores


class Likelihood(NamedTuple):
    """How likely a text is after a context."""

    log_likelihood: float  # nats
    greedy: bool  # whether each token is the likeliest


Pair = tuple[list[int], int]  # ids of a context and the text after it, and the number of the text's ids


def log_likelihoods(
    model: CausalLM, questions: Sequence[Sequence[Pair]], micro_batch: int, label: str
) -> list[list[Likelihood]]:
    """The log-likelihood of the text after the context, for each pair of each question.

    The model reads what the pairs of a question share once, and logits are computed only where a text is scored.
    """
    model.eval()
    trees = [pair_tree(pairs) for pairs in questions]
    order = sorted(range(len(trees)), key=lambda i: -len(trees[i].ids))  # similar lengths need little padding
    found: list[list[Likelihood]] = [[] for _ in trees]
    with Progress(f"evaluate {label}", len(trees), "questions") as progress:
        groups = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
        scored = by_model(model, _tree_scores, (([trees[i] for i in group],) for group in groups))
        for group, scores in zip(groups, scored, strict=True):
            for i, values in zip(group, scores, strict=True):
                found[i] = values
            progress.advance(len(group))
    return found


class Tree(NamedTuple):
    """The inputs of a question's pairs in one sequence: the shared beginning, then a branch for each pair."""

    ids: list[int]
    positions: list[int]  # of each id in its pair
    branches: list[int]  # the pair of each id; -1 for the shared beginning
    predictors: list[list[int]]  # of each pair, the places that predict the scored ids
    targets: list[list[int]]  # of each pair, the scored ids


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
def _tree_scores(model: CausalLM, trees: Sequence[Tree]) -> list[list[Likelihood]]:
    """The likelihoods of the pairs of each tree. An id sees earlier shared ids and those of its own branch."""
    device = model.model.embed_tokens.weight.device
    length = max(len(tree.ids) for tree in trees)

    def padded(rows: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)

    ids_BT, positions_BT = padded((tree.ids for tree in trees), PAD_ID), padded((tree.positions for tree in trees), 0)
    branches_BT = padded((tree.branches for tree in trees), -2)  # padding is a separate branch
    seen_BTT = (branches_BT[:, None] == -1) | (branches_BT[:, None] == branches_BT[:, :, None])
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        hidden_BTD = model.model(ids_BT, position_ids_BT=positions_BT, mask_BTS=seen_BTT.tril())
    scored = [
        (row, place, target)
        for row, tree in enumerate(trees)
        for places, targets in zip(tree.predictors, tree.targets, strict=True)
        for place, target in zip(places, targets, strict=True)
    ]
    rows_N, places_N, targets_N = torch.tensor(scored, device=device).unbind(1)
    nats, likeliest = [], []
    for logits_CV, targets_C in logits(model, hidden_BTD[rows_N, places_N], targets_N):
        nats.append(F.cross_entropy(logits_CV, targets_C, reduction="none"))
        likeliest.append(logits_CV.argmax(dim=1) == targets_C)
    sizes = [len(targets) for tree in trees for targets in tree.targets]
    nats_of, likeliest_of = (torch.split(torch.cat(values).cpu(), sizes) for values in (nats, likeliest))
    pairs = zip(nats_of, likeliest_of, strict=True)
    found = (Likelihood(-part.double().sum().item(), bool(same.all())) for part, same in pairs)
    return [[next(found) for _ in tree.targets] for tree in trees]


def pair_ids(tokenizer: Tokenizer, context: str, text: str, limit: int) -> Pair:
    """Encode a context and the text that continues it, after BOS.

    The ids of the context alone are the context's, and a trailing space belongs to the text. The beginning is cut so
    that at most `limit` ids are inputs.
    """
    before = encode(tokenizer, context.rstrip())
    whole = encode(tokenizer, context + text)
    shared = len(before)
    if len(whole) <= shared:  # tokens merged over the boundary: the text begins where the ids first differ
        differing = (place for place, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
        shared = next(differing, len(whole) - 1)
    return [BOS_ID, *whole][-limit - 1 :], min(len(whole) - shared, limit)


def accuracies(items: Sequence[Item], sums: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The scores of `task_scores` from the log-likelihoods of choices. Raises DataError where one is not finite."""
    right = right_norm = 0
    for item, values in zip(items, sums, strict=True):
        if not all(math.isfinite(value) for value in values):
            raise DataError(f"the model returns no finite likelihood for {item.context[-80:]!r}: it is broken")
        by_likelihood, by_length = answered(item, values)
        right += by_likelihood
        right_norm += by_length
    n = len(items)
    acc, acc_norm = right / n, right_norm / n
    return {
        "acc": acc,
        "acc_norm": acc_norm,
        "stderr": share_stderr(acc, n),
        "stderr_norm": share_stderr(acc_norm, n),
        "chance": sum(1 / len(item.choices) for item in items) / n,
        "items": n,
    }


def answered(item: Item, values: Sequence[float]) -> tuple[bool, bool]:
    """Whether the answer has the highest log-likelihood, and whether it has the highest per character."""
    normed = [value / len(choice.removeprefix(" ")) for value, choice in zip(values, item.choices, strict=True)]
    return values.index(max(values)) == item.answer, normed.index(max(normed)) == item.answer


def read_items(task: TaskSource, rows: Iterable[Mapping[str, Any]], seed: int) -> list[Item]:
    """The questions in rows of `CHOICE_COLUMNS`: all, or a seeded draw of `task.limit`.

    Raises DataError that names a row which is not a question.
    """
    items = []
    for number, row in enumerate(rows):
        try:
            item = Item(row["context"], tuple(row["choices"]), int(row["answer"]))
            if not 0 <= item.answer < len(item.choices):
                raise ValueError(f"answer {item.answer} of {len(item.choices)} choices")
            if not all(choice.strip() for choice in item.choices):
                raise ValueError("an empty choice")
            "".join([item.context, *item.choices]).encode()  # half a surrogate pair is not text
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{task.label}, row {number}: not a multiple-choice question: {error!r}") from error
        items.append(item)
    if not items:
        raise DataError(f"{task.label}: no questions")
    return [items[i] for i in drawn(task, len(items), seed)]
