"""The stages of the pipeline (the DAG) as one table: the purpose, inputs and builder of each stage.

A new stage is a new row. `plans` computes every fingerprint before anything runs. `run_stage` builds one artifact, or
finds it in the store.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vectorclm.config import ExperimentConfig
from vectorclm.corpus.sources import Source, benchmark_sources, identity
from vectorclm.corpus.summary import summary_lines as document_summary_lines
from vectorclm.errors import ConfigError, ReproducibilityError
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.group import ALONE, Group
from vectorclm.settings import validate
from vectorclm.shards.config import ChatConfig
from vectorclm.shards.summary import summary_lines as conversation_summary_lines
from vectorclm.stage_builders import (
    StageJob,
    ancestors,
    build_chat_shards,
    build_export,
    build_model,
    build_sample,
    build_scores,
    build_shards,
    build_tokenizer,
    chat_shard_figures,
    find_input,
    follow,
    sample_figures,
    shard_figures,
    tokenizer_figures,
    training_figures,
)
from vectorclm.store.artifact import Artifact, StageSpec, Store, build, rebuild
from vectorclm.store.layout import EXPORT, STAGES, StageName
from vectorclm.store.uploads import EarlyUpload
from vectorclm.train_config import FinetuneConfig, check_conversations


def _no_sources(experiment: ExperimentConfig) -> Sequence[Source]:
    return ()


def _no_lines(summary: Mapping[str, Any]) -> list[str]:
    return []


def _no_figures(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Stage:
    """One row of the table: everything that the rest of the product asks about a stage."""

    name: StageName
    about: str  # the purpose of the stage, for help texts and forms
    inputs: tuple[StageName, ...]  # the stages whose artifacts this stage reads
    settings: Callable[[ExperimentConfig], Mapping[str, Any]]  # the settings that enter the fingerprint
    build: Callable[[StageJob, Path], Mapping[str, Any]]
    version: int = 1  # raise it when new code builds something else from equal settings
    title: str = ""  # the stage as a heading; the name where it is empty
    result: str = ""  # the artifact in prose, such as "chat model"; the name where it is empty
    reads: StageName | None = None  # a training only: the stage whose windows the training streams
    scores: StageName | None = None  # an evaluation only: the training whose model the stage scores
    model: str | None = None  # the kind of the model in the artifact: tokenizer, base, chat
    sliced: bool = False  # whether workers, also of other machines, can build its slices
    runs_torch: bool = False  # of a stage that neither trains nor scores
    columns: Mapping[str, str] | None = None  # a data set only: the columns and their types
    sources: Callable[[ExperimentConfig], Sequence[Source]] = _no_sources  # the data that the stage reads
    summary_lines: Callable[[Mapping[str, Any]], list[str]] = _no_lines  # what the stage kept and dropped
    figures: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _no_figures  # the main figures of a summary
    optional_inputs: Callable[[ExperimentConfig], tuple[StageName, ...]] = lambda experiment: ()
    of_chat: bool = False  # whether an experiment without conversations lacks the stage
    # Raises ConfigError where later stages cannot use the artifact with this summary.
    check: Callable[[ExperimentConfig, Mapping[str, Any]], None] = lambda experiment, summary: None

    def is_in(self, experiment: ExperimentConfig) -> bool:
        """Whether the experiment has this stage."""
        return not self.of_chat or experiment.chat is not None

    def inputs_of(self, experiment: ExperimentConfig) -> tuple[StageName, ...]:
        """The stages of an experiment whose artifacts this stage reads."""
        every = (*self.inputs, *self.optional_inputs(experiment))
        return tuple(name for name in every if BY_NAME[name].is_in(experiment))

    @property
    def trains(self) -> bool:
        """Whether several processes can build the artifact together."""
        return self.reads is not None

    @property
    def own_process(self) -> bool:
        """Whether the stage runs torch, and therefore runs in one or more processes of its own."""
        return self.trains or self.scores is not None or self.runs_torch

    @property
    def draws(self) -> bool:
        """Whether the stage draws training data from sources, which its settings name."""
        return self.scores is None and self.sources is not _no_sources

    @property
    def language_model(self) -> bool:
        """Whether the artifact is a language model."""
        return self.model not in (None, "tokenizer")

    def described_by(self, specs: Mapping[str, StageSpec]) -> str:
        """The stage whose lineage describes this one: of scores and of copies of a model, the model's."""
        return last_model(specs) if self.name == EXPORT else self.scores or self.name


def _with_identities(config: Any, name: str) -> dict[str, Any]:
    return {**config.model_dump(), name: [identity(source) for source in getattr(config, name)]}


def _chat(experiment: ExperimentConfig) -> ChatConfig:
    assert experiment.chat is not None  # else the experiment lacks the stage
    return experiment.chat


def _finetune(experiment: ExperimentConfig) -> FinetuneConfig:
    assert experiment.finetune is not None  # as above
    return experiment.finetune


def _fills_a_step(experiment: ExperimentConfig, summary: Mapping[str, Any]) -> None:
    check_conversations(_finetune(experiment), summary["train"]["windows"])


def _drops(experiment: ExperimentConfig) -> dict[str, int]:
    """The version of the rule that drops malformed conversations, for experiments that drop some."""
    return {"dropping": 2} if _chat(experiment).malformed == "drop" else {}


def _benchmarks(experiment: ExperimentConfig) -> list[dict[str, Any]]:
    return [identity(source) for source in benchmark_sources(experiment.sample, experiment.evaluate.tasks)]


TABLE = (
    Stage(
        "sample",
        about="draw the documents and write them as Parquet",
        inputs=(),
        settings=lambda e: {**_with_identities(e.sample, "sources"), "decontaminate_with": _benchmarks(e)},
        build=build_sample,
        sliced=True,
        version=2,
        columns={"text": "string", "id": "string"},
        sources=lambda e: e.sample.sources,
        summary_lines=document_summary_lines,
        figures=sample_figures,
    ),
    Stage(
        "tokenizer",
        about="learn the byte-level BPE",
        inputs=("sample",),
        settings=lambda e: e.tokenizer.model_dump(),
        build=build_tokenizer,
        figures=tokenizer_figures,
        model="tokenizer",
    ),
    Stage(
        "shards",
        about="tokenize the documents into windows",
        inputs=("sample", "tokenizer"),
        settings=lambda e: e.shards.model_dump(),
        build=build_shards,
        version=3,
        sliced=True,
        columns={"input_ids": "integer"},
        figures=shard_figures,
    ),
    Stage(
        "chat_shards",
        result="chat shards",
        about="render and pack the conversations",
        inputs=("tokenizer",),
        settings=lambda e: {
            **_with_identities(_chat(e), "sources"),
            "decontaminate_with": _benchmarks(e),
            **_drops(e),
        },
        build=build_chat_shards,
        sliced=True,
        version=5,
        of_chat=True,
        columns={"input_ids": "integer", "supervised": "integer"},
        sources=lambda e: e.chat_sources,
        summary_lines=conversation_summary_lines,
        figures=chat_shard_figures,
        check=_fills_a_step,
    ),
    Stage(
        "pretrain",
        title="Pretraining",
        result="base model",
        about="train the base model over the curriculum",
        inputs=("shards",),
        settings=lambda e: {"model": e.model.model_dump(), **e.pretrain.model_dump()},
        build=build_model,
        version=5,
        reads="shards",
        model="base",
        figures=training_figures,
    ),
    Stage(
        "evaluate_base",
        about="score the base model",
        inputs=("pretrain", "shards"),
        settings=lambda e: _with_identities(e.evaluate, "tasks"),
        build=build_scores,
        sliced=True,
        version=6,
        scores="pretrain",
        sources=lambda e: e.evaluate.tasks,
    ),
    Stage(
        "finetune",
        title="Fine-tuning",
        result="chat model",
        about="fine-tune the base model on the conversations",
        inputs=("pretrain", "chat_shards"),
        settings=lambda e: _finetune(e).model_dump(),
        build=build_model,
        version=5,
        of_chat=True,
        reads="chat_shards",
        model="chat",
        figures=training_figures,
        optional_inputs=lambda e: ("shards",) if e.replay else (),
    ),
    Stage(
        "evaluate",
        about="score the chat model",
        inputs=("finetune", "chat_shards", "shards"),
        settings=lambda e: _with_identities(e.evaluate, "tasks"),
        build=build_scores,
        sliced=True,
        version=6,
        scores="finetune",
        of_chat=True,
        sources=lambda e: e.evaluate.tasks,
    ),
    Stage(
        "export",
        about="write the models as Hugging Face directories with their cards",
        inputs=("pretrain", "evaluate_base", "finetune", "evaluate"),
        settings=lambda e: {"name": e.name},
        build=build_export,
        version=3,
    ),
)
BY_NAME: dict[str, Stage] = {stage.name: stage for stage in TABLE}
READS: dict[str, str] = {stage.name: stage.reads for stage in TABLE if stage.reads is not None}
TRAININGS = frozenset(READS)
EVALUATED: dict[str, str] = {stage.name: stage.scores for stage in TABLE if stage.scores is not None}
MODELS: dict[str, str] = {stage.name: stage.model for stage in TABLE if stage.model is not None}
LANGUAGE_MODELS = tuple(stage.name for stage in reversed(TABLE) if stage.language_model)  # the newest of a chain first
EXPORTED: dict[str, str] = {  # folder of an export -> the stage whose model it contains
    MODELS[name]: name for name in BY_NAME[EXPORT].inputs if BY_NAME[name].language_model
}


def last_model(stages: Collection[str]) -> str:
    """The stage among these whose model the experiment ends with: the chat model, or else the base model."""
    return next(name for name in LANGUAGE_MODELS if name in stages)


def stages_of(experiment: ExperimentConfig) -> list[Stage]:
    """The stages of an experiment, inputs before the stages that read them."""
    return [stage for stage in TABLE if stage.is_in(experiment)]


def plans(experiment: ExperimentConfig) -> dict[str, StageSpec]:
    """The specification of every stage, inputs before the stages that read them. The experiment must be pinned."""
    specs: dict[str, StageSpec] = {}
    for stage in stages_of(experiment):
        inputs: dict[str, str] = {name: specs[name].fingerprint for name in stage.inputs_of(experiment)}
        config = {**stage.settings(experiment), "seed": experiment.seed}
        specs[stage.name] = StageSpec(stage.name, stage.version, config, inputs)
    return specs


def run_stage(
    name: str, experiment: ExperimentConfig, store: Store, runtime: Runtime, data: Path | None, group: Group = ALONE
) -> tuple[Artifact, bool]:
    """Build the artifact of one stage, or find it in the store; return it and whether it was there already.

    `data` is a local mirror to read sources from. The first rank of `group` runs this function, the others run
    `follow_stage`. Raises ConfigError for an unknown stage, or where a later stage cannot use the artifact, and
    DataError where an input is not in the store yet.
    """
    spec = _spec_of(name, experiment)
    found = store.find_whole(spec)
    if found is not None:
        BY_NAME[name].check(experiment, found.summary)
        return found, True
    from vectorclm.shards.blocks import ShardDescriber

    job = _new_job(name, experiment, store, runtime, data, group)
    if not store.is_local:  # a remote store gets large files one by one, while the stage still runs
        job = replace(job, upload=EarlyUpload(store, spec, ShardDescriber))
    produce = partial(BY_NAME[name].build, job)
    artifact, reused = build(store, spec, produce, runtime.work_dir, ShardDescriber(), job.upload)
    job.clear_kept()
    BY_NAME[name].check(experiment, artifact.summary)
    return artifact, reused


def rebuild_stage(
    name: str, experiment: ExperimentConfig, store: Store, runtime: Runtime, data: Path | None, group: Group = ALONE
) -> tuple[Artifact, bool]:
    """Build a finished stage once more and compare the bytes; build a stage without an artifact as `run_stage` does.

    The artifact in the store stays as it is. Parameters, result and errors are those of `run_stage`; also raises
    ReproducibilityError where a file differs from the artifact's, and CorruptArtifactError where bytes in the store are
    damaged: those of the artifact, or of one before it that may be the cause of a difference.
    """
    spec = _spec_of(name, experiment)
    found = store.find_whole(spec)
    if found is None:
        return run_stage(name, experiment, store, runtime, data, group)
    job = replace(_new_job(name, experiment, store, runtime, data, group), again=True)
    different = rebuild(store, found, spec, partial(BY_NAME[name].build, job), runtime.work_dir)
    job.clear_kept()
    if different:
        for behind in ancestors(name, job.specs):
            find_input(store, job.specs[behind]).verify()
    found.verify()
    if different:
        raise ReproducibilityError(
            f"{name} built again differs from {found.uri} in {', '.join(different)}; the artifact stays as it is. "
            f"It was built with {found.manifest['environment']}; on a GPU, the runtime setting deterministic must be "
            "true"
        )
    return found, True


def _spec_of(name: str, experiment: ExperimentConfig) -> StageSpec:
    """The specification of one stage. Raises ConfigError for a stage that the experiment lacks."""
    if name not in BY_NAME:
        raise ConfigError(f"no stage {name!r}: there are {', '.join(STAGES)}")
    if not BY_NAME[name].is_in(experiment):
        raise ConfigError(f"{experiment.name} has no [chat], and so no stage {name}: it ends at the base model")
    return plans(experiment)[name]


def _new_job(
    name: str, experiment: ExperimentConfig, store: Store, runtime: Runtime, data: Path | None, group: Group
) -> StageJob:
    """The job of one stage, with its inputs from the store. Raises DataError where one is missing."""
    specs = plans(experiment)
    inputs = {stage: find_input(store, specs[stage]) for stage in specs[name].inputs}
    return StageJob(name, experiment, store, runtime, data, group, specs, inputs)


def summary_lines(name: str, summary: Mapping[str, Any]) -> list[str]:
    """What a stage that draws data kept and dropped, one line for each source; an empty list for other stages."""
    return BY_NAME[name].summary_lines(summary)


def follow_stage(name: str, store: Store, runtime: Runtime, group: Group) -> None:
    """Train as a rank other than the first. Returns without work where the first rank needs no training."""
    task = group.call()
    if task is None:
        return
    values, again = json.loads(task)
    experiment = validate(ExperimentConfig, values, "the first rank's experiment")
    follow(replace(_new_job(name, experiment, store, runtime, None, group), again=again))
