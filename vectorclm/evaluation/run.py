"""Any model on any suite: its benchmarks, bits per byte of held-out text, and for a chat model the template.

A suite is a file of benchmarks, or the evaluation of an experiment. The result is an artifact addressed by the model's
content, so a model that was measured is found again, however it is called and wherever it lies.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from tokenizers import Tokenizer

from vectorclm.addresses import Model
from vectorclm.artifact import Artifact, Plan, Store, build
from vectorclm.benchmarks import check_tasks, score_tasks
from vectorclm.bits_per_byte import text_scores
from vectorclm.chat_shards import read_prompts
from vectorclm.corpus import identity
from vectorclm.decontamination import contaminated
from vectorclm.errors import ConfigError, DataError
from vectorclm.evaluate import TaskSource, open_model, write_scores
from vectorclm.generate import Sampling, answer_text, continuation, template_scores
from vectorclm.instruction_prompts import instructions
from vectorclm.instructions import PARTS, instruction_scores
from vectorclm.items import Interval, ItemScores
from vectorclm.lineage import trained_on
from vectorclm.model import CausalLM
from vectorclm.progress import Progress
from vectorclm.runtime import Runtime
from vectorclm.sample_files import SampleFiles
from vectorclm.sandbox import find_sandbox
from vectorclm.settings import Settings, digest
from vectorclm.shard_reader import open_shards
from vectorclm.stages import plans
from vectorclm.suite import Suite

STAGE = "measure"
WINDOWS = 256  # of conversations, that are decoded at a time
VERSION = 4  # raised where new code makes other scores of equal settings
JUDGE_VERSION = 2  # the same of the programs that a model writes
NOISE = 2.0  # standard errors of a difference; what is more is no accident, 19 times in 20


class Limits(Settings):
    """How much is measured."""

    items: int = Field(0, ge=0, le=1_000_000, description="Questions of each task; 0 = as many as the suite asks")
    documents: int = Field(200, ge=2, le=100_000, description="Held-out documents of each source, 2 to 100,000")
    prompts: int = Field(
        0, ge=0, le=100_000, description="Held-out conversations whose answers are checked; 0 = the suite's number"
    )
    max_new_tokens: int = Field(0, ge=0, le=4096, description="Longest answer, in tokens, to 4,096; 0 = the suite's")
    template: bool = Field(False, description="Ask a chat model the benchmarks in its chat template")
    run_code: bool = Field(
        False,
        description="Run the programs that the model writes (HumanEval), in a sandbox; without one, they do not run",
    )


def measure_plan(suite: Suite, limits: Limits, model: Model, store: Store, runtime: Runtime = Runtime()) -> Plan:
    """What is to be measured. `suite` must be pinned; of its data, what the store has finished is measured on.

    A task that cannot run here is named in `not_run`, so that its absence is another result than its scores.
    """
    data = {}
    tasks, refused = tasks_within(suite, limits, runtime), not_run(suite, limits, runtime)
    if suite.experiment is not None:
        stages = plans(suite.experiment)
        data = {name: stages[name].fingerprint for name in ("sample", *(["chat_shards"] if model.chat else []))}
    config = {
        "suite": suite.name,
        "seed": suite.seed,
        "tasks": [identity(task) for task in tasks],
        "documents": limits.documents,
        "chat_prompts": limits.prompts or suite.chat_prompts,
        "max_new_tokens": limits.max_new_tokens or suite.max_new_tokens,
        "prompts": suite.prompts,
        "data": data,
        **({"not_run": sorted(refused)} if refused else {}),
        **({"judge": JUDGE_VERSION} if any(task.runs_code for task in tasks) else {}),
        **({"template": True} if limits.template else {}),
        **({"instructions": suite.instructions} if suite.instructions else {}),
        **({"repetition_penalty": suite.repetition_penalty} if suite.repetition_penalty != 1 else {}),
    }
    finished = {name: print_ for name, print_ in data.items() if store.find(name, print_) is not None}
    read = {name: artifact.fingerprint for name, artifact in trained_on(model, store).items()}
    inputs = {"model": model.content, **finished, **({"training": digest(read)} if read else {})}
    return Plan(STAGE, VERSION, config, inputs)


def training_text(read: Mapping[str, Artifact], tokenizer: Tokenizer) -> Iterator[bytes]:
    """The documents and conversations in what `trained_on` found; conversations as windows."""
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
    """The benchmarks of a suite that run programs and may not, or have no sandbox here; with the reason of each."""
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


def tasks_within(suite: Suite, limits: Limits, runtime: Runtime = Runtime()) -> list[TaskSource]:
    """The benchmarks of a suite, as many items of each as the limits say, without those of `not_run`."""
    refused = not_run(suite, limits, runtime)
    allowed = [task for task in suite.tasks if task.label not in refused]
    return [task.model_copy(update={"limit": limits.items}) if limits.items else task for task in allowed]


def left_out(plan: Plan, suite: Suite, limits: Limits = Limits(), runtime: Runtime = Runtime()) -> list[str]:
    """What of a suite cannot be measured, in a sentence each: data that the store lacks, programs that may not run."""
    missing = [name for name in plan.config["data"] if name not in plan.inputs]
    what = {"sample": "bits per byte", "chat_shards": "answers in the template"}
    notes = [f"{what[name]} not measured: the store has no finished {name} of {suite.name}" for name in missing]
    return notes + [f"{label} not run: {reason}" for label, reason in not_run(suite, limits, runtime).items()]


def measure(
    suite: Suite, limits: Limits, model: Model, store: Store, runtime: Runtime, data: Path | None
) -> tuple[Artifact, bool]:
    """The scores of a model on a pinned suite, and whether they were there already.

    The summary, and `scores.json`: `text` (by source: bits_per_byte, stderr, documents, bytes), `tasks` (as the
    stage `evaluate` has them), `chat` for a chat model, `instructions` where the suite has them, `samples`, `not_run`
    (labels of the tasks that could not run). `data` is a local mirror to read tasks from.
    Raises CorruptArtifactError where the model's files are not what their store promises, and ConfigError for a
    benchmark that is not defined.
    """
    plan = measure_plan(suite, limits, model, store, runtime)
    model.verify(store)
    tasks = tasks_within(suite, limits, runtime)
    check_tasks(tasks)
    if limits.template and not model.chat:
        raise DataError(f"{model.address} is a base model and knows no chat template: leave --template out")
    if limits.template and (own := [task.label for task in tasks if task.task is None]):
        raise ConfigError(
            f"{', '.join(own)} cannot be asked in a template, only tasks of the harness: leave --template out"
        )

    def produce(out: Path) -> Mapping[str, Any]:
        found = ItemScores()
        scores = _scores(suite, tasks, plan, model, store, runtime, data, out, found)
        write_scores(out, scores, found)
        return scores

    return build(store, plan, produce, runtime.work_dir)


def _scores(
    suite: Suite,
    tasks: Sequence[TaskSource],
    plan: Plan,
    model: Model,
    store: Store,
    runtime: Runtime,
    data: Path | None,
    out: Path,
    found: ItemScores,
) -> dict[str, Any]:
    config, device = plan.config, runtime.configure_torch()
    folder = model.local()
    loaded, tokenizer = open_model(folder, model.address)
    loaded = loaded.to(device)
    inputs = {name: store.find(name, plan.inputs[name]) for name in config["data"] if name in plan.inputs}
    sample, conversations = inputs.get("sample"), inputs.get("chat_shards")
    drawn_from = suite.experiment.sample.sources if sample is not None and suite.experiment is not None else []
    labels = [source.label for source in drawn_from]
    scores: dict[str, Any] = {"text": {}, "tasks": {}}
    if "not_run" in config:
        scores["not_run"] = config["not_run"]
    with Progress(STAGE, len(labels) + len(tasks) + 1, "parts") as progress:
        for label in labels:
            assert sample is not None
            texts = _documents(sample, label, config["documents"], suite.seed)
            scores["text"][label] = documents_scores(loaded, tokenizer, label, texts, device, found)
            progress.advance(1, label)
        where, template = (suite.seed, runtime, data, suite.world), "template" in config
        for kind, label, scored in score_tasks(tasks, folder, loaded, tokenizer, *where, found, template=template):
            scores[kind][label] = scored
            progress.advance(1, label)
        if read := trained_on(model, store):
            repeated = contaminated(found.contents, training_text(read, tokenizer))
            for label, marks in found.mark(repeated.tolist()).items():
                scores["tasks"][label] |= marks
        how = config["max_new_tokens"], Sampling(repetition_penalty=config.get("repetition_penalty", 1))
        if conversations is not None:
            prompts = read_prompts(conversations, config["chat_prompts"], suite.seed)
            scores["chat"] = template_scores(loaded, tokenizer, prompts, *how)
        if count := config.get("instructions", 0):
            scores["instructions"] = instruction_scores(
                loaded, tokenizer, instructions(count), *how, chat=model.chat, out=out, found=found
            )
        respond = answer_text if model.chat else continuation
        scores["samples"] = [
            {"prompt": prompt, "answer": respond(loaded, tokenizer, prompt, *how)} for prompt in config["prompts"]
        ]
        progress.advance(1, "answers")
    return scores


def _documents(sample: Artifact, label: str, limit: int, seed: int) -> list[str]:
    """A seeded draw of a source's held-out documents, in their order."""
    texts = list(SampleFiles(sample).texts(label, "validation"))
    chosen = random.Random(f"{seed} {label}").sample(range(len(texts)), min(limit, len(texts)))
    return [texts[i] for i in sorted(chosen)]


def documents_scores(
    model: CausalLM, tokenizer: Tokenizer, label: str, texts: Sequence[str], device: torch.device, found: ItemScores
) -> dict[str, float]:
    """Bits per byte over all `texts`, each read on its own, and its standard error over the draw of documents.

    What each scored is added to `found`.
    """
    for text in texts:
        scores = text_scores(model, tokenizer, text, device)
        found.add_text(label, text.encode(), scores["nats_per_token"] * scores["tokens"], int(scores["bytes"]))
    return found.text_scores(label, "documents")


class Figure(NamedTuple):
    """A score and its standard error."""

    value: float
    stderr: float


class Change(NamedTuple):
    """One score of two results of the same suite."""

    name: str
    before: Figure
    after: Figure
    paired: Interval | None = None  # where both were scored on the same items, of which it is known what each scored

    @property
    def difference(self) -> float:
        """By how much it rose."""
        return self.after.value - self.before.value

    @property
    def noise(self) -> float:
        """The difference that chance may make where both results are independent; a paired one makes less."""
        return NOISE * math.hypot(self.before.stderr, self.after.stderr)

    @property
    def beyond_noise(self) -> bool:
        """Whether the models differ: by the pairs, where there are any."""
        if self.paired is not None:
            return self.paired.beyond_noise
        return abs(self.difference) > self.noise

    @property
    def fell(self) -> bool:
        """Whether the later model is worse; of bits per byte, more are worse."""
        return self.beyond_noise and (self.difference > 0) == self.name.startswith("bits_per_byte")

    @property
    def verdict(self) -> str:
        """What may be said of the later model."""
        return "within noise" if not self.beyond_noise else "worse" if self.fell else "better"


def figures(scores: Mapping[str, Any]) -> dict[str, Figure]:
    """What of the scores compares: `acc.<task>`, `bits_per_byte.<source>`, `in_template` (share of the prompts),
    `followed_content`, `followed_form` and `followed`.
    """
    found = {f"acc.{label}": Figure(task["acc"], task["stderr"]) for label, task in scores["tasks"].items()}
    for label, text in scores["text"].items():
        found[f"bits_per_byte.{label}"] = Figure(text["bits_per_byte"], text["stderr"])
    if "chat" in scores:
        count = scores["chat"]["prompts"]
        share = scores["chat"]["answered_in_template"] / count
        found["in_template"] = Figure(share, math.sqrt(share * (1 - share) / max(1, count - 1)))
    for name in PARTS:
        if followed := scores.get("instructions", {}).get(name):
            found[name] = Figure(followed["share"], followed["stderr"])
    return found


def changes(before: Mapping[str, Figure], after: Mapping[str, Figure]) -> list[Change]:
    """Every score that both results have."""
    return [Change(name, before[name], figure) for name, figure in after.items() if name in before]
