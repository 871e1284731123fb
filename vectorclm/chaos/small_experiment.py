"""The experiment that is disturbed: the generated world of `tiny`, half a minute long, with all stages."""

import json
from pathlib import Path

from vectorclm.config import ExperimentConfig, load_experiment, override
from vectorclm.lineage.pinning import pin

SETTINGS = (
    "seed=5",
    "world.documents=600",
    "world.conversations=120",
    "sample.bytes=400_000",
    "shards.sequence_length=64",
    "model.num_hidden_layers=2",
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "pretrain.phases=[{ tokens = 163_840 }]",
    "pretrain.batch_size=16",
    "pretrain.validation_interval=80",
    "finetune.batch_size=2",
    "finetune.epochs=2.0",
    "evaluate.chat_prompts=3",
    "evaluate.max_new_tokens=32",
)
CHECKPOINT_STEPS = 20  # between two checkpoints of a training
RUNTIME = {"device": "cpu", "threads": 1, "checkpoint_interval": CHECKPOINT_STEPS}


def small_experiment() -> ExperimentConfig:
    """The experiment, ready to run: its sources are generated."""
    experiment, path = load_experiment("tiny")
    changed = override(experiment, SETTINGS)
    return pin(changed, path, None, resolve=False)[0]


def write_files(experiment: ExperimentConfig, folder: Path) -> None:
    """Write the experiment, and the settings of the machine without and with worker processes."""
    (folder / "experiment.json").write_text(experiment.model_dump_json(), encoding="utf-8")
    for name, more in (("runtime", {}), ("workers", {"data_workers": 2, "loader_workers": 1})):
        (folder / f"{name}.json").write_text(json.dumps({**RUNTIME, **more}), encoding="utf-8")
