"""Any model on any suite: its benchmarks, bits per byte of held-out text, and for a chat model the template.

A suite is the evaluation of an experiment. The result is an artifact addressed by the model's content, so a model that
was measured is found again, however it is called and wherever it lies.
"""

import glob
import hashlib
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from tokenizers import Tokenizer

from vectorclm.artifact import Artifact, Plan, Store, build, mend
from vectorclm.config import ExperimentConfig
from vectorclm.corpus import draw, identity, open_source, read_texts
from vectorclm.errors import ConfigError, CorruptArtifactError, DataError, StoreError, VectorCLMError
from vectorclm.evaluate import FORMAT_COLUMNS, read_items, task_scores, text_scores, write_scores
from vectorclm.finetune import read_prompts
from vectorclm.generate import answer_text, continuation, template_scores
from vectorclm.items import Interval, ItemScores
from vectorclm.model import CausalLM
from vectorclm.progress import Progress
from vectorclm.runtime import Runtime
from vectorclm.settings import Settings, digest
from vectorclm.stages import plans
from vectorclm.train_tokenizer import IM_END, load_tokenizer

STAGE = "measure"
VERSION = 4  # raised where new code makes other scores of equal settings
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")  # what scores depend on
# An artifact of a store, or a folder in it.
ADDRESS = re.compile(r"(?P<root>.+)/(?P<stage>[a-z_]+)/(?P<fingerprint>[0-9a-f]{64})(/(?P<inside>.+))?")
NOISE = 2.0  # standard errors of a difference; what is more is no accident, 19 times in 20


class Limits(Settings):
    """How much is measured."""

    items: int = Field(0, ge=0, le=1_000_000, description="Questions of each task; 0 = as many as the suite asks")
    documents: int = Field(200, ge=2, le=100_000, description="Held-out documents of each source, 2 to 100,000")
    prompts: int = Field(
        0, ge=0, le=100_000, description="Held-out conversations whose answers are checked; 0 = the suite's number"
    )
    max_new_tokens: int = Field(0, ge=0, le=4096, description="Longest answer, in tokens, to 4,096; 0 = the suite's")


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

    Raises DataError where no model is there, StoreError where the store cannot be read, and ConfigError for an address
    of another kind.
    """
    if address.startswith("models:/"):
        raise ConfigError(f"{address} is known to MLflow only: give it to the `vectorclm` command or to the platform")
    if "://" in address:
        return _find_in_store(address.rstrip("/"))
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


def _find_in_store(address: str) -> Model:
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"{address}: a model in a store is <store>/<stage>/<fingerprint>, all 64 digits of it")
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


def measure_plan(suite: ExperimentConfig, limits: Limits, model: Model, store: Store) -> Plan:
    """What is to be measured. `suite` must be pinned; of its data, what the store has finished is measured on."""
    stages = plans(suite)
    data = {name: stages[name].fingerprint for name in ("sample", *(["chat_shards"] if model.chat else []))}
    asked = suite.evaluate
    tasks = [task.model_copy(update={"limit": limits.items}) if limits.items else task for task in asked.tasks]
    config = {
        "suite": suite.name,
        "seed": suite.seed,
        "tasks": [identity(task) for task in tasks],
        "documents": limits.documents,
        "chat_prompts": limits.prompts or asked.chat_prompts,
        "max_new_tokens": limits.max_new_tokens or asked.max_new_tokens,
        "prompts": asked.prompts,
        "data": data,
    }
    finished = {name: print_ for name, print_ in data.items() if store.find(name, print_) is not None}
    return Plan(STAGE, VERSION, config, {"model": model.content, **finished})


def left_out(plan: Plan) -> list[str]:
    """What cannot be measured as the store lacks the data for it, in a sentence each."""
    missing = [name for name in plan.config["data"] if name not in plan.inputs]
    what = {"sample": "bits per byte", "chat_shards": "answers in the template"}
    suite = plan.config["suite"]
    return [f"{what[name]} not measured: the store has no finished {name} of {suite}" for name in missing]


def measure(
    suite: ExperimentConfig, limits: Limits, model: Model, store: Store, runtime: Runtime, data: Path | None
) -> tuple[Artifact, bool]:
    """The scores of a model on a pinned suite, and whether they were there already.

    The summary, and `scores.json`: `text` (by source: bits_per_byte, stderr, documents, bytes), `tasks` (as the
    stage `evaluate` has them), `chat` for a chat model, `samples`. `data` is a local mirror to read tasks from.
    Raises CorruptArtifactError where the model's files are not what their store promises.
    """
    plan = measure_plan(suite, limits, model, store)
    model.verify(store)

    def produce(out: Path) -> Mapping[str, Any]:
        found = ItemScores()
        scores = _scores(suite, plan, model, store, runtime, data, found)
        write_scores(out, scores, found)
        return scores

    return build(store, plan, produce, runtime.work_dir)


def _scores(
    suite: ExperimentConfig,
    plan: Plan,
    model: Model,
    store: Store,
    runtime: Runtime,
    data: Path | None,
    found: ItemScores,
) -> dict[str, Any]:
    config, device = plan.config, runtime.configure_torch()
    folder = model.local()
    loaded, tokenizer = CausalLM.from_pretrained(folder).to(device), load_tokenizer(folder)
    inputs = {name: store.find(name, print_) for name, print_ in plan.inputs.items() if name != "model"}
    sample, conversations = inputs.get("sample"), inputs.get("chat_shards")
    labels = [source.label for source in suite.sample.sources] if sample is not None else []
    scores: dict[str, Any] = {"text": {}, "tasks": {}}
    with Progress(STAGE, len(labels) + len(suite.evaluate.tasks) + 1, "parts") as progress:
        for label in labels:
            assert sample is not None
            texts = _documents(sample.local(f"{label}/validation-*") / label, config["documents"], suite.seed)
            scores["text"][label] = documents_scores(loaded, tokenizer, label, texts, device, found)
            progress.advance(1, label)
        for task, asked in zip(suite.evaluate.tasks, config["tasks"], strict=True):
            limited = task.model_copy(update={"limit": asked["limit"]})
            rows = draw(task, open_source(task, data, suite.world, FORMAT_COLUMNS[task.format]))
            items = read_items(limited, rows, suite.seed)
            micro_batch = runtime.micro_batch_size or 16
            scores["tasks"][task.label] = task_scores(loaded, tokenizer, task.label, items, micro_batch, device, found)
            progress.advance(1, task.label)
        longest = config["max_new_tokens"]
        if conversations is not None:
            prompts = read_prompts(conversations.local("prompts.jsonl"), config["chat_prompts"], suite.seed)
            scores["chat"] = template_scores(loaded, tokenizer, prompts, longest)
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
    """What of the scores compares: `acc.<task>`, `bits_per_byte.<source>`, `in_template` (share of the prompts)."""
    found = {f"acc.{label}": Figure(task["acc"], task["stderr"]) for label, task in scores["tasks"].items()}
    for label, text in scores["text"].items():
        found[f"bits_per_byte.{label}"] = Figure(text["bits_per_byte"], text["stderr"])
    if "chat" in scores:
        count = scores["chat"]["prompts"]
        share = scores["chat"]["answered_in_template"] / count
        found["in_template"] = Figure(share, math.sqrt(share * (1 - share) / max(1, count - 1)))
    return found


def changes(before: Mapping[str, Figure], after: Mapping[str, Figure]) -> list[Change]:
    """Every score that both results have."""
    return [Change(name, before[name], figure) for name, figure in after.items() if name in before]
