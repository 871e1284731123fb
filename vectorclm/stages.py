"""The stages of the pipeline as one table: what each is for, reads and builds; adding a stage is adding a row.

`plans` knows every fingerprint before anything runs; `run_stage` builds one artifact, or finds it built.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vectorclm.config import ExperimentConfig
from vectorclm.corpus.decontamination import benchmark_sources
from vectorclm.corpus.sampler import summary_lines as document_summary_lines
from vectorclm.corpus.sources import Source, identity
from vectorclm.errors import ConfigError, ReproducibilityError
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.distributed import ALONE, Group
from vectorclm.settings import validate
from vectorclm.shards.blocks import ShardDescriber
from vectorclm.shards.chat_writer import summary_lines as conversation_summary_lines
from vectorclm.stage_builders import (
    StageJob,
    build_chat_shards,
    build_export,
    build_model,
    build_sample,
    build_scores,
    build_shards,
    build_tokenizer,
    find_input,
    follow,
)
from vectorclm.store.artifact import Artifact, StageSpec, Store, build, rebuild
from vectorclm.store.layout import STAGES
from vectorclm.store.uploads import Sending


def _no_sources(experiment: ExperimentConfig) -> Sequence[Source]:
    return ()


def _no_lines(summary: Mapping[str, Any]) -> list[str]:
    return []


@dataclass(frozen=True)
class Stage:
    """One row of the table: all that the rest of the product asks about a stage."""

    name: str
    about: str  # what it does, for help texts and forms
    inputs: tuple[str, ...]  # the stages whose artifacts it reads
    settings: Callable[[ExperimentConfig], Mapping[str, Any]]  # what of an experiment enters its fingerprint
    build: Callable[[StageJob, Path], Mapping[str, Any]]
    version: int = 1  # raised where new code builds something else from equal settings
    reads: str | None = None  # of a training: the data set that it reads as it goes
    scores: str | None = None  # of an evaluation: the training whose model it scores
    model: str | None = None  # what its artifact is called where models are: tokenizer, base, chat
    columns: Mapping[str, str] | None = None  # of a data set: its columns and their types
    sources: Callable[[ExperimentConfig], Sequence[Source]] = _no_sources  # what it draws from
    summary_lines: Callable[[Mapping[str, Any]], list[str]] = _no_lines  # what it kept and dropped
    optional_inputs: Callable[[ExperimentConfig], tuple[str, ...]] = lambda experiment: ()

    @property
    def trains(self) -> bool:
        """Whether several processes can build it together."""
        return self.reads is not None

    @property
    def own_process(self) -> bool:
        """Whether it runs torch, and so in a process of its own, or in several."""
        return self.trains or self.scores is not None


def _with_identities(config: Any, name: str) -> dict[str, Any]:
    return {**config.model_dump(), name: [identity(source) for source in getattr(config, name)]}


def _benchmarks(experiment: ExperimentConfig) -> list[dict[str, Any]]:
    return [identity(source) for source in benchmark_sources(experiment.sample, experiment.evaluate.tasks)]


TABLE = (
    Stage(
        "sample",
        about="draw the documents and write them as Parquet",
        inputs=(),
        settings=lambda e: {**_with_identities(e.sample, "sources"), "decontaminate_with": _benchmarks(e)},
        build=build_sample,
        version=2,
        columns={"text": "string", "id": "string"},
        sources=lambda e: e.sample.sources,
        summary_lines=document_summary_lines,
    ),
    Stage(
        "tokenizer",
        about="learn the byte-level BPE",
        inputs=("sample",),
        settings=lambda e: e.tokenizer.model_dump(),
        build=build_tokenizer,
        model="tokenizer",
    ),
    Stage(
        "shards",
        about="tokenize the documents into windows",
        inputs=("sample", "tokenizer"),
        settings=lambda e: e.shards.model_dump(),
        build=build_shards,
        version=3,
        columns={"input_ids": "integer"},
    ),
    Stage(
        "chat_shards",
        about="render and pack the conversations",
        inputs=("tokenizer",),
        settings=lambda e: {**_with_identities(e.chat, "sources"), "decontaminate_with": _benchmarks(e)},
        build=build_chat_shards,
        version=5,
        columns={"input_ids": "integer", "supervised": "integer"},
        sources=lambda e: e.chat.sources,
        summary_lines=conversation_summary_lines,
    ),
    Stage(
        "pretrain",
        about="train the base model over the curriculum",
        inputs=("shards",),
        settings=lambda e: {"model": e.model.model_dump(), **e.pretrain.model_dump()},
        build=build_model,
        version=5,
        reads="shards",
        model="base",
    ),
    Stage(
        "evaluate_base",
        about="score the base model",
        inputs=("pretrain", "shards"),
        settings=lambda e: _with_identities(e.evaluate, "tasks"),
        build=build_scores,
        version=6,
        scores="pretrain",
        sources=lambda e: e.evaluate.tasks,
    ),
    Stage(
        "finetune",
        about="fine-tune the base model on the conversations",
        inputs=("pretrain", "chat_shards"),
        settings=lambda e: e.finetune.model_dump(),
        build=build_model,
        version=5,
        reads="chat_shards",
        model="chat",
        optional_inputs=lambda e: ("shards",) if e.finetune.replay else (),
    ),
    Stage(
        "evaluate",
        about="score the chat model",
        inputs=("finetune", "chat_shards", "shards"),
        settings=lambda e: _with_identities(e.evaluate, "tasks"),
        build=build_scores,
        version=6,
        scores="finetune",
        sources=lambda e: e.evaluate.tasks,
    ),
    Stage(
        "export",
        about="write the models as Hugging Face directories with their cards",
        inputs=("pretrain", "evaluate_base", "finetune", "evaluate"),
        settings=lambda e: {"name": e.name},
        build=build_export,
    ),
)
BY_NAME = {stage.name: stage for stage in TABLE}
READS = {stage.name: stage.reads for stage in TABLE if stage.reads is not None}
TRAININGS = frozenset(READS)
EVALUATED = {stage.name: stage.scores for stage in TABLE if stage.scores is not None}


def plans(experiment: ExperimentConfig) -> dict[str, StageSpec]:
    """What every stage is asked to build, in an order in which inputs come first. The experiment must be pinned."""
    specs: dict[str, StageSpec] = {}
    for stage in TABLE:
        inputs = {name: specs[name].fingerprint for name in (*stage.inputs, *stage.optional_inputs(experiment))}
        config = {**stage.settings(experiment), "seed": experiment.seed}
        specs[stage.name] = StageSpec(stage.name, stage.version, config, inputs)
    return specs


def run_stage(
    name: str,
    experiment: ExperimentConfig,
    store: Store,
    runtime: Runtime,
    data: Path | None,
    *,
    again: bool = False,
    group: Group = ALONE,
) -> tuple[Artifact, bool]:
    """Build the artifact of one stage, or find it; and whether it was there already.

    `data` is a local mirror to read sources from. With `again`, a finished stage is built once more beside its
    artifact. The first rank of `group` runs this, the others `follow_stage`. Raises DataError where an input
    is not in the store yet, and ReproducibilityError where what was built again is not the same to the byte.
    """
    specs = plans(experiment)
    if name not in specs:
        raise ConfigError(f"no stage {name!r}: there are {', '.join(STAGES)}")
    spec = specs[name]
    found = store.find_whole(spec)
    if found is not None and not again:
        return found, True
    inputs = {stage: find_input(store, specs[stage]) for stage in spec.inputs}
    # What is large goes to a remote store file by file; what is only built again stays here to be compared.
    upload = Sending(store, spec, ShardDescriber) if found is None and not store.is_local else None
    job = StageJob(name, experiment, store, runtime, data, group, specs, inputs, upload, again=found is not None)

    def produce(out: Path) -> Mapping[str, Any]:
        return BY_NAME[name].build(job, out)

    if found is not None:
        different = rebuild(store, found, spec, produce, runtime.work_dir)
        artifact, reused = found, True
    else:
        different = []
        artifact, reused = build(store, spec, produce, runtime.work_dir, ShardDescriber(), upload)
    for left in job.kept:
        left.clear()
    if different:
        raise ReproducibilityError(
            f"{name} made again differs from {artifact.uri} in {', '.join(different)}; the artifact stays as it is. "
            f"It was made with {artifact.manifest['environment']}; on GPUs, deterministic has to be set in the runtime"
        )
    return artifact, reused


def summary_lines(name: str, summary: Mapping[str, Any]) -> list[str]:
    """What a stage that draws data kept and dropped, a line for each source; nothing for the others."""
    return BY_NAME[name].summary_lines(summary)


def follow_stage(name: str, store: Store, runtime: Runtime, group: Group) -> None:
    """Train beside the first rank, once it calls; where it finds the artifact, or cannot begin, it calls nobody."""
    task = group.call()
    if task is None:
        return
    values, again = json.loads(task)
    experiment = validate(ExperimentConfig, values, "the first rank's experiment")
    specs = plans(experiment)
    inputs = {stage: find_input(store, specs[stage]) for stage in specs[name].inputs}
    follow(StageJob(name, experiment, store, runtime, None, group, specs, inputs, upload=None, again=again))
