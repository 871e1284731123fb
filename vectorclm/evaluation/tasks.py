"""Benchmarks of an evaluation: each source's rows, scored by our own questions or by the harness's definition."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from vectorclm.corpus.source_reader import read_source
from vectorclm.corpus.sources import CHOICE_COLUMNS, TaskSource, is_remote
from vectorclm.corpus.synthetic_world import WorldConfig
from vectorclm.errors import ConfigError, DataError
from vectorclm.evaluation.item_scores import ItemScores
from vectorclm.evaluation.multiple_choice import read_items, task_scores
from vectorclm.model import CausalLM
from vectorclm.runtime.devices import Runtime


def check_tasks(tasks: Sequence[TaskSource]) -> None:
    """Raise ConfigError for a task that the harness does not know, or where it is needed and not installed."""
    for task in tasks:
        for text in task.columns.values():
            _expression(task, text)
        if task.task is not None:
            _harness()[1].check_task(task)


def _harness() -> tuple[Any, Any]:
    """The modules that know the harness, imported only where it is used: that takes seconds.

    Raises ConfigError where it is not installed.
    """
    from vectorclm.evaluation import harness, harness_tasks

    return harness, harness_tasks


def read_task(task: TaskSource, data: Path | None, world: WorldConfig | None) -> Iterator[Mapping[str, Any]]:
    """The rows of a benchmark, of the mirror `data` or of the hub. Raises DataError where it cannot be read."""
    rows = read_source(task, data, world, CHOICE_COLUMNS if task.task is None else ())
    return rows if is_remote(task, data) else _with_columns(task, rows)


def _with_columns(task: TaskSource, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows of a mirror with the columns that they lack."""
    expressions = {name: _expression(task, text) for name, text in task.columns.items()}
    for row in rows:
        try:
            yield {**row, **{name: expression(**row) for name, expression in expressions.items()}}
        except Exception as error:  # whatever an expression meets
            raise DataError(
                f"{task.label}: {', '.join(expressions)} cannot be made of a row with {', '.join(row)}: {error}"
            ) from error


def _expression(task: TaskSource, text: str) -> Callable[..., Any]:
    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).compile_expression(
            text, undefined_to_none=False
        )
    except TemplateError as error:
        raise ConfigError(f"{task.label}: columns: {text!r} is no Jinja expression: {error}") from error


def score_tasks(
    tasks: Sequence[TaskSource],
    folder: Path,
    model: CausalLM,
    tokenizer: Tokenizer,
    seed: int,
    runtime: Runtime,
    data: Path | None,
    world: WorldConfig | None,
    found: ItemScores,
    *,
    template: bool = False,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Score the model of a folder on one benchmark after the other: its kind (`tasks` or `text`), label and scores.

    With `template`, the harness's tasks are asked in the model's chat template.
    """
    micro_batch, device = runtime.micro_batch_size or 16, model.model.embed_tokens.weight.device
    # A mistake is told before the work.
    lm, prepared = None, [_prepared(task, data, world, seed, runtime) for task in tasks]
    for task, questions in zip(tasks, prepared, strict=True):
        if task.task is None:
            scores = task_scores(model, tokenizer, task.label, questions, micro_batch, device, found)
        else:
            harness, harness_tasks = _harness()
            lm = lm or harness.VectorCLM(folder, micro_batch, runtime)
            scores = harness_tasks.harness_scores(lm, task, questions, seed, found, template=template)
        yield "text" if "bits_per_byte" in scores else "tasks", task.label, scores


def _prepared(task: TaskSource, data: Path | None, world: WorldConfig | None, seed: int, runtime: Runtime) -> Any:
    """The questions of a benchmark, or its tasks of the harness."""
    rows = read_task(task, data, world)
    return read_items(task, rows, seed) if task.task is None else _harness()[1].build_tasks(task, rows, runtime)
