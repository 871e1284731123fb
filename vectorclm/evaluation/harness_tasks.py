"""Benchmarks as lm-evaluation-harness defines them, on rows of a mirror or of the hub.

Prompts, worked examples, filters and metrics are those of the harness's YAML. The rows come from a `TaskSource`,
which is pinned like every other source.
"""

import difflib
import functools
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.api.task
import lm_eval.tasks
from datasets import Dataset, disable_progress_bars
from jinja2 import UndefinedError
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm

from vectorclm.corpus.decontamination import strings
from vectorclm.corpus.sources import TaskSource, drawn
from vectorclm.errors import ConfigError, DataError
from vectorclm.evaluation.harness import VectorCLM
from vectorclm.evaluation.item_scores import ItemScore, ItemScores
from vectorclm.evaluation.sandbox import Problem, check_sandbox, passes
from vectorclm.evaluation.statistics import share_stderr
from vectorclm.runtime.devices import Runtime

FOLDER = Path(lm_eval.tasks.__file__).parent
METRICS = ("acc", "exact_match", "pass@1")  # 1 for a correct item, 0 for others
NAMED = re.compile(rb"""^["']?(?:task|group)["']?:[ ]*["']?([^\s"']+)""", re.MULTILINE)
BITS = "bits_per_byte"  # of texts
KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
PROBLEM = Problem._fields  # columns that a task needs whose answers are programs
FEWSHOT_SEED = 1234  # the default of the harness's command line

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each setting that a definition omits
lm_eval.api.task.tqdm = functools.partial(
    tqdm, disable=True
)  # the bars of the harness and of datasets would break ours
disable_progress_bars()


@functools.cache
def definitions(name: str) -> Mapping[str, Path]:
    """The YAML files of a task, or of all tasks in a group, by task name.

    Raises ConfigError for an unknown name.
    """
    index = TaskManager(include_defaults=False, include_path=sorted(_folders().get(name, []))).task_index
    if name not in index:
        close = difflib.get_close_matches(name, _folders(), 3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ConfigError(f"lm-evaluation-harness has no task {name!r}{hint}")
    return {leaf: Path(index[leaf].yaml_path) for leaf in _leaves(name, index)}


@functools.cache
def _folders() -> Mapping[str, set[Path]]:
    """The folders of each task or group. The harness takes ten seconds to index its 14,000 files."""
    found: dict[str, set[Path]] = defaultdict(set)
    for path in FOLDER.rglob("*.yaml"):
        for name in NAMED.findall(path.read_bytes()):
            found[name.decode()].add(path.parent)
    return found


def _leaves(member: Any, index: Mapping[str, Any]) -> list[str]:
    """The tasks of a member of a group: a name, or an inline group."""
    if isinstance(member, dict):
        inner = member.get("task")
        return _leaves(member["group"], index) if inner is None else _leaves(inner, index)
    if isinstance(member, list):
        return list(dict.fromkeys(leaf for part in member for leaf in _leaves(part, index)))
    entry = index[member]
    if entry.yaml_path is None:  # a tag
        return sorted(entry.tags)
    inside = entry.cfg["task"]
    return [member] if isinstance(inside, str) else _leaves(inside, index)


def check_task(source: TaskSource) -> None:
    """Raise ConfigError unless the harness has the source's task, and the task is of a supported kind."""
    assert source.task is not None
    found = definitions(source.task)
    if len(found) > 1 and source.subset is None:
        raise ConfigError(
            f"{source.label}: {source.task} is a group of {len(found)} tasks: set `subset` to the column of their names"
        )
    for name, path in found.items():
        config = load_yaml(path, resolve_func=False)
        kind = config.get("output_type")
        if kind not in KINDS or "class" in config:
            raise ConfigError(f"{source.label}: {name} is of the kind {kind}; supported are {', '.join(KINDS)}")
        if config.get("unsafe_code") and not source.runs_code:
            raise ConfigError(f"{source.label}: {name} runs what the model writes: set runs_code = true")


def build_tasks(
    source: TaskSource, rows: Iterable[Mapping[str, Any]], runtime: Runtime = Runtime()
) -> dict[str, ConfigurableTask]:
    """The harness's tasks of a source, each on its rows.

    Raises DataError where a task has no rows, or its rows lack a column. Raises ConfigError where a task has none of
    the supported metrics, or runs programs and this system has no sandbox.
    """
    assert source.task is not None
    if source.runs_code:
        check_sandbox(allow_unsandboxed=runtime.allow_unsandboxed)
    by_subset: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_subset[row.get(source.subset) if source.subset else None].append(row)
    tasks = {}
    for name, path in definitions(source.task).items():
        config = _config(source, path, runtime)
        subset = config.get("dataset_name") if source.subset else None
        if not (own := by_subset.get(subset)):
            column = f" where {source.subset} is {subset}" if source.subset else ""
            raise DataError(f"{source.label}: no rows for {name}{column}")
        if source.runs_code and (lost := [column for column in PROBLEM if not isinstance(own[0].get(column), str)]):
            raise DataError(
                f"{source.label}: {name} runs programs, so each row needs {', '.join(PROBLEM)} as texts; "
                f"the columns {', '.join(own[0])} lack {', '.join(lost)}"
            )
        config["custom_dataset"] = functools.partial(_dataset, source.split, Dataset.from_list(own))
        try:
            tasks[name] = HarnessTask(config=config)
            tasks[name].set_fewshot_seed(seed=FEWSHOT_SEED)
        except (KeyError, UndefinedError) as error:
            known = ", ".join(own[0])
            raise DataError(f"{source.label}: {name} reads a column that its rows lack ({error}): {known}") from error
        if not {*METRICS, BITS} & set(tasks[name].aggregation()):
            raise ConfigError(f"{source.label}: {name} has none of the metrics {', '.join(METRICS)} and {BITS}")
    return tasks


class HarnessTask(ConfigurableTask):  # type: ignore[misc]
    """A task that builds its documents only once."""

    _documents: Any = None

    def test_docs(self) -> Any:
        """The documents to score."""
        if self._documents is None:
            self._documents = super().test_docs()
        return self._documents


def _dataset(split: str, rows: Any, **_: Any) -> dict[str, Any]:
    return {split: rows}


def _config(source: TaskSource, path: Path, runtime: Runtime) -> dict[str, Any]:
    """A task's definition, with the source's rows as its only split."""
    unsafe = load_yaml(path, resolve_func=False).get("unsafe_code")
    config = dict(load_yaml(path, resolve_func=not unsafe))
    if unsafe:  # its metric would run programs in this process, so neither it nor its functions are loaded
        config |= {
            "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
            "process_results": functools.partial(_passed, runtime),
            "filter_list": None,
        }
    shots = config.get("num_fewshot") or 0 if source.shots is None else source.shots
    fixed = "samples" in (config.get("fewshot_config") or {})
    # Examples drawn from the rows that are scored never include the item itself.
    fewshot_split = source.split if shots and not fixed else None
    own = {"training_split": None, "validation_split": None, "test_split": source.split, "num_fewshot": shots}
    config |= {**own, "fewshot_split": fewshot_split, "dataset_kwargs": None}
    config.pop("tag", None)
    return config


def _passed(runtime: Runtime, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """pass@1 of the program that continues the prompt, by the tests of HumanEval (arXiv 2107.03374, section 2)."""
    problem = Problem(*(doc[column] for column in PROBLEM))
    return {"pass@1": float(passes(problem, results[0], allow_unsandboxed=runtime.allow_unsandboxed))}


def harness_scores(
    lm: VectorCLM,
    source: TaskSource,
    tasks: Mapping[str, ConfigurableTask],
    seed: int,
    found: ItemScores,
    *,
    template: bool = False,
) -> dict[str, Any]:
    """Score a model on the tasks that `build_tasks` built from a source, over a seeded draw of `source.limit` items.

    `acc` is the share of correct items by the task's first metric (`metric`) and first filter. `acc_norm` is present
    where the task has it. Both have standard errors. `chance` is the accuracy of a blind guess, 0 without choices.
    `parts` has the scores of each task of a group, `others` the harness's other figures of a single task. Texts have
    `bits_per_byte` and its `stderr`. With `template`, a chat model is asked in its template, and worked examples are
    turns. The score of each item is added to `found`.
    """
    places = [(name, number) for name, task in tasks.items() for number in range(len(task.eval_docs))]
    asked: dict[str, list[int]] = defaultdict(list)
    for place in drawn(source, len(places), seed):
        asked[places[place][0]].append(places[place][1])
    chosen = {name: task for name, task in tasks.items() if name in asked}
    results = lm_eval.evaluate(
        lm,
        {"tasks": chosen},
        samples=dict(asked) if len(places) > sum(map(len, asked.values())) else None,
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
        apply_chat_template=template,
        fewshot_as_multiturn=template,
    )
    others = _others(results["results"][next(iter(chosen))]) if len(tasks) == 1 else {}
    samples = {name: _first_filter(of_task) for name, of_task in results["samples"].items()}
    if next(iter(tasks.values())).OUTPUT_TYPE == "loglikelihood_rolling":
        for sample in (sample for of_task in samples.values() for sample in of_task):
            nats, size = -sample[BITS][0], sample[BITS][1]
            found.add_text(source.label, sample["arguments"][0][0].encode(), nats, size)
        return {**found.text_scores(source.label, "documents"), "others": others}
    return {**_graded(source, chosen, samples, found), "others": others}


def _first_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The items with the answers that the task's first filter extracts; other filters read the same answers."""
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def _others(results: Mapping[str, Any]) -> dict[str, float]:
    """The harness's other figures of a task: `perplexity`, `exact_match,flexible-extract`."""
    values = {key.removesuffix(",none"): value for key, value in results.items() if isinstance(value, float)}
    reported = (*METRICS, "acc_norm", BITS)
    return {
        key: float(value)
        for key, value in values.items()
        if key not in reported and "stderr" not in key and math.isfinite(value)
    }


def _graded(
    source: TaskSource, tasks: Mapping[str, ConfigurableTask], samples: Mapping[str, Any], found: ItemScores
) -> dict[str, Any]:
    right: list[bool] = []
    right_norm: list[bool] = []
    chances: list[float] = []
    parts = {}
    metric = ""
    for name, of_task in samples.items():
        task, before = tasks[name], len(right)
        metric = next(metric for metric in METRICS if metric in of_task[0])
        for sample in of_task:
            chooses = task.OUTPUT_TYPE == "multiple_choice"
            chances.append(1 / len(task.doc_to_choice(sample["doc"])) if chooses else 0.0)
            right.append(bool(sample[metric]))
            normed = bool(sample["acc_norm"]) if "acc_norm" in sample else None
            if normed is not None:
                right_norm.append(normed)
            likelihoods = [] if task.OUTPUT_TYPE == "generate_until" else [resp[0][0] for resp in sample["resps"]]
            if not all(map(math.isfinite, likelihoods)):
                raise DataError(f"the model returns no finite likelihood for an item of {name}: it is broken")
            text = sample["resps"][0][0] if task.OUTPUT_TYPE == "generate_until" else None
            content = json.dumps(sample["arguments"], default=str).encode()
            score = ItemScore(content, right[-1], normed, likelihoods, strings(sample["doc"]), text)
            found.add_question(source.label, len(right) - 1, score, part=name)
        parts[name] = {"acc": sum(right[before:]) / len(of_task), "items": len(of_task)}
    acc = sum(right) / len(right)
    scores = {"metric": metric, "acc": acc, "stderr": share_stderr(acc, len(right))}
    if right_norm:
        acc_norm = sum(right_norm) / len(right_norm)
        scores |= {"acc_norm": acc_norm, "stderr_norm": share_stderr(acc_norm, len(right_norm))}
    return {**scores, "chance": sum(chances) / len(chances), "items": len(right), "parts": parts}
