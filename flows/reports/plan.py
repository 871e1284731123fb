"""What a run of an experiment would do: the stages that it reuses or builds, and what they cost, as Markdown."""

from pathlib import Path

from flows.handle import duration
from flows.reports.cost_estimate import budget, known_windows
from vectorclm.config import ExperimentConfig
from vectorclm.lineage.pinning import UNRESOLVED, pin
from vectorclm.stages import BY_NAME, plans
from vectorclm.store.artifact import Store


def plan_of(experiment: ExperimentConfig, lock: Path, data: Path | None, store: Store) -> str:
    """The plan of an experiment as Markdown. Reads the store and no network; `lock` is its file of pinned sources.

    Raises ConfigError where a source runs out in a phase that forbids it.
    """
    pinned, notes = pin(experiment, lock, data, resolve=False)
    specs = plans(pinned)
    costs = budget(pinned, specs, known_windows(store, specs["shards"]))
    lines = ["| stage | state | what it does |", "|---|---|---|"]
    reused = 0
    for name, spec in specs.items():
        known = costs["stages"][name] != UNRESOLVED
        there = known and store.find_whole(spec) is not None
        reused += there
        state = "reused" if there else "built" if known else "built, or reused where its sources are unchanged"
        lines.append(f"| {name} | **{state}** | {BY_NAME[name].about} |")
    tuning = costs["tuning"]
    flops = costs["flops"] + (tuning["flops"] if tuning else 0)
    memory = costs["memory_bytes"]["model_and_optimizer"]
    lines += [
        "",
        f"{reused} of {len(specs)} stages are reused.",
        "",
        "| cost | amount |",
        "|---|---|",
        f"| sample | {costs['sample_bytes']:,} bytes of text |",
        f"| model | {costs['parameters']:,} parameters |",
        f"| pretraining | {costs['pretrain_tokens']:,} tokens in {costs['steps']:,} steps |",
        f"| training | {flops:.3g} FLOPs |",
        f"| memory | {memory / 1e9:.2f} GB for model and optimizer |",
    ]
    if (finetune := pinned.finetune) is not None:
        lines.append(f"| fine-tuning | up to {costs['conversations']:,} conversations, {finetune.epochs:g} times |")
    hours = {device: value + (tuning["hours"][device] if tuning else 0) for device, value in costs["hours"].items()}
    lines += [f"| training on {device} | about {duration(3600 * value)} |" for device, value in hours.items()]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])
