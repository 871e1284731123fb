"""The run form in the Prefect UI: the settings of an experiment that a person may change before a run.

Prefect draws the form from these classes. An empty field changes nothing.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vectorclm.config import ExperimentConfig, changed, load_experiment
from vectorclm.settings import Settings
from vectorclm.store.layout import StageName

Name = Literal["tiny", "small", "base"]
SuiteName = Literal["tiny", "small", "base", "standard", "generation"]
Again = Literal["nothing", StageName]


class SampleChanges(Settings):
    """The sample of documents."""

    bytes: int | None = Field(
        None, ge=10_000, description="Size of the sample over all sources, in bytes, at least 10,000"
    )
    validation_share: float | None = Field(None, gt=0, lt=0.5, description="Share of documents held out, 0 to 0.5")


class TokenizerChanges(Settings):
    """The byte-level BPE tokenizer."""

    vocab_size: int | None = Field(
        None, ge=300, le=65_536, description="Size of the vocabulary of tokenizer and model, in tokens, 300 to 65,536"
    )
    bytes: int | None = Field(
        None, ge=10_000, description="Text that merges are learned from, in bytes, at least 10,000"
    )


class ModelChanges(Settings):
    """The decoder's shape."""

    num_hidden_layers: int | None = Field(None, ge=1, le=128, description="Layers, 1 to 128")
    hidden_size: int | None = Field(None, ge=16, le=8192, description="Width of the residual stream, 16 to 8,192")
    intermediate_size: int | None = Field(None, ge=16, le=32_768, description="Width inside the MLP, 16 to 32,768")


class TrainingChanges(Settings):
    """The optimizer and the batches."""

    learning_rate: float | None = Field(None, gt=0, le=1, description="Muon's peak learning rate, 0 to 1")
    adamw_learning_rate: float | None = Field(None, gt=0, le=1, description="AdamW's peak learning rate, 0 to 1")
    batch_size: int | None = Field(None, ge=1, le=65_536, description="Windows in one optimizer step, 1 to 65,536")


class PretrainChanges(TrainingChanges):
    """Pretraining."""

    tokens: int | None = Field(
        None, ge=1_000, description="Token budget of all phases together; each keeps its share, at least 1,000"
    )


class FinetuneChanges(TrainingChanges):
    """Instruction fine-tuning."""

    epochs: float | None = Field(None, gt=0, le=100, description="Passes over the conversations, up to 100")


class EvaluateChanges(Settings):
    """The evaluation."""

    chat_prompts: int | None = Field(
        None, ge=1, description="Number of held-out conversations whose answers are checked, at least 1"
    )
    max_new_tokens: int | None = Field(
        None, ge=1, le=4096, description="Maximum length of an answer, in tokens, 1 to 4,096"
    )


class Changes(Settings):
    """Changes to the experiment, in the order of the pipeline; an empty field changes nothing."""

    seed: int | None = Field(None, ge=0, lt=2**32, description="Seed of all random choices, 0 to 4,294,967,295")
    sample: SampleChanges = SampleChanges()
    tokenizer: TokenizerChanges = TokenizerChanges()
    model: ModelChanges = ModelChanges()
    pretrain: PretrainChanges = PretrainChanges()
    finetune: FinetuneChanges = FinetuneChanges()
    evaluate: EvaluateChanges = EvaluateChanges()
    settings: dict[str, Any] = Field(
        default={},
        title="Any other setting",
        description='By its dotted name in the experiment\'s file, such as {"pretrain.optimizer.momentum": 0.9}',
    )


def chosen(name: str, changes: Changes) -> tuple[ExperimentConfig, Path]:
    """The experiment that a run form describes, and its file. Raises ConfigError naming the setting that is wrong."""
    experiment, path = load_experiment(name)
    values = changes.model_dump(exclude_none=True)
    wanted: dict[str, Any] = {}
    for section, fields in values.items():
        if section == "seed":
            wanted["seed"] = fields
        elif section != "settings":
            wanted |= {f"{section}.{_SETTING.get(key, key)}": value for key, value in fields.items()}
    if (size := wanted.get("tokenizer.vocab_size")) is not None:
        wanted["model.vocab_size"] = size
    if (tokens := wanted.pop("pretrain.tokens", None)) is not None:
        whole = experiment.pretrain.tokens
        for number, phase in enumerate(experiment.pretrain.phases):
            wanted[f"pretrain.phases.{number}.tokens"] = max(1, round(phase.tokens * tokens / whole))
    return changed(experiment, wanted | changes.settings), path


_SETTING = {
    "learning_rate": "optimizer.learning_rate",
    "adamw_learning_rate": "optimizer.adamw_learning_rate",
}
