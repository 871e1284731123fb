"""Measure any model on any suite: benchmarks, bits per byte of held-out text, and for a chat model the template.

A suite is a file of benchmarks, or the evaluation of an experiment. The result is an artifact addressed by the model's
content, so the result is found again under any name and place of the model.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from vectorclm.comparison.config import Limits
from vectorclm.config import Suite
from vectorclm.corpus.sample_reader import SampleFiles
from vectorclm.corpus.sources import identity
from vectorclm.errors import ConfigError, DataError
from vectorclm.evaluation.config import Questions
from vectorclm.evaluation.sandbox import find_sandbox
from vectorclm.lineage.chain import trained_on
from vectorclm.runtime.devices import Runtime
from vectorclm.settings import digest
from vectorclm.shards.reader import open_shards
from vectorclm.stages import plans
from vectorclm.store.artifact import Artifact, StageSpec, Store, build
from vectorclm.store.layout import MEASURE
from vectorclm.store.model_ref import Model

if TYPE_CHECKING:  # with torch, which only a measurement itself needs
    from vectorclm.evaluation.run import ScoringData
    from vectorclm.evaluation.tasks import TaskSetup

WINDOWS = 256  # of conversations decoded at a time
VERSION = 4  # raised where new code computes other scores from equal settings
JUDGE_VERSION = 2  # the same for running programs that a model writes


def measure_plan(suite: Suite, limits: Limits, model: Model, store: Store, runtime: Runtime = Runtime()) -> StageSpec:
    """The specification of a measurement. `suite` must be pinned; the model is measured on the data in the store.

    `not_run` names the tasks that cannot run here, so that a result without them differs from one with their scores.
    """
    data = {}
    asked, refused = questions_within(suite, limits, runtime), not_run(suite, limits, runtime)
    if suite.experiment is not None:
        stages = plans(suite.experiment)
        scored = ("sample", *(["chat_shards"] if model.chat else []))
        data = {name: stages[name].fingerprint for name in scored if name in stages}
    config = {
        "suite": suite.name,
        "seed": suite.seed,
        "tasks": [identity(task) for task in asked.tasks],
        "documents": limits.documents,
        "chat_prompts": asked.chat_prompts,
        "max_new_tokens": asked.max_new_tokens,
        "prompts": asked.prompts,
        "data": data,
        **({"not_run": sorted(refused)} if refused else {}),
        **({"judge": JUDGE_VERSION} if any(task.runs_code for task in asked.tasks) else {}),
        **({"template": True} if limits.template else {}),
        **({"instructions": asked.instructions} if asked.instructions else {}),
        **({"repetition_penalty": asked.repetition_penalty} if asked.repetition_penalty != 1 else {}),
    }
    finished = {name: print_ for name, print_ in data.items() if store.find(name, print_) is not None}
    read = {name: artifact.fingerprint for name, artifact in trained_on(model, store).items()}
    inputs = {"model": model.content, **finished, **({"training": digest(read)} if read else {})}
    return StageSpec(MEASURE, VERSION, config, inputs)


def training_text(read: Mapping[str, Artifact], tokenizer: Tokenizer) -> Iterator[bytes]:
    """The documents and conversations that `trained_on` found; conversations as text of windows."""
    if (sample := read.get("sample")) is not None:
        files = SampleFiles(sample)
        for label in files.labels:
            yield from (text.encode() for text in files.texts(label, "train"))
    if (conversations := read.get("chat_shards")) is not None:
        with open_shards(conversations, "train") as readers:
            for reader in readers.values():
                for windows in reader.in_order(WINDOWS):
                    for ids in windows.input_ids:
                        yield tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode()


def not_run(suite: Suite, limits: Limits, runtime: Runtime = Runtime()) -> dict[str, str]:
    """The benchmarks that run programs and are not allowed to, or lack a sandbox; each with the reason."""
    found = {}
    for label in [task.label for task in suite.tasks if task.runs_code]:
        if not limits.run_code:
            found[label] = "it runs programs that the model writes; add --run-code to allow it"
        elif (problem := find_sandbox().problem) and not runtime.allow_unsandboxed:
            found[label] = (
                f"it runs programs that the model writes, and there is no sandbox here: {problem}; "
                "--allow-unsandboxed runs them without one"
            )
    return found


def questions_within(suite: Suite, limits: Limits, runtime: Runtime = Runtime()) -> Questions:
    """The questions of a suite, as many as the limits allow, without the benchmarks of `not_run`."""
    refused = not_run(suite, limits, runtime)
    allowed = [task for task in suite.tasks if task.label not in refused]
    tasks = [task.model_copy(update={"limit": limits.items}) if limits.items else task for task in allowed]
    asked: dict[str, Any] = {"tasks": tasks}
    asked |= {"chat_prompts": limits.prompts} if limits.prompts else {}
    asked |= {"max_new_tokens": limits.max_new_tokens} if limits.max_new_tokens else {}
    return suite.model_copy(update=asked)


def left_out(spec: StageSpec, suite: Suite, limits: Limits = Limits(), runtime: Runtime = Runtime()) -> list[str]:
    """The parts of a suite that cannot be measured, one sentence each: data not in the store, programs not allowed."""
    missing = [name for name in spec.config["data"] if name not in spec.inputs]
    what = {"sample": "bits per byte", "chat_shards": "answers in the template"}
    notes = [f"{what[name]} not measured: the store has no finished {name} of {suite.name}" for name in missing]
    return notes + [f"{label} not run: {reason}" for label, reason in not_run(suite, limits, runtime).items()]


def measure(
    suite: Suite, limits: Limits, model: Model, store: Store, runtime: Runtime, data: Path | None
) -> tuple[Artifact, bool]:
    """Score a model on a pinned suite; returns the result, and whether the store had it already.

    The summary, and `scores.json`: `text` (by source: bits_per_byte, stderr, documents, bytes), `tasks` (as the
    stage `evaluate` has them), `chat` for a chat model, `instructions` where the suite has them, `samples`, `not_run`
    (labels of the tasks that could not run). `data` is a local mirror to read tasks from.
    Raises CorruptArtifactError where the model's files are not what their store promises, and ConfigError for a
    benchmark that is not defined.
    """
    from vectorclm.evaluation.run import score_model
    from vectorclm.evaluation.tasks import TaskSetup, check_tasks
    from vectorclm.inference.load import load_model

    spec = measure_plan(suite, limits, model, store, runtime)
    model.verify(store)
    asked = questions_within(suite, limits, runtime)
    check_tasks(asked.tasks)
    if limits.template and not model.chat:
        raise DataError(f"{model.address} is a base model and knows no chat template: leave --template out")
    if limits.template and (own := [task.label for task in asked.tasks if task.task is None]):
        raise ConfigError(
            f"{', '.join(own)} cannot be asked in a template, only tasks of the harness: leave --template out"
        )

    def produce(out: Path) -> Mapping[str, Any]:
        loaded = load_model(model.local(), runtime.configure_torch(), chat=model.chat, address=model.address)
        setup = TaskSetup(suite.seed, data, suite.world, limits.template)
        return score_model(loaded, asked, _scoring_data(suite, spec, model, store, setup), runtime, out, MEASURE)

    return build(store, spec, produce, runtime.work_dir)


def _scoring_data(suite: Suite, spec: StageSpec, model: Model, store: Store, setup: "TaskSetup") -> "ScoringData":
    """The suite's text and conversations that the store has finished, and the model's training text."""
    from vectorclm.evaluation.run import SampleDocuments, ScoringData

    finished = {name: store.find(name, spec.inputs[name]) for name in spec.config["data"] if name in spec.inputs}
    labels = [source.label for source in suite.experiment.sample.sources] if suite.experiment is not None else []
    sample, read = finished.get("sample"), trained_on(model, store)
    text = SampleDocuments(sample, labels, spec.config["documents"]) if sample is not None else None
    repeats = partial(training_text, read) if read else None
    return ScoringData(setup, text, finished.get("chat_shards"), repeats, spec.config.get("not_run", ()))
