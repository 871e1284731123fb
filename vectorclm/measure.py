"""Any model on any suite: its benchmarks, bits per byte of held-out text, and for a chat model the template.

A suite is a file of benchmarks, or the evaluation of an experiment. The result is an artifact addressed by the model's
content, so a model that was measured is found again, however it is called and wherever it lies.
"""

import glob
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from tokenizers import Tokenizer

from vectorclm.artifact import Artifact, Plan, Store, build, default_store, mend
from vectorclm.benchmarks import check_tasks, score_tasks
from vectorclm.corpus import identity, read_texts
from vectorclm.decontamination import contaminated
from vectorclm.errors import ConfigError, CorruptArtifactError, DataError, StoreError, VectorCLMError
from vectorclm.evaluate import TaskSource, open_model, text_scores, write_scores
from vectorclm.finetune import read_prompts
from vectorclm.generate import answer_text, continuation, template_scores
from vectorclm.instructions import PARTS, instruction_scores, instructions
from vectorclm.items import Interval, ItemScores
from vectorclm.model import CausalLM
from vectorclm.progress import Progress
from vectorclm.runtime import Runtime
from vectorclm.settings import Settings, digest
from vectorclm.shards import read_windows
from vectorclm.stages import plans
from vectorclm.suite import Suite
from vectorclm.train_tokenizer import IM_END

STAGE = "measure"
VERSION = 4  # raised where new code makes other scores of equal settings
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")  # what scores depend on
# An artifact of a store, or a folder in it.
ADDRESS = re.compile(r"(?P<root>.+)/(?P<stage>[a-z_]+)/(?P<fingerprint>[0-9a-f]{64})(/(?P<inside>.+))?")
SHORT = re.compile(r"((?P<root>.+)/)?(?P<stage>[a-z_]+)/(?P<start>[0-9a-f]{3,64})(/(?P<inside>.+))?")
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
    run_code: bool = Field(False, description="Run the programs that the model writes (HumanEval), in a sandbox")


@dataclass(frozen=True)
class Model:
    """A model that was found, before anything is loaded."""

    address: str
    content: str  # SHA-256 over the files that scores depend on
    chat: bool  # whether it ends its texts with an end of turn
    artifact: Artifact | None = None  # where it lies in a remote store
    inside: str = ""  # its folder in that artifact

    def local(self) -> Path:
        """A local directory with its files. Raises CorruptArtifactError where a remote file is not as promised."""
        if self.artifact is None:
            return Path(self.address)
        return self.artifact.local(f"{glob.escape(self.inside)}*") / self.inside

    def verify(self, store: Store) -> None:
        """Read its files where another store than `store`, which keeps the results, says what they contain.

        A manifest may claim the content of a better model, and so its scores: then raises CorruptArtifactError.
        """
        if self.artifact is not None and self.artifact.store.uri != store.uri:
            self.local()


def find_model(address: str) -> Model:
    """The model in a local folder, or at `<store>/<stage>/<fingerprint>` of any store; nothing is loaded.

    Of a fingerprint its beginning is enough, and without a store it is the default one (see `whole`). Raises DataError
    where no model is there, StoreError where the store cannot be read, and ConfigError for an address of another kind.
    """
    if address.startswith("models:/"):
        raise ConfigError(f"{address} is known to MLflow only: give it to the `vectorclm` command or to the platform")
    address = whole(address)
    if "://" in address:
        return _find_in_store(address)
    folder = Path(address).absolute()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: a model is a local folder, or <store>/<stage>/<fingerprint>")
    names = {path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/config.json"))}
    _check_files(str(folder), names)
    prints = {}
    for name in MODEL_FILES:
        with (folder / name).open("rb") as file:
            prints[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return Model(str(folder), digest(prints), _is_chat((folder / "tokenizer_config.json").read_bytes(), address))


def whole(address: str, store: Store | None = None) -> str:
    """An address with all digits of its fingerprint, where it has the first of them; any other as it is.

    Without a store in it, as in `finetune/7fa0`, it is of `store`, or else of the default one. Raises ConfigError where
    it begins several artifacts, DataError where it begins none, and StoreError where the store cannot be read.
    """
    address = address.rstrip("/")
    match = SHORT.fullmatch(address)
    if match is None or ADDRESS.fullmatch(address) or Path(address).is_dir():
        return address
    place = Store(match["root"]) if match["root"] else store or Store(default_store())
    try:
        found = [name for name in place.list(match["stage"]) if name.startswith(match["start"])]
    except VectorCLMError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise StoreError(f"{place.uri} cannot be read: {str(error) or type(error).__name__}") from error
    if len(found) > 1:
        raise ConfigError(f"{address} begins {len(found)} artifacts of {place.uri}: write more digits")
    if not found:
        raise DataError(f"{place.uri} has no finished {match['stage']}/{match['start']}…")
    return "/".join([place.uri, match["stage"], found[0], *([match["inside"]] if match["inside"] else [])])


def _find_in_store(address: str) -> Model:
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"{address}: a model in a store is <store>/<stage>/<fingerprint>")
    key, inside = f"{match['stage']}/{match['fingerprint']}", f"{match['inside']}/" if match["inside"] else ""
    try:
        store = Store(match["root"])
        artifact = store.find(match["stage"], match["fingerprint"])
        tokenizer = store.read(f"{key}/{inside}tokenizer_config.json")
    except VectorCLMError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise StoreError(f"{match['root']} cannot be read: {str(error) or type(error).__name__}") from error
    if artifact is None:
        raise DataError(f"{match['root']} has no finished {key}")
    files = artifact.manifest["files"]
    _check_files(address, {name.removeprefix(inside) for name in files if name.startswith(inside)})
    prints = {name: files[inside + name]["sha256"] for name in MODEL_FILES}
    if tokenizer is None or hashlib.sha256(tokenizer).hexdigest() != prints["tokenizer_config.json"]:
        raise CorruptArtifactError(
            f"{address}/tokenizer_config.json is not what the manifest promises: {mend(artifact)}"
        )
    return Model(address, digest(prints), _is_chat(tokenizer, address), artifact, inside)


def _check_files(where: str, names: set[str]) -> None:
    if lost := [name for name in MODEL_FILES if name not in names]:
        inner = sorted(name.partition("/")[0] for name in names if name.endswith("/config.json"))
        hint = f"; the models in it are {', '.join(f'{where}/{name}' for name in inner)}" if inner else ""
        raise DataError(f"{where} is no model directory, it lacks {', '.join(lost)}{hint}")


def _is_chat(tokenizer_config: bytes, where: str) -> bool:
    """Whether the model's texts end where a turn ends."""
    try:
        eos = json.loads(tokenizer_config)["eos_token"]
        return bool((eos["content"] if isinstance(eos, dict) else eos) == IM_END)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: tokenizer_config.json names no eos_token: {error!r}") from error


def measure_plan(suite: Suite, limits: Limits, model: Model, store: Store) -> Plan:
    """What is to be measured. `suite` must be pinned; of its data, what the store has finished is measured on."""
    data = {}
    if suite.experiment is not None:
        stages = plans(suite.experiment)
        data = {name: stages[name].fingerprint for name in ("sample", *(["chat_shards"] if model.chat else []))}
    config = {
        "suite": suite.name,
        "seed": suite.seed,
        "tasks": [identity(task) for task in tasks_within(suite, limits)],
        "documents": limits.documents,
        "chat_prompts": limits.prompts or suite.chat_prompts,
        "max_new_tokens": limits.max_new_tokens or suite.max_new_tokens,
        "prompts": suite.prompts,
        "data": data,
        **({"template": True} if limits.template else {}),
        **({"instructions": suite.instructions} if suite.instructions else {}),
    }
    finished = {name: print_ for name, print_ in data.items() if store.find(name, print_) is not None}
    read = {name: artifact.fingerprint for name, artifact in trained_on(model, store).items()}
    inputs = {"model": model.content, **finished, **({"training": digest(read)} if read else {})}
    return Plan(STAGE, VERSION, config, inputs)


def content_of(artifact: Artifact, inside: str = "") -> str | None:
    """The content of a model by its manifest, as a `Model` has it."""
    files = artifact.manifest["files"]
    if any(inside + name not in files for name in MODEL_FILES):
        return None
    return digest({name: files[inside + name]["sha256"] for name in MODEL_FILES})


def trained_on(model: Model, store: Store) -> dict[str, Artifact]:
    """What of a model's training text the store has: `sample`, and of a chat model `chat_shards`."""
    for stage in ("finetune", "pretrain"):
        for fingerprint in sorted(store.list(stage)):
            found = store.find(stage, fingerprint)
            if found is not None and content_of(found) == model.content:
                return _training_text(found, store)
    return {}


def _training_text(trained: Artifact, store: Store) -> dict[str, Artifact]:
    """Looked for from a training backwards."""
    found: dict[str, Artifact] = {}
    waiting = [trained]
    while waiting:
        for stage, fingerprint in waiting.pop().manifest["inputs"].items():
            artifact = store.find(stage, fingerprint)
            if artifact is not None and stage in ("sample", "chat_shards"):
                found[stage] = artifact
            elif artifact is not None:
                waiting.append(artifact)
    return found


def training_text(read: Mapping[str, Artifact], tokenizer: Tokenizer) -> Iterator[bytes]:
    """The documents and conversations in what `trained_on` found; conversations as windows."""
    if (sample := read.get("sample")) is not None:
        for folder in sorted(path for path in sample.local().iterdir() if path.is_dir()):
            yield from (text.encode() for text in read_texts(folder, "train"))
    if (conversations := read.get("chat_shards")) is not None:
        for folder in sorted(path for path in conversations.local().iterdir() if path.is_dir()):
            for windows in read_windows(folder, "train"):
                for ids in windows.input_ids:
                    yield tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode()


def tasks_within(suite: Suite, limits: Limits) -> list[TaskSource]:
    """The benchmarks of a suite, as many items of each as the limits say, without those that may not run code."""
    allowed = [task for task in suite.tasks if limits.run_code or not task.runs_code]
    return [task.model_copy(update={"limit": limits.items}) if limits.items else task for task in allowed]


def left_out(plan: Plan, suite: Suite) -> list[str]:
    """What of a suite cannot be measured, in a sentence each: data that the store lacks, programs that may not run."""
    missing = [name for name in plan.config["data"] if name not in plan.inputs]
    what = {"sample": "bits per byte", "chat_shards": "answers in the template"}
    notes = [f"{what[name]} not measured: the store has no finished {name} of {suite.name}" for name in missing]
    measured = {task["label"] for task in plan.config["tasks"]}
    return notes + [
        f"{task.label} not measured: it runs programs that the model writes; add --run-code to allow it"
        for task in suite.tasks
        if task.label not in measured
    ]


def measure(
    suite: Suite, limits: Limits, model: Model, store: Store, runtime: Runtime, data: Path | None
) -> tuple[Artifact, bool]:
    """The scores of a model on a pinned suite, and whether they were there already.

    The summary, and `scores.json`: `text` (by source: bits_per_byte, stderr, documents, bytes), `tasks` (as the
    stage `evaluate` has them), `chat` for a chat model, `instructions` where the suite has them, `samples`. `data` is a
    local mirror to read tasks from.
    Raises CorruptArtifactError where the model's files are not what their store promises, and ConfigError for a
    benchmark that is not defined.
    """
    plan = measure_plan(suite, limits, model, store)
    model.verify(store)
    tasks = tasks_within(suite, limits)
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
    with Progress(STAGE, len(labels) + len(tasks) + 1, "parts") as progress:
        for label in labels:
            assert sample is not None
            texts = _documents(sample.local(f"{label}/validation-*") / label, config["documents"], suite.seed)
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
        longest = config["max_new_tokens"]
        if conversations is not None:
            prompts = read_prompts(conversations.local("prompts.jsonl"), config["chat_prompts"], suite.seed)
            scores["chat"] = template_scores(loaded, tokenizer, prompts, longest)
        if count := config.get("instructions", 0):
            scores["instructions"] = instruction_scores(
                loaded, tokenizer, instructions(count), longest, chat=model.chat, out=out, found=found
            )
        respond = answer_text if model.chat else continuation
        scores["samples"] = [
            {"prompt": prompt, "answer": respond(loaded, tokenizer, prompt, longest)} for prompt in config["prompts"]
        ]
        progress.advance(1, "answers")
    return scores


def _documents(folder: Path, limit: int, seed: int) -> list[str]:
    """A seeded draw of a source's held-out documents, in their order."""
    texts = list(read_texts(folder, "validation"))
    chosen = random.Random(f"{seed} {folder.name}").sample(range(len(texts)), min(limit, len(texts)))
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
