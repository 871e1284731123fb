"""The stages in the order of the data: what each is made from, and how to make it.

`plans` knows every fingerprint before anything runs; `run_stage` makes one artifact, or finds it made.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vectorclm.config import ExperimentConfig
from vectorclm.corpus.decontamination import benchmark_sources, read_benchmarks
from vectorclm.corpus.sampler import summary_lines as document_summary_lines
from vectorclm.corpus.sampler import write_sample
from vectorclm.corpus.sources import draw, identity, open_source
from vectorclm.errors import ConfigError, DataError, ReproducibilityError
from vectorclm.evaluation.bits_per_byte import windows_scores
from vectorclm.evaluation.instruction_prompts import instructions
from vectorclm.evaluation.instructions import instruction_scores
from vectorclm.evaluation.item_scores import ItemScores, write_scores
from vectorclm.evaluation.tasks import score_tasks
from vectorclm.export.hugging_face import export, write_model_files
from vectorclm.finetune import finetune
from vectorclm.inference.generate import SamplingParams, answer_text, continuation, template_scores
from vectorclm.inference.load import open_model
from vectorclm.model import CausalLM
from vectorclm.pretrain import pretrain
from vectorclm.runtime.devices import Runtime, memory_explained
from vectorclm.runtime.distributed import ALONE, Group
from vectorclm.settings import digest, validate
from vectorclm.shards.blocks import ShardDescriber
from vectorclm.shards.chat_writer import read_prompts, write_chat_shards
from vectorclm.shards.chat_writer import summary_lines as conversation_summary_lines
from vectorclm.shards.reader import open_shards
from vectorclm.shards.writer import write_shards
from vectorclm.store.artifact import Artifact, StageSpec, Store, build, rebuild
from vectorclm.store.layout import STAGES
from vectorclm.store.resumable import ResumableUpload, Slices
from vectorclm.store.uploads import Sending
from vectorclm.store.work import attempt_folder
from vectorclm.tokenizer import load_tokenizer, token_lengths
from vectorclm.train import TrainConfig, TrainingRun
from vectorclm.train_tokenizer import train_tokenizer
from vectorclm.training.checkpoint import Checkpoints

READS = {"pretrain": "shards", "finetune": "chat_shards"}  # the data set of a training, which it reads as it goes
STREAMED = frozenset(READS.values())  # which are never copied as a whole
TRAININGS = frozenset(READS)  # what several processes can make together
EVALUATED = {"evaluate_base": "pretrain", "evaluate": "finetune"}  # the training whose model an evaluation scores
# Raised where new code makes something else of equal settings; all others are 1.
VERSIONS = {"sample": 2, "shards": 3, "chat_shards": 5, "pretrain": 5, "evaluate_base": 6, "finetune": 5, "evaluate": 6}


def plans(experiment: ExperimentConfig) -> dict[str, StageSpec]:
    """What every stage is asked to make, in an order in which inputs come first. The experiment must be pinned."""
    seed = experiment.seed
    made: dict[str, StageSpec] = {}

    def plan(stage: str, config: Mapping[str, Any], *inputs: str) -> None:
        prints = {name: made[name].fingerprint for name in inputs}
        made[stage] = StageSpec(stage, VERSIONS.get(stage, 1), {**config, "seed": seed}, prints)

    def sources(config: Any, field: str) -> dict[str, Any]:
        return {**config.model_dump(), field: [identity(source) for source in getattr(config, field)]}

    evaluation = sources(experiment.evaluate, "tasks")
    benchmarks = [identity(source) for source in benchmark_sources(experiment.sample, experiment.evaluate.tasks)]
    plan("sample", {**sources(experiment.sample, "sources"), "decontaminate_with": benchmarks})
    plan("tokenizer", experiment.tokenizer.model_dump(), "sample")
    plan("shards", experiment.shards.model_dump(), "sample", "tokenizer")
    plan("chat_shards", {**sources(experiment.chat, "sources"), "decontaminate_with": benchmarks}, "tokenizer")
    plan("pretrain", {"model": experiment.model.model_dump(), **experiment.pretrain.model_dump()}, "shards")
    plan("evaluate_base", evaluation, "pretrain", "shards")
    replayed = ["shards"] if experiment.finetune.replay else []
    plan("finetune", experiment.finetune.model_dump(), "pretrain", "chat_shards", *replayed)
    plan("evaluate", evaluation, "finetune", "chat_shards", "shards")
    plan("export", {"name": experiment.name}, "pretrain", "evaluate_base", "finetune", "evaluate")
    return made


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
    """Make the artifact of one stage, or find it; and whether it was there already.

    `data` is a local mirror to read sources from. With `again`, a finished stage is made once more beside its
    artifact. The first rank of `group` runs this, the others `follow_stage`. Raises DataError where an input
    is not in the store yet, and ReproducibilityError where what was made again is not the same to the byte.
    """
    stages = plans(experiment)
    if name not in stages:
        raise ConfigError(f"no stage {name!r}: there are {', '.join(STAGES)}")
    plan = stages[name]
    found = store.find_whole(plan)
    if found is not None and not again:
        return found, True
    inputs = {stage: _input(store, stages[stage]) for stage in plan.inputs}
    seed = experiment.seed
    kept: list[Checkpoints | Slices] = []  # from which a later process goes on where this one ends too early
    # What is large goes to a remote store file by file; what is only made again stays here to be compared.
    sending = Sending(store, plan, ShardDescriber) if found is None and not store.is_local else None

    def sample(out: Path) -> Mapping[str, Any]:
        asked, world = experiment.sample, experiment.world
        benchmarks = read_benchmarks(benchmark_sources(asked, experiment.evaluate.tasks), data, world)
        sent = None if sending is None else lambda path: sending.send(path, path.relative_to(out).as_posix())
        return write_sample(asked, seed, out, data=data, world=world, benchmarks=benchmarks, finished=sent)

    def tokenizer(out: Path) -> Mapping[str, Any]:
        length = experiment.model.max_position_embeddings
        return train_tokenizer(experiment.tokenizer, inputs["sample"], length, out)

    def shards(out: Path) -> Mapping[str, Any]:
        encoder = load_tokenizer(inputs["tokenizer"].local())
        if sending is None:
            slices = Slices(out.parent.parent / "slices", out)
            kept.append(slices)
        else:
            slices = ResumableUpload(out.parent, sending)
        return write_shards(experiment.shards, inputs["sample"], encoder, out, seed=seed, slices=slices)

    def chat_shards(out: Path) -> Mapping[str, Any]:
        rows = {}
        for source in experiment.chat.sources:
            opened = open_source(source, data, experiment.world, [source.column])
            shuffled = opened.shuffle(seed=seed, buffer_size=experiment.chat.shuffle_buffer)
            rows[source.label] = _column(draw(source, shuffled), source.column)
        asked, world, encoder = experiment.sample, experiment.world, load_tokenizer(inputs["tokenizer"].local())
        benchmarks = read_benchmarks(benchmark_sources(asked, experiment.evaluate.tasks), data, world)
        return write_chat_shards(experiment.chat, rows, encoder, seed, out, benchmarks)

    def trained(out: Path) -> Mapping[str, Any]:
        folders = _training_inputs(name, store, stages)
        again = found is not None
        group.call(json.dumps([experiment.model_dump(mode="json"), again]))  # now that all inputs are on this machine
        data = {stage: inputs[stage] for stage in plan.inputs if stage in STREAMED}
        keep = runtime.keep_checkpoints
        with Checkpoints(store, plan, out.parent, _identity(data), keep_all=keep, again=again) as checkpoints:
            work = TrainingRun(name, out.parent, checkpoints, runtime, group)
            model, summary = _train(experiment, folders, data, work)
        if again or not keep:
            kept.append(checkpoints)
        model.save_pretrained(out)
        length = experiment.model.max_position_embeddings
        write_model_files(folders["tokenizer"], length, chat=name == "finetune", out=out)
        for made in ("metrics.jsonl", *(["samples.jsonl"] if _training_of(experiment, name).samples else [])):
            (out.parent / made).rename(out / made)
        return summary

    def evaluated(out: Path) -> Mapping[str, Any]:
        with memory_explained(runtime.micro_batch_size):
            return _evaluate(experiment, inputs, runtime, data, out)

    def exported(out: Path) -> Mapping[str, Any]:
        lineage = {stage: _input(store, stages[stage]) for stage in STAGES if stage != "export"}
        return export(experiment.name, inputs, lineage, out)

    match name:
        case "sample":
            produce = sample
        case "tokenizer":
            produce = tokenizer
        case "shards":
            produce = shards
        case "chat_shards":
            produce = chat_shards
        case "pretrain" | "finetune":
            produce = trained
        case "evaluate_base" | "evaluate":
            produce = evaluated
        case _:
            produce = exported
    if found is not None:
        different = rebuild(store, found, plan, produce, runtime.work_dir)
        for left in kept:
            left.clear()
        if different:
            raise ReproducibilityError(
                f"{name} made again differs from {found.uri} in {', '.join(different)}; the artifact stays as it is. "
                f"It was made with {found.manifest['environment']}; on GPUs, deterministic has to be set in the runtime"
            )
        return found, True
    artifact, reused = build(store, plan, produce, runtime.work_dir, ShardDescriber(), sending)
    for left in kept:
        left.clear()
    return artifact, reused


def summary_lines(name: str, summary: Mapping[str, Any]) -> list[str]:
    """What a stage that draws data kept and dropped, a line for each source; nothing for the others."""
    match name:
        case "sample":
            return document_summary_lines(summary)
        case "chat_shards":
            return conversation_summary_lines(summary)
    return []


def follow_stage(name: str, store: Store, runtime: Runtime, group: Group) -> None:
    """Train beside the first rank, once it calls; where it finds the artifact, or cannot begin, it calls nobody."""
    task = group.call()
    if task is None:
        return
    values, again = json.loads(task)
    experiment = validate(ExperimentConfig, values, "the first rank's experiment")
    stages = plans(experiment)
    folders = _training_inputs(name, store, stages)
    data = {stage: _input(store, stages[stage]) for stage in stages[name].inputs if stage in STREAMED}
    with (
        attempt_folder(store.work_folder(stages[name], runtime.work_dir)) as folder,
        Checkpoints(store, stages[name], folder, _identity(data), again=again) as checkpoints,
    ):
        _train(experiment, folders, data, TrainingRun(name, folder, checkpoints, runtime, group))


def _training_inputs(name: str, store: Store, stages: Mapping[str, StageSpec]) -> dict[str, Path]:
    """Local folders of the tokenizer and of what else a training reads, but for the windows that it streams."""
    wanted = {"tokenizer", *stages[name].inputs} - STREAMED
    return {stage: _input(store, stages[stage]).local() for stage in sorted(wanted)}


def _train(
    experiment: ExperimentConfig, folders: Mapping[str, Path], data: Mapping[str, Artifact], work: TrainingRun
) -> tuple[CausalLM, dict[str, Any]]:
    tokenizer, seed = load_tokenizer(folders["tokenizer"]), experiment.seed
    say = answer_text if work.stage == "finetune" else continuation
    work = replace(work, respond=lambda model, prompt, longest: say(model, tokenizer, prompt, longest))
    lengths, weights = token_lengths(tokenizer), {source.label: source.weight for source in experiment.sample.sources}
    with memory_explained(work.runtime.micro_batch_size):
        if work.stage == "finetune":
            texts = (data["shards"], weights) if "shards" in data else None
            return finetune(experiment.finetune, folders["pretrain"], data["chat_shards"], lengths, seed, work, texts)
        return pretrain(experiment.model, experiment.pretrain, weights, data["shards"], lengths, seed, work)


def _training_of(experiment: ExperimentConfig, name: str) -> TrainConfig:
    return experiment.finetune if name == "finetune" else experiment.pretrain


def _identity(data: Mapping[str, Artifact]) -> str:
    """What tells one training's data from another's, for its checkpoints."""
    prints = [artifact.identity for artifact in data.values()]
    return prints[0] if len(prints) == 1 else digest(prints)


def _input(store: Store, plan: StageSpec) -> Artifact:
    found = store.find(plan.stage, plan.fingerprint)
    if found is None:
        raise DataError(
            f"{store.uri} has no {plan.stage}/{plan.fingerprint[:12]}…, which this stage reads: run {plan.stage} first"
        )
    return found


def _evaluate(
    experiment: ExperimentConfig,
    inputs: Mapping[str, Artifact],
    runtime: Runtime,
    data: Path | None,
    out: Path,
) -> dict[str, Any]:
    """Score the base or the chat model; the summary is `scores.json`."""
    chat = "finetune" in inputs
    config, found = experiment.evaluate, ItemScores()
    folder = inputs["finetune" if chat else "pretrain"].local()
    device = runtime.configure_torch()
    model, tokenizer = open_model(folder)
    model = model.to(device)
    micro_batch = runtime.micro_batch_size or 16
    apart = (experiment.finetune if chat else experiment.pretrain).document_mask  # as the model was trained
    with open_shards(inputs["shards"], "validation", cache=runtime.block_cache) as texts:
        by_source = windows_scores(model, texts, token_lengths(tokenizer), 0, micro_batch, device, apart, found)
    scores: dict[str, Any] = {
        "bits_per_byte": {label: score["bits_per_byte"] for label, score in by_source.items()},
        "loss": {label: score["loss"] for label, score in by_source.items()},
        "text": {label: found.text_scores(label, "windows") for label in by_source},
        "tasks": {},
    }
    where = (experiment.seed, runtime, data, experiment.world)
    for kind, label, scored in score_tasks(config.tasks, folder, model, tokenizer, *where, found):
        scores[kind][label] = scored
    how = config.max_new_tokens, SamplingParams(repetition_penalty=config.repetition_penalty)
    if chat:
        prompts = read_prompts(inputs["chat_shards"], config.chat_prompts, experiment.seed)
        scores["chat"] = template_scores(model, tokenizer, prompts, *how)
    if config.instructions:
        asked = instructions(config.instructions)
        scores["instructions"] = instruction_scores(model, tokenizer, asked, *how, chat=chat, out=out, found=found)
    respond = answer_text if chat else continuation
    scores["samples"] = [
        {"prompt": prompt, "answer": respond(model, tokenizer, prompt, *how)} for prompt in config.prompts
    ]
    write_scores(out, scores, found)
    return scores


def _column(rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[Any]:
    for row in rows:
        yield row[column]
