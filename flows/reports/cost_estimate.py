"""Estimate the costs of an experiment from its settings: tokens, FLOPs, memory, hours (`--dry-run`).

If its shards are in a local store, also how often each source is read. No network is used.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from flows.handle import duration
from vectorclm.config import ExperimentConfig
from vectorclm.lineage.pinning import UNRESOLVED
from vectorclm.memory_plan import TrainingShape, plan_memory
from vectorclm.planner.hardware import DEVICES
from vectorclm.planner.plan import hours_alone, pretraining, workload
from vectorclm.runtime.devices import Runtime
from vectorclm.shards.order import format_epochs
from vectorclm.shards.writer import token_dtype
from vectorclm.stages import BY_NAME
from vectorclm.store.artifact import StageSpec, Store
from vectorclm.train_config import TrainConfig, TrainingWork

if TYPE_CHECKING:  # with torch
    from vectorclm.draft.estimate import Estimate

HERE = ("2cpucores", "16cpucores", "rtx4090", "a100", "h100", "h200")  # of the planner's devices


def known_windows(store: Store, shards: StageSpec) -> dict[str, int] | None:
    """Training windows of each source; None unless the shards are built and in a local store."""
    if not store.is_local or (found := store.find_whole(shards)) is None:
        return None
    return {label: splits["train"]["windows"] for label, splits in found.summary.items()}


def budget(
    experiment: ExperimentConfig, plans: Mapping[str, StageSpec], windows: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The budget of an experiment: tokens, parameters, FLOPs, bytes, hours and fingerprints.

    A fingerprint is `unresolved` while a source has no commit. With the `windows` of each source, the budget says how
    often it is read; with a token budget for fine-tuning (`chat.tokens`), what fine-tuning costs. Hours are the
    planner's, as those of `vectorclm estimate`. Memory is that of training in fp32 by the memory plan. Raises
    ConfigError where a source runs out in a phase that forbids it.
    """
    model, shards = experiment.model, experiment.shards
    tokens = experiment.pretrain.tokens
    flops = model.flops_per_token(shards.sequence_length) * tokens
    shape = TrainingShape(
        model, shards.sequence_length, "cpu", experiment.pretrain.document_mask, experiment.pretrain.optimizer.matrices
    )
    one, two = (plan_memory(shape, windows) for windows in (1, 2))
    return {
        "stages": {name: _fingerprint(name, experiment, plans) for name in plans},
        "parameters": model.parameters,
        "pretrain_tokens": tokens,
        "phases": [phase.model_dump() for phase in experiment.pretrain.phases],
        "tokens_per_step": experiment.pretrain.batch_size * shards.sequence_length,
        "steps": tokens // (experiment.pretrain.batch_size * shards.sequence_length),
        "epochs": None if windows is None else _epochs(experiment, windows),
        "sample_bytes": experiment.sample.bytes,
        "conversations": sum(source.conversations for source in experiment.chat_sources),
        "flops": flops,
        "memory_bytes": {
            "model_and_optimizer": one.weights + one.gradients + one.optimizer,
            "one_window": two.bytes - one.bytes,
        },
        "hours": _hours_of(experiment, experiment.pretrain, shards.sequence_length, pretraining(experiment)),
        "tuning": _tuning(experiment),
    }


def _tuning(experiment: ExperimentConfig) -> dict[str, Any] | None:
    """Tokens of fine-tuning including replayed text, FLOPs and hours; None without a token budget."""
    chat, finetune = experiment.chat, experiment.finetune
    if chat is None or finetune is None or not chat.tokens:
        return None
    tokens = round(finetune.epochs * chat.tokens / (1 - finetune.replay))
    length = chat.sequence_length
    work = finetune.work(tokens / length, length, chat.tokens * chat.validation_share, len(chat.sources))
    return _tuning_costs(experiment, tokens, work)


def _tuning_costs(experiment: ExperimentConfig, tokens: int, work: TrainingWork) -> dict[str, Any]:
    assert experiment.chat is not None and experiment.finetune is not None
    length = experiment.chat.sequence_length
    flops = experiment.model.flops_per_token(length) * tokens
    return {"tokens": tokens, "flops": flops, "hours": _hours_of(experiment, experiment.finetune, length, work)}


def _hours_of(
    experiment: ExperimentConfig, config: TrainConfig, length: int, training: TrainingWork
) -> dict[str, float]:
    """Hours of a training on one device of each kind."""
    works = {kind: workload(experiment.model, config, length, training, kind) for kind in ("cpu", "cuda")}
    return {DEVICES[key].name: hours_alone(DEVICES[key], works[DEVICES[key].kind]) for key in HERE}


def _epochs(experiment: ExperimentConfig, windows: Mapping[str, int]) -> dict[str, float]:
    weights = {source.label: source.weight for source in experiment.sample.sources}
    length, itemsize = experiment.shards.sequence_length, token_dtype(experiment.tokenizer.vocab_size).itemsize
    order = experiment.pretrain.order(weights, windows, length, itemsize, experiment.seed)
    return order.epochs(order.windows // experiment.pretrain.batch_size * experiment.pretrain.batch_size)


def _fingerprint(name: str, experiment: ExperimentConfig, plans: Mapping[str, StageSpec]) -> str:
    """The stage's fingerprint; `unresolved` if it or a stage before it reads a source without a commit."""
    own = any(source.revision == UNRESOLVED for source in BY_NAME[name].sources(experiment))
    before = any(_fingerprint(stage, experiment, plans) == UNRESOLVED for stage in plans[name].inputs)
    return UNRESOLVED if own or before else plans[name].fingerprint


def reused(store: Store, specs: Mapping[str, StageSpec], known: Mapping[str, str]) -> list[str]:
    """The stages whose artifacts a local store has; a stage with an unresolved fingerprint is none of them."""
    if not store.is_local:
        return []
    return [name for name, spec in specs.items() if known[name] != UNRESOLVED and store.find_whole(spec) is not None]


def machine_costs(found: "Estimate", runtime: Runtime, there: Sequence[str]) -> dict[str, Any]:
    """An estimate for this machine as values of JSON; the stages that are `there` take no time."""
    return {
        "device": runtime.device_type(),
        "busy": found.speed.busy,
        "text_bytes": dict(found.available),
        "drawn_bytes": found.drawn,
        "epochs": found.epochs,
        "tokens_per_second": found.speed.training,
        "work": {stage: dict(amounts) for stage, amounts in found.work.items()},
        "seconds": {stage: 0.0 if stage in there else seconds for stage, seconds in found.seconds.items()},
        "reused": list(there),
        "around_seconds": found.around,
    }


def show(experiment: ExperimentConfig, costs: Mapping[str, Any], console: Console) -> None:
    """Print the budget for a person."""
    stages = Table("stage", "fingerprint", box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for name, fingerprint in costs["stages"].items():
        known = fingerprint != UNRESOLVED
        stages.add_row(name, fingerprint if known else f"[yellow]{fingerprint}[/]")
    facts = Table.grid(padding=(0, 2))
    for number, phase in enumerate(costs["phases"], 1):
        mix = phase["weights"] or {source.label: source.weight for source in experiment.sample.sources}
        total = sum(mix.values())
        parts = ", ".join(f"{label} {100 * weight / total:.3g}%" for label, weight in mix.items())
        facts.add_row(f"phase {number}", f"{phase['tokens']:,} tokens: {parts}")
    facts.add_row(
        "pretraining",
        f"{costs['pretrain_tokens']:,} tokens in {costs['steps']:,} steps of {costs['tokens_per_step']:,}",
    )
    if costs["epochs"] is not None:
        facts.add_row("", f"of the shards in the store: {format_epochs(costs['epochs'])}")
    facts.add_row("sample", f"up to {costs['sample_bytes']:,} bytes of text")
    here = costs.get("here")
    if here is not None:
        known = {label: size for label, size in here["text_bytes"].items() if size is not None}
        if known:
            sizes = ", ".join(f"{label} {size / 1e6:,.1f} MB" for label, size in known.items())
            facts.add_row("", f"there are {sizes}; {here['drawn_bytes'] / 1e6:,.1f} MB are drawn")
        facts.add_row("", f"pretraining reads it {_times(here['epochs'])}")
    if experiment.finetune is not None:
        often = f"read {experiment.finetune.epochs:g} times"
        facts.add_row("fine-tuning", f"up to {costs['conversations']:,} conversations, {often}")
    tuning = costs["tuning"] or _tuning_here(experiment, here)
    if tuning is not None:
        again = ", replayed text included" if experiment.replay else ""
        facts.add_row("", f"about {tuning['tokens']:,} tokens{again}")
    facts.add_row("parameters", f"{costs['parameters']:,}")
    facts.add_row("training FLOPs", f"{costs['flops']:.3g}" + (f" and {tuning['flops']:.3g}" if tuning else ""))
    memory = costs["memory_bytes"]
    facts.add_row("memory", f"{memory['model_and_optimizer'] / 1e9:.2f} GB for model and optimizer")
    facts.add_row("", f"and about {memory['one_window'] / 1e9:.2f} GB for each window of a micro-batch")
    trainings = {"pretraining": costs["hours"], **({"fine-tuning": tuning["hours"]} if tuning else {})}
    hours = Table("the trainings on", "TFLOP/s", *trainings, box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for device, needed in costs["hours"].items():
        speed = costs["flops"] / needed / 3.6e15
        hours.add_row(device, f"{speed:.3g}", *(_time(3600 * training[device]) for training in trainings.values()))
    console.print(
        Panel(Group(stages, facts, hours, *_here(here)), title=f"[bold]{experiment.name}[/], not run", box=box.ROUNDED)
    )


def _tuning_here(experiment: ExperimentConfig, here: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What fine-tuning costs by the conversations that were looked at."""
    if here is None or experiment.chat is None or "finetune" not in here["work"]:
        return None
    work = TrainingWork(**here["work"]["finetune"])
    return _tuning_costs(experiment, work.tokens, work)


def _here(here: Mapping[str, Any] | None) -> list[RenderableType]:
    """The time of each stage on this machine."""
    if here is None:
        return []
    title = f"on this machine ({here['device']}, {here['tokens_per_second']:,.0f} tokens/s)"
    table = Table(title, "time", box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for stage, needed in here["seconds"].items():
        table.add_row(stage, "reused" if stage in here["reused"] else _time(needed))
    table.add_row("Prefect and MLflow", _time(here["around_seconds"]))
    table.add_row("in all", f"[bold]{_time(sum(here['seconds'].values()) + here['around_seconds'])}[/]")
    busy = "Other programs use this machine now: the times are those without them.\n" if here["busy"] else ""
    return [table, f"{busy}The times come from a few seconds of measurement: half as much more or less is usual."]


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else "under 1 s"


def _times(epochs: float) -> str:
    """How often a text is read: a share of it, or a number of times."""
    return f"about {epochs:.1f} times" if epochs >= 1 else f"to about {100 * epochs:.0f} %"
