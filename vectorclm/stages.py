"""The stages in the order of the data: what each is made from, and how to make it.

`plans` knows every fingerprint before anything runs; `run_stage` makes one artifact, or finds it made.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vectorclm.artifact import Artifact, Plan, Store, build
from vectorclm.checkpoint import Checkpoints
from vectorclm.config import ExperimentConfig
from vectorclm.corpus import draw, identity, open_source, write_sample
from vectorclm.errors import ConfigError, DataError
from vectorclm.evaluate import FORMAT_COLUMNS, read_items, task_scores, windows_scores, write_scores
from vectorclm.export import export, write_model_files
from vectorclm.finetune import finetune, read_prompts, write_chat_shards
from vectorclm.generate import answer_text, continuation, template_scores
from vectorclm.model import CausalLM
from vectorclm.runtime import Runtime
from vectorclm.shards import read_windows, write_shards
from vectorclm.train import Work, pretrain
from vectorclm.train_tokenizer import load_tokenizer, token_lengths, train_tokenizer

STAGES = (
    "sample",
    "tokenizer",
    "shards",
    "chat_shards",
    "pretrain",
    "evaluate_base",
    "finetune",
    "evaluate",
    "export",
)


def plans(experiment: ExperimentConfig) -> dict[str, Plan]:
    """What every stage is asked to make, in an order in which inputs come first. The experiment must be pinned."""
    seed = experiment.seed
    made: dict[str, Plan] = {}

    def plan(stage: str, config: Mapping[str, Any], *inputs: str) -> None:
        made[stage] = Plan(stage, 1, {**config, "seed": seed}, {name: made[name].fingerprint for name in inputs})

    def sources(config: Any, field: str) -> dict[str, Any]:
        return {**config.model_dump(), field: [identity(source) for source in getattr(config, field)]}

    evaluation = sources(experiment.evaluate, "tasks")
    plan("sample", sources(experiment.sample, "sources"))
    plan("tokenizer", experiment.tokenizer.model_dump(), "sample")
    plan("shards", experiment.shards.model_dump(), "sample", "tokenizer")
    plan("chat_shards", sources(experiment.chat, "sources"), "tokenizer")
    plan("pretrain", {"model": experiment.model.model_dump(), **experiment.pretrain.model_dump()}, "shards")
    plan("evaluate_base", evaluation, "pretrain", "shards")
    plan("finetune", experiment.finetune.model_dump(), "pretrain", "chat_shards")
    plan("evaluate", evaluation, "finetune", "chat_shards", "shards")
    plan("export", {"name": experiment.name}, "pretrain", "evaluate_base", "finetune", "evaluate")
    return made


def run_stage(
    name: str, experiment: ExperimentConfig, store: Store, runtime: Runtime, data: Path | None
) -> tuple[Artifact, bool]:
    """Make the artifact of one stage, or find it; and whether it was there already.

    `data` is a local mirror to read sources from. Raises DataError where an input is not in the store yet.
    """
    stages = plans(experiment)
    if name not in stages:
        raise ConfigError(f"no stage {name!r}: there are {', '.join(STAGES)}")
    plan = stages[name]
    if (found := store.find(plan.stage, plan.fingerprint)) is not None:
        return found, True
    inputs = {stage: _input(store, stages[stage]) for stage in plan.inputs}
    seed = experiment.seed
    work_folder = store.work_folder(plan, runtime.work_dir)

    def sample(out: Path) -> Mapping[str, Any]:
        return write_sample(experiment.sample, seed, out, data=data, world=experiment.world)

    def tokenizer(out: Path) -> Mapping[str, Any]:
        length = experiment.model.max_position_embeddings
        return train_tokenizer(experiment.tokenizer, inputs["sample"].local(), length, out)

    def shards(out: Path) -> Mapping[str, Any]:
        encoder = load_tokenizer(inputs["tokenizer"].local())
        return write_shards(experiment.shards, inputs["sample"].local(), encoder, out)

    def chat_shards(out: Path) -> Mapping[str, Any]:
        rows = {}
        for source in experiment.chat.sources:
            opened = open_source(source, data, experiment.world, [source.column])
            shuffled = opened.shuffle(seed=seed, buffer_size=experiment.chat.shuffle_buffer)
            rows[source.label] = _column(draw(source, shuffled), source.column)
        return write_chat_shards(experiment.chat, rows, load_tokenizer(inputs["tokenizer"].local()), seed, out)

    def trained(train: Callable[[list[int], Work], tuple[CausalLM, dict[str, Any]]], out: Path) -> Mapping[str, Any]:
        encoder = _input(store, stages["tokenizer"]).local()
        with Checkpoints(store, plan, work_folder) as checkpoints:
            work = Work(plan.stage, work_folder, checkpoints, runtime)
            model, summary = train(token_lengths(load_tokenizer(encoder)), work)
        model.save_pretrained(out)
        length = experiment.model.max_position_embeddings
        write_model_files(encoder, length, chat=name == "finetune", out=out)
        (work_folder / "metrics.jsonl").rename(out / "metrics.jsonl")
        return summary

    def pretrained(out: Path) -> Mapping[str, Any]:
        weights = {source.label: source.weight for source in experiment.sample.sources}
        folder = inputs["shards"].local()
        return trained(
            lambda lengths, work: pretrain(experiment.model, experiment.pretrain, weights, folder, lengths, seed, work),
            out,
        )

    def finetuned(out: Path) -> Mapping[str, Any]:
        base, chat = inputs["pretrain"].local(), inputs["chat_shards"].local()
        return trained(lambda lengths, work: finetune(experiment.finetune, base, chat, lengths, seed, work), out)

    def evaluated(out: Path) -> Mapping[str, Any]:
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
        case "pretrain":
            produce = pretrained
        case "finetune":
            produce = finetuned
        case "evaluate_base" | "evaluate":
            produce = evaluated
        case _:
            produce = exported
    artifact, reused = build(store, plan, produce, runtime.work_dir)
    store.remove(f"checkpoints/{plan.fingerprint}")
    return artifact, reused


def _input(store: Store, plan: Plan) -> Artifact:
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
    config = experiment.evaluate
    folder = inputs["finetune" if chat else "pretrain"].local()
    device = runtime.configure_torch()
    model, tokenizer = CausalLM.from_pretrained(folder).to(device), load_tokenizer(folder)
    held_out = inputs["shards"].local()
    texts = {path.name: read_windows(path, "validation") for path in sorted(held_out.iterdir()) if path.is_dir()}
    micro_batch = runtime.micro_batch_size or 16
    by_source = windows_scores(model, texts, token_lengths(tokenizer), 0, micro_batch, device)
    scores: dict[str, Any] = {
        "bits_per_byte": {label: score["bits_per_byte"] for label, score in by_source.items()},
        "loss": {label: score["loss"] for label, score in by_source.items()},
        "tasks": {},
    }
    for task in config.tasks:
        rows = draw(task, open_source(task, data, experiment.world, FORMAT_COLUMNS[task.format]))
        items = read_items(task, rows, experiment.seed)
        scores["tasks"][task.label] = task_scores(model, tokenizer, task.label, items, micro_batch, device)
    if chat:
        prompts = read_prompts(inputs["chat_shards"].local())[: config.chat_prompts]
        scores["chat"] = template_scores(model, tokenizer, prompts, config.max_new_tokens)
    respond = answer_text if chat else continuation
    scores["samples"] = [
        {"prompt": prompt, "answer": respond(model, tokenizer, prompt, config.max_new_tokens)}
        for prompt in config.prompts
    ]
    write_scores(out, scores)
    return scores


def _column(rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[Any]:
    for row in rows:
        yield row[column]
