"""What a model is asked in an evaluation, and what every way to score it needs."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer
from torch import Tensor

from vectorclm.corpus import Source, check_labels
from vectorclm.errors import DataError
from vectorclm.items import ItemScores
from vectorclm.model import CausalLM
from vectorclm.products import product
from vectorclm.settings import Settings
from vectorclm.train_tokenizer import load_tokenizer

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
    repetition_penalty: float = Field(
        1.0,
        ge=0.01,
        le=100,
        exclude_if=lambda penalty: penalty == 1,
        description="Of answers: above 1, tokens of the prompt and the answer become less likely",
    )
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


def logits(model: CausalLM, hidden_ND: Tensor, targets_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of hidden states and their targets, a few thousand rows at a time."""
    weight_VD = model.model.embed_tokens.weight
    for hidden_CD, targets_C in zip(torch.split(hidden_ND, 2048), torch.split(targets_N, 2048), strict=True):
        yield product(hidden_CD.to(weight_VD.dtype), weight_VD).float(), targets_C


def write_scores(out: Path, scores: Mapping[str, Any], found: ItemScores) -> None:
    """Write `scores.json`, and what each item scored as Parquet."""
    found.write(out)
    (out / "scores.json").write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def drawn(task: TaskSource, count: int, seed: int) -> list[int]:
    """Which of a task's `count` items are scored, in their order: all, or a seeded draw of `task.limit`."""
    if not task.limit or task.limit >= count:
        return list(range(count))
    return sorted(random.Random(f"{seed} {task.label}").sample(range(count), task.limit))
