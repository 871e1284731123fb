"""An experiment: one TOML file with every decision that defines the result, and nothing about where it runs."""

import json
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from vectorclm.corpus import SampleConfig
from vectorclm.errors import ConfigError
from vectorclm.evaluate import EvaluateConfig
from vectorclm.finetune import ChatConfig, FinetuneConfig
from vectorclm.model import ModelConfig
from vectorclm.settings import Settings, validate
from vectorclm.shards import ShardsConfig
from vectorclm.train import PretrainConfig
from vectorclm.train_tokenizer import TokenizerConfig
from vectorclm.world import WorldConfig

EXPERIMENTS = Path(__file__).parent.parent / "flows" / "experiments"


class ExperimentConfig(Settings):
    """The stages' settings, in the order of the data."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    seed: int = Field(ge=0, lt=2**32, description="The one seed that every random choice derives from")
    world: WorldConfig | None = None
    sample: SampleConfig
    tokenizer: TokenizerConfig
    shards: ShardsConfig
    model: ModelConfig
    pretrain: PretrainConfig
    chat: ChatConfig
    finetune: FinetuneConfig
    evaluate: EvaluateConfig

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        if self.model.vocab_size != self.tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size ({self.model.vocab_size}) and tokenizer.vocab_size "
                f"({self.tokenizer.vocab_size}) must be equal"
            )
        for where, length in (("shards", self.shards.sequence_length), ("chat", self.chat.sequence_length)):
            if length > self.model.max_position_embeddings:
                raise ValueError(
                    f"{where}.sequence_length ({length}) is longer than the model's "
                    f"max_position_embeddings ({self.model.max_position_embeddings})"
                )
        labels = {source.label for source in self.sample.sources}
        for number, phase in enumerate(self.pretrain.phases, 1):
            if unknown := sorted(set(phase.weights) - labels):
                raise ValueError(
                    f"phase {number} weighs {', '.join(unknown)}, but the sources are {', '.join(sorted(labels))}"
                )
        everything = [*self.sample.sources, *self.chat.sources, *self.evaluate.tasks]
        if self.world is None and (lost := [source.label for source in everything if source.path == "world"]):
            raise ValueError(f"{', '.join(lost)} read the generated world, but there is no [world]")
        return self


def load_experiment(name_or_path: str) -> tuple[ExperimentConfig, Path]:
    """The experiment of that name (`tiny`, `small`, `base`) or file (TOML or JSON), and its path.

    Raises ConfigError that names the file, every bad key and what would be right.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = EXPERIMENTS / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in EXPERIMENTS.glob("*.toml")))
        raise ConfigError(f"no experiment {name_or_path!r}: use {known}, or the path of a TOML file")
    return validate(ExperimentConfig, read_config(path), str(path)), path


def read_config(path: Path) -> dict[str, Any]:
    """The values in a TOML or JSON file. Raises ConfigError with the place of a syntax error."""
    try:
        text = path.read_text(encoding="utf-8")
        values: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return values
