"""Pretraining: a new model trained over phases with token budgets and data mixes."""

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
    """A phase of pretraining: a token budget and a data mix."""

    tokens: int = Field(gt=0, description="Token budget")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="Share of each source; the sample's weights if left out"
    )
    when_exhausted: WhenExhausted = Field(
        "repeat",
        description="If a source runs out: an error before training, another epoch, or its share to the others",
    )

    @model_validator(mode="after")
    def _weights_count(self) -> Self:
        total = sum(self.weights.values())
        if self.weights and not total:
            raise ValueError("every weight of a phase is 0: at least one must be greater")
        if too_small := [label for label, weight in self.weights.items() if 0 < weight < total / MIX_BLOCK]:
            small = ", ".join(too_small)
            raise ValueError(f"{small} has less than 1/{MIX_BLOCK} of the phase: raise its weight, or set it to 0")
        return self


class PretrainConfig(TrainConfig):
    """Settings of pretraining: the phases in their order, and the training loop's settings."""

    phases: list[Phase] = Field(min_length=1)
    zero_output_projections: bool = Field(
        False,
        exclude_if=lambda value: not value,  # older experiments keep their fingerprints
        description="Start the projections into the residual stream at zero instead of small random values",
    )

    @property
    def tokens(self) -> int:
        """Number of tokens over all phases."""
        return sum(phase.tokens for phase in self.phases)

    def plan(
        self, sample_weights: Mapping[str, float], sizes: Mapping[str, int], length: int, itemsize: int, seed: int
    ) -> TrainingOrder:
        """The training order over sources with `sizes` windows each.

        A window has `length` tokens of `itemsize` bytes. A phase without weights uses `sample_weights`. Raises
        ConfigError where a source runs out in a phase that forbids it.
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
    run: TrainingRun,
) -> tuple[CausalLM, dict[str, Any]]:
    """Pretrain a new model over all phases; return the model and the training's summary.

    A phase without weights uses `sample_weights`. Raises ConfigError where all phases are shorter than one step, or a
    source runs out in a phase that forbids it.
    """
    cache = run.runtime.block_cache
    with (
        open_shards(shards, "train", cache=cache) as training,
        open_shards(shards, "validation", cache=cache) as validation,
    ):
        sizes = {label: len(reader) for label, reader in training.items()}
        any_source = next(iter(training.values()))
        order = config.plan(sample_weights, sizes, any_source.sequence_length, any_source.token_bytes, run.seed)
        dataset = own_share(training, order, config, run.group)
        if dataset.steps == 0:
            step = config.batch_size * any_source.sequence_length
            raise ConfigError(f"pretrain.phases hold {config.tokens} tokens, fewer than one step ({step}): raise them")
        epochs = order.epochs(dataset.steps * config.batch_size)
        logger.info("pretrain reads %s", format_epochs(epochs))
        torch.manual_seed(run.seed)
        model = CausalLM(model_config)
        if config.zero_output_projections:
            model.zero_output_projections()
        summary = train(model, config, dataset, validation, token_lengths, run)
    rounded = {label: round(value, 3) for label, value in epochs.items()}
    read = {"epochs": rounded, "read": format_epochs(epochs)}
    return model, {**summary, **read, "parameters": model_config.parameters}
