"""Benchmarks of an evaluation: the rows of each source, scored as multiple choice or as the harness defines."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from vectorclm.corpus.counting import word_pair_baseline
from vectorclm.corpus.source_reader import read_source
from vectorclm.corpus.sources import TaskSource, is_remote
from vectorclm.corpus.synthetic_world import WorldConfig, world_documents
from vectorclm.errors import ConfigError, DataError
from vectorclm.evaluation.expressions import compiled
from vectorclm.evaluation.item_scores import ItemScores
from vectorclm.runtime.devices import Runtime

if TYPE_CHECKING:  # with torch, which only scores need
    from vectorclm.inference.load import LoadedModel

MICRO_BATCH = 16  # questions or windows read at a time, where the runtime does not say


def check_tasks(tasks: Sequence[TaskSource]) -> None:
    """Raise ConfigError for a task that the harness does not know, or where the harness is not installed."""
    for task in tasks:
        for text in task.columns.values():
            _expression(task, text)
        if task.task is not None:
            _harness()[1].check_task(task)


def _harness() -> tuple[Any, Any]:
    """The modules that use the harness, imported only where they are needed: the import takes seconds.

    Raises ConfigError where the harness is not installed.
    """
    from vectorclm.evaluation import harness, harness_tasks

    return harness, harness_tasks


def read_task(task: TaskSource, data: Path | None, world: WorldConfig | None) -> Iterator[Mapping[str, Any]]:
    """The rows of a benchmark, from the mirror `data` or the hub. Raises DataError where they cannot be read."""
    rows = read_source(task, data, world, task.row_columns)
    of_hub = task.task is not None and is_remote(task, data)  # the harness knows the hub's columns
    return rows if of_hub else _with_columns(task, rows)


def _with_columns(task: TaskSource, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows, with the columns that the task computes from the others."""
    expressions = {name: _expression(task, text) for name, text in task.columns.items()}
    for row in rows:
        try:
            yield {**row, **{name: expression(**row) for name, expression in expressions.items()}}
        except Exception as error:  # whatever an expression meets
            raise DataError(
                f"{task.label}: {', '.join(expressions)} cannot be computed from a row with {', '.join(row)}: {error}"
            ) from error


def _expression(task: TaskSource, text: str) -> Callable[..., Any]:
    try:
        return compiled(text)
    except TemplateError as error:
        raise ConfigError(f"{task.label}: columns: {text!r} is not a Jinja expression: {error}") from error


class TaskSetup(NamedTuple):
    """How the questions of benchmarks are read, drawn and asked."""

    seed: int  # of the draw of items
    mirror: Path | None = None  # a local folder to read from; None reads from the hub
    world: WorldConfig | None = None  # the generated world that tasks may read
    template: bool = False  # whether the harness's tasks are asked in the model's chat template


def score_tasks(
    loaded: "LoadedModel", tasks: Sequence[TaskSource], setup: TaskSetup, runtime: Runtime, found: ItemScores
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Score a model on one benchmark after the other: the kind (`tasks` or `text`), the label and the scores of each.

    The score of each item is added to `found`. The questions of the generated world also have `counting`, the accuracy
    of counting which words share a sentence in the world's documents. Raises what `read_task` does, before the first
    benchmark is scored.
    """
    from vectorclm.evaluation.multiple_choice import task_scores

    micro_batch = runtime.micro_batch_size or MICRO_BATCH
    # All questions are read first, so that an error is reported before the work.
    lm, prepared = None, [_prepared(task, setup, runtime) for task in tasks]
    for task, questions in zip(tasks, prepared, strict=True):
        if task.task is None:
            scores = task_scores(loaded.model, loaded.tokenizer, task.label, questions, micro_batch, found)
            if setup.world is not None and task.is_generated:
                documents = world_documents(setup.world)
                scores["counting"] = word_pair_baseline([item._asdict() for item in questions], documents)
        else:
            harness, harness_tasks = _harness()
            lm = lm or harness.VectorCLM(loaded.folder, micro_batch, runtime)
            scores = harness_tasks.harness_scores(lm, task, questions, setup.seed, found, template=setup.template)
        yield "text" if "bits_per_byte" in scores else "tasks", task.label, scores


def _prepared(task: TaskSource, setup: TaskSetup, runtime: Runtime) -> Any:
    """The questions of a benchmark, or its tasks of the harness."""
    from vectorclm.evaluation.multiple_choice import read_items

    rows = read_task(task, setup.mirror, setup.world)
    return read_items(task, rows, setup.seed) if task.task is None else _harness()[1].build_tasks(task, rows, runtime)
