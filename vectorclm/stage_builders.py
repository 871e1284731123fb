"""The builders of the stages: one function for each, which writes files into a folder and returns a summary.

Beside them the main figures of each summary, for lineage and reports. Each builder imports what it runs: most commands
only ask the table of stages, and wait for neither torch nor Arrow.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vectorclm.config import ExperimentConfig
from vectorclm.corpus.sources import benchmark_sources
from vectorclm.errors import ConfigError, DataError
from vectorclm.export.hugging_face import export, write_model_files
from vectorclm.runtime.devices import Runtime, memory_explained
from vectorclm.runtime.group import Group
from vectorclm.runtime.lost_workers import lost_workers_explained
from vectorclm.settings import digest
from vectorclm.store.artifact import Artifact, StageSpec, Store
from vectorclm.store.layout import TRAINED
from vectorclm.store.uploads import EarlyUpload
from vectorclm.store.work import attempt_folder
from vectorclm.tokenizer import load_tokenizer, token_lengths
from vectorclm.train_config import TrainConfig

if TYPE_CHECKING:
    from vectorclm.corpus.decontamination import Benchmarks
    from vectorclm.model import CausalLM
    from vectorclm.store.resumable import Slices
    from vectorclm.train import TrainingRun
    from vectorclm.training.checkpoint import Checkpoints

STREAMED = frozenset({"shards", "chat_shards"})  # data sets that trainings stream, and never copy as a whole


@dataclass(frozen=True)
class StageJob:
    """One run of a stage: the experiment, the input artifacts, and the place where the stage runs."""

    name: str
    experiment: ExperimentConfig
    store: Store
    runtime: Runtime
    data: Path | None  # a local mirror to read sources from
    group: Group
    specs: Mapping[str, StageSpec]  # of all stages
    inputs: Mapping[str, Artifact]
    upload: EarlyUpload | None = None  # sends large files to a remote store one by one
    again: bool = False  # the artifact exists, and is built once more for a comparison
    kept: "list[Checkpoints | Slices]" = field(default_factory=list)  # removed once the artifact exists

    @property
    def seed(self) -> int:
        """The experiment's seed."""
        return self.experiment.seed

    def benchmarks(self) -> "Benchmarks | None":
        """The texts that no document or conversation for training may repeat."""
        from vectorclm.corpus.decontamination import read_benchmarks

        sources = benchmark_sources(self.experiment.sample, self.experiment.evaluate.tasks)
        return read_benchmarks(sources, self.data, self.experiment.world)

    def clear_kept(self) -> None:
        """Remove checkpoints and slices that the finished artifact replaces."""
        for leftover in self.kept:
            leftover.clear()


def build_sample(job: StageJob, out: Path) -> Mapping[str, Any]:
    """Draw the documents of all text sources."""
    from vectorclm.corpus.sampler import write_sample
    from vectorclm.corpus.source_reader import SourceRoots, local_bytes
    from vectorclm.runtime.workers import open_workers

    upload = job.upload
    sent = None if upload is None else lambda path: upload.send(path, path.relative_to(out).as_posix())
    config, world = job.experiment.sample, job.experiment.world
    roots = SourceRoots(job.data, world)
    size = sum(local_bytes(source, job.data) for source in config.sources)
    with open_workers(job.runtime.data_processes(size)):
        return write_sample(config, job.seed, out, roots, benchmarks=job.benchmarks(), finished=sent)


def build_tokenizer(job: StageJob, out: Path) -> Mapping[str, Any]:
    """Learn the vocabulary from the sample."""
    from vectorclm.train_tokenizer import train_tokenizer

    length = job.experiment.model.max_position_embeddings
    return train_tokenizer(job.experiment.tokenizer, job.inputs["sample"], length, out)


def build_shards(job: StageJob, out: Path) -> Mapping[str, Any]:
    """Encode and pack the documents of the sample."""
    from vectorclm.runtime.workers import open_workers
    from vectorclm.shards.writer import write_shards
    from vectorclm.store.resumable import ResumableUpload, Slices

    encoder = load_tokenizer(job.inputs["tokenizer"].local())
    slices: Slices
    if job.upload is None:
        slices = Slices(out.parent.parent / "slices", out)
        job.kept.append(slices)
    else:
        slices = ResumableUpload(out.parent, job.upload)
    sample, config = job.inputs["sample"], job.experiment.shards
    with open_workers(job.runtime.data_processes(_bytes(sample))) as slices.workers:
        return write_shards(config, sample, encoder, out, seed=job.seed, slices=slices)


def build_chat_shards(job: StageJob, out: Path) -> Mapping[str, Any]:
    """Draw, render and pack the conversations of all chat sources."""
    from vectorclm.corpus.source_reader import draw, find_row, local_bytes, open_source
    from vectorclm.runtime.workers import open_workers
    from vectorclm.shards.chat_writer import MalformedRowError, write_chat_shards

    config, rows = job.experiment.chat, {}
    assert config is not None  # else the experiment lacks this stage
    for source in config.sources:
        opened = open_source(source, job.data, job.experiment.world, [source.column])
        shuffled = opened.shuffle(seed=job.seed, buffer_size=config.shuffle_buffer)
        rows[source.label] = _column(draw(source, shuffled), source.column)
    encoder = load_tokenizer(job.inputs["tokenizer"].local())
    size = sum(local_bytes(source, job.data) for source in config.sources)
    try:
        with open_workers(job.runtime.data_processes(size)):
            return write_chat_shards(config, rows, encoder, job.seed, out, job.benchmarks())
    except MalformedRowError as error:  # drawn in a shuffled order, in which nobody finds the row
        place = find_row(error.source, job.data, error.source.column, error.row)
        raise (error.at(place) if place is not None else error) from error


def build_model(job: StageJob, out: Path) -> Mapping[str, Any]:
    """Train or fine-tune the base model with all ranks of the group; the other ranks run `follow`.

    Raises ConfigError for a stage other than these two.
    """
    from vectorclm.train import TrainingRun
    from vectorclm.training.checkpoint import Checkpoints

    settings = _training_of(job.experiment, job.name)
    folders = _training_inputs(job.name, job.store, job.specs)
    # The other ranks start only now, when all inputs are on this machine.
    job.group.call(json.dumps([job.experiment.model_dump(mode="json"), job.again]))
    data = {stage: artifact for stage, artifact in job.inputs.items() if stage in STREAMED}
    spec, keep = job.specs[job.name], job.runtime.keep_checkpoints
    with Checkpoints(job.store, spec, out.parent, _identity(data), keep_all=keep, again=job.again) as checkpoints:
        checkpoints.earlier = _earlier(spec) if not job.again else ()
        run = TrainingRun(job.name, job.seed, out.parent, checkpoints, job.runtime, job.group)
        model, summary = _train(job.experiment, folders, data, run)
    if job.again or not keep:
        job.kept.append(checkpoints)
    model.save_pretrained(out)
    length = job.experiment.model.max_position_embeddings
    write_model_files(folders["tokenizer"], length, chat=job.name == "finetune", out=out)
    for written in ("metrics.jsonl", *(["samples.jsonl"] if settings.samples else [])):
        (out.parent / written).rename(out / written)
    return summary


def follow(job: StageJob) -> None:
    """Train as a rank other than the first."""
    from vectorclm.train import TrainingRun
    from vectorclm.training.checkpoint import Checkpoints

    folders = _training_inputs(job.name, job.store, job.specs)
    data = {stage: artifact for stage, artifact in job.inputs.items() if stage in STREAMED}
    spec = job.specs[job.name]
    with (
        attempt_folder(job.store.work_folder(spec, job.runtime.work_dir)) as folder,
        Checkpoints(job.store, spec, folder, _identity(data), again=job.again) as checkpoints,
    ):
        run = TrainingRun(job.name, job.seed, folder, checkpoints, job.runtime, job.group)
        _train(job.experiment, folders, data, run)


def build_scores(job: StageJob, out: Path) -> Mapping[str, Any]:
    """Score the base or the chat model."""
    from vectorclm.evaluation.run import ScoringData, ShardWindows, score_model
    from vectorclm.evaluation.tasks import TaskSetup
    from vectorclm.inference.load import load_model

    with memory_explained(job.runtime.micro_batch_size):
        experiment, training = job.experiment, next(stage for stage in reversed(TRAINED) if stage in job.inputs)
        chat, settings = training == "finetune", _training_of(experiment, training)
        loaded = load_model(job.inputs[training].local(), job.runtime.configure_torch(), chat=chat)
        text = ShardWindows(job.inputs["shards"], settings.document_mask)  # as the model was trained
        setup = TaskSetup(job.seed, job.data, experiment.world)
        data = ScoringData(setup, text, job.inputs["chat_shards"] if chat else None)
        return score_model(loaded, experiment.evaluate, data, job.runtime, out, job.name)


def build_export(job: StageJob, out: Path) -> Mapping[str, Any]:
    """Write both models as Hugging Face directories with their cards."""
    behind = ancestors(job.name, job.specs)
    lineage = {stage: find_input(job.store, spec) for stage, spec in job.specs.items() if stage in behind}
    return export(job.experiment.name, job.inputs, lineage, out)


def ancestors(name: str, specs: Mapping[str, StageSpec]) -> set[str]:
    """The stages whose artifacts a stage depends on, directly or through others."""
    direct = set(specs[name].inputs)
    return direct.union(*(ancestors(stage, specs) for stage in direct))


def _training_inputs(name: str, store: Store, stages: Mapping[str, StageSpec]) -> dict[str, Path]:
    """Local folders of the tokenizer and the other inputs of a training, without the streamed windows."""
    wanted = {"tokenizer", *stages[name].inputs} - STREAMED
    return {stage: find_input(store, stages[stage]).local() for stage in sorted(wanted)}


def _train(
    experiment: ExperimentConfig, folders: Mapping[str, Path], data: Mapping[str, Artifact], run: "TrainingRun"
) -> "tuple[CausalLM, dict[str, Any]]":
    from vectorclm.finetune import finetune
    from vectorclm.inference.generate import answer_text, continuation
    from vectorclm.pretrain import pretrain

    tokenizer = load_tokenizer(folders["tokenizer"])
    say = answer_text if run.stage == "finetune" else continuation
    run = replace(run, respond=lambda model, prompt, longest: say(model, tokenizer, prompt, longest))
    lengths, weights = token_lengths(tokenizer), {source.label: source.weight for source in experiment.sample.sources}
    with memory_explained(run.runtime.micro_batch_size), lost_workers_explained(run.runtime.loader_workers):
        if run.stage == "finetune":
            texts = (data["shards"], weights) if "shards" in data else None
            assert experiment.finetune is not None
            return finetune(experiment.finetune, folders["pretrain"], data["chat_shards"], lengths, run, texts)
        if run.stage == "pretrain":
            return pretrain(experiment.model, experiment.pretrain, weights, data["shards"], lengths, run)
    raise _no_training(run.stage)


def _training_of(experiment: ExperimentConfig, name: str) -> TrainConfig:
    """The settings of a training. Raises ConfigError for a stage that `build_model` does not train."""
    if name == "finetune":
        assert experiment.finetune is not None  # else the experiment lacks the stage
        return experiment.finetune
    if name == "pretrain":
        return experiment.pretrain
    raise _no_training(name)


def _no_training(name: str) -> ConfigError:
    return ConfigError(f"build_model trains pretrain and finetune only: stage {name} needs a builder of its own")


def _earlier(spec: StageSpec) -> list[tuple[str, int]]:
    """The same training without its last changes of the rates: each fingerprint, and up to which step it is equal."""
    schedule, found = spec.config["schedule"], list[tuple[str, int]]()
    changes = schedule.get("changes", [])
    for kept in reversed(range(len(changes))):
        before = {key: value for key, value in schedule.items() if key != "changes"}
        before |= {"changes": changes[:kept]} if kept else {}
        same = replace(spec, config={**spec.config, "schedule": before})
        found.append((same.fingerprint, int(changes[kept]["from_step"])))
    return found


def _identity(data: Mapping[str, Artifact]) -> str:
    """The identity of a training's data: checkpoints of other data are not resumed."""
    prints = [artifact.identity for artifact in data.values()]
    return prints[0] if len(prints) == 1 else digest(prints)


def find_input(store: Store, spec: StageSpec) -> Artifact:
    """The finished artifact that a stage reads. Raises DataError where it is not in the store yet."""
    found = store.find(spec.stage, spec.fingerprint)
    if found is None:
        raise DataError(
            f"{store.uri} has no {spec.stage}/{spec.fingerprint[:12]}…, which this stage reads: run {spec.stage} first"
        )
    return found


def _bytes(artifact: Artifact) -> int:
    return sum(int(entry["bytes"]) for entry in artifact.manifest["files"].values())


def _column(rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[Any]:
    for row in rows:
        yield row[column]


def sample_figures(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Number of documents and bytes of a sample."""
    return {"documents": summary["documents"], "bytes": summary["bytes"]}


def tokenizer_figures(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Size of a vocabulary, and bytes per token."""
    return {"vocabulary": summary["vocab_size"], "bytes_per_token": summary["bytes_per_token"]}


def shard_figures(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Training tokens of shards."""
    return {"tokens": sum(tokens_by_source(summary).values())}


def tokens_by_source(summary: Mapping[str, Any]) -> dict[str, int]:
    """Training tokens of each source, from the summary of shards."""
    sources = {label: splits for label, splits in summary.items() if isinstance(splits, Mapping)}
    return {label: splits["train"]["tokens"] for label, splits in sources.items() if "train" in splits}


def chat_shard_figures(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Training tokens of chat shards, and those that the loss counts."""
    return {key: summary["train"][key] for key in ("tokens", "supervised_tokens")}


def training_figures(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Size of a trained model, its training, and its mean bits per byte on held-out text."""
    found = {key: summary[key] for key in ("parameters", "tokens", "steps", "last_loss") if key in summary}
    bits = [figures["bits_per_byte"] for figures in summary["validation"].values()]
    return found | ({"bits_per_byte": sum(bits) / len(bits)} if bits else {})
