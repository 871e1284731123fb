"""Pretraining: the curriculum, and a new model trained over it."""

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator

from vectorclm.errors import ConfigError
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig
from vectorclm.settings import Settings
from vectorclm.shards.order import (
    MIX_BLOCK,
    MixturePhase,
    TrainingOrder,
    WhenExhausted,
    format_epochs,
    windows_per_block,
)
from vectorclm.shards.reader import open_shards
from vectorclm.store.artifact import Artifact
from vectorclm.train import TrainConfig, TrainingRun, own_share, train

logger = logging.getLogger(__name__)


class Phase(Settings):
    """A stretch of the curriculum."""

    tokens: int = Field(gt=0, description="Token budget")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="Share of each source; left out, the sample's weights"
    )
    when_exhausted: WhenExhausted = Field(
        "repeat",
        description="Where a source runs out: stop before training, another epoch, or its share to the others",
    )

    @model_validator(mode="after")
    def _weights_count(self) -> Self:
        total = sum(self.weights.values())
        if self.weights and not total:
            raise ValueError("every weight of a phase is 0: one must be more")
        if lost := [label for label, weight in self.weights.items() if 0 < weight < total / MIX_BLOCK]:
            raise ValueError(f"{', '.join(lost)} has less than 1/{MIX_BLOCK} of the phase: give it more, or 0")
        return self


class PretrainConfig(TrainConfig):
    """The curriculum: phases in order, each with its budget and mix."""

    phases: list[Phase] = Field(min_length=1)
    zero_output_projections: bool = Field(
        False,
        exclude_if=lambda value: not value,  # so that older experiments keep their fingerprints
        description="What writes to the residual stream starts at zero, not small",
    )

    @property
    def tokens(self) -> int:
        """Tokens over all phases."""
        return sum(phase.tokens for phase in self.phases)

    def plan(
        self, sample_weights: Mapping[str, float], sizes: Mapping[str, int], length: int, itemsize: int, seed: int
    ) -> TrainingOrder:
        """The training order over sources of these `sizes`, in windows of `length` tokens, `itemsize` bytes each.

        `sample_weights` is the mix of a phase that names none. Raises ConfigError where a source runs out in a phase
        that forbids it.
        """
        phases = [
            MixturePhase(phase.tokens // length, phase.weights or sample_weights, phase.when_exhausted)
            for phase in self.phases
        ]
        return TrainingOrder(phases, sizes, seed, windows_per_block=windows_per_block(length, itemsize))


def pretrain(
    model_config: ModelConfig,
    config: PretrainConfig,
    sample_weights: Mapping[str, float],
    shards: Artifact,
    token_lengths: Sequence[int],
    seed: int,
    work: TrainingRun,
) -> tuple[CausalLM, dict[str, Any]]:
    """Train a new model over the curriculum. `sample_weights` is the mix of a phase that names none.

    Raises ConfigError where the plan is shorter than one step, or a source runs out in a phase that forbids it.
    """
    cache = work.runtime.block_cache
    with (
        open_shards(shards, "train", cache=cache) as training,
        open_shards(shards, "validation", cache=cache) as validation,
    ):
        sizes = {label: len(reader) for label, reader in training.items()}
        any_source = next(iter(training.values()))
        plan = config.plan(sample_weights, sizes, any_source.sequence_length, any_source.token_bytes, seed)
        dataset = own_share(training, plan, config, work.group)
        if dataset.steps == 0:
            step = config.batch_size * any_source.sequence_length
            raise ConfigError(f"pretrain.phases hold {config.tokens} tokens, one step takes {step}: raise them")
        epochs = plan.epochs(dataset.steps * config.batch_size)
        logger.info("pretrain reads %s", format_epochs(epochs))
        torch.manual_seed(seed)
        model = CausalLM(model_config)
        if config.zero_output_projections:
            model.zero_output_projections()
        summary = train(model, config, dataset, validation, token_lengths, seed, work)
    rounded = {label: round(value, 3) for label, value in epochs.items()}
    read = {"epochs": rounded, "read": format_epochs(epochs)}
    return model, {**summary, **read, "parameters": model_config.parameters}
