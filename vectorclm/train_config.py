"""Settings of the trainings: the training loop, pretraining with its phases, and instruction fine-tuning."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from vectorclm.errors import ConfigError
from vectorclm.settings import LARGEST_WEIGHT, Settings
from vectorclm.shards.config import MIX_BLOCK, WhenExhausted
from vectorclm.training.optimizers import OptimizerConfig
from vectorclm.training.schedule import ScheduleConfig

if TYPE_CHECKING:
    from vectorclm.shards.order import TrainingOrder


class TrainingWork(NamedTuple):
    """What a training computes, in steps and tokens; every estimate of its time divides these amounts."""

    steps: int
    tokens: int  # of all steps
    validation_tokens: float
    sample_tokens: int  # written one after another, for each prompt


class GenerationSamplesConfig(Settings):
    """Text samples from the model during training, always for the same prompts."""

    prompts: list[str] = Field(min_length=1, description="Beginnings of texts in pretraining, questions in fine-tuning")
    interval: int = Field(gt=0, description="Steps between samples; the first and the last step have one too")
    max_new_tokens: int = Field(default=48, ge=1, description="Longest sample, in tokens")


class TrainConfig(Settings):
    """Settings of the training loop that pretraining and fine-tuning share."""

    batch_size: int = Field(gt=0, description="Windows in one optimizer step, over all devices")
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    gradient_clipping: float = Field(default=1.0, gt=0, description="Largest norm of the whole gradient")
    validation_interval: int = Field(gt=0, description="Steps between validations")
    validation_windows: int = Field(default=64, gt=0, description="Held-out windows of each source in a validation")
    document_mask: bool = Field(default=True, description="No attention between the documents of a window")
    bad_batches: Literal["record", "skip", "stop"] = Field(
        default="record",
        exclude_if=lambda value: value == "record",
        description="What becomes of a batch whose loss or gradient norm is 8 standard deviations above the 50 steps "
        "before: record = a loss is reported; skip = the weights do not follow the batch; stop = the training ends. "
        "Skip and stop wait for the device in each step. A value that is not finite ends the training, except by skip",
    )
    samples: GenerationSamplesConfig | None = Field(
        default=None,
        exclude_if=lambda samples: samples is None,
        description="Text samples during training; none if left out",
    )

    def work(self, windows: float, length: int, held_out: float, sources: int = 1) -> TrainingWork:
        """The work of a training over `windows` windows of `length` tokens, with `held_out` tokens of its sources."""
        steps = int(windows // self.batch_size)
        validations = -(-steps // self.validation_interval)
        validation_tokens = validations * min(held_out, sources * self.validation_windows * length)
        written = 0
        if (samples := self.samples) is not None:
            written = (steps // samples.interval + 2) * len(samples.prompts) * samples.max_new_tokens
        return TrainingWork(steps, steps * self.batch_size * length, validation_tokens, written)


def too_small_to_mix(weights: Mapping[str, float]) -> list[str]:
    """The sources with too little weight for one window in each mix block."""
    total = sum(weights.values())
    return [label for label, weight in weights.items() if 0 < weight < total / MIX_BLOCK]


class Phase(Settings):
    """A phase of pretraining: a token budget and a data mix."""

    tokens: int = Field(gt=0, description="Token budget")
    weights: dict[str, Annotated[float, Field(ge=0, le=LARGEST_WEIGHT)]] = Field(
        default={}, description="Share of each source; the sample's weights if left out"
    )
    when_exhausted: WhenExhausted = Field(
        default="repeat",
        description="If a source runs out: an error before training, another epoch, or its share to the others",
    )

    @model_validator(mode="after")
    def _weights_count(self) -> Self:
        if self.weights and not sum(self.weights.values()):
            raise ValueError("every weight of a phase is 0: at least one must be greater")
        if too_small := too_small_to_mix(self.weights):
            small = ", ".join(too_small)
            raise ValueError(f"{small} has less than 1/{MIX_BLOCK} of the phase: raise its weight, or set it to 0")
        return self


class PretrainConfig(TrainConfig):
    """Settings of pretraining: the phases in their order, and the training loop's settings."""

    phases: list[Phase] = Field(min_length=1)
    zero_output_projections: bool = Field(
        default=False,
        exclude_if=lambda value: not value,  # older experiments keep their fingerprints
        description="Start the projections into the residual stream at zero instead of small random values",
    )

    @property
    def tokens(self) -> int:
        """Number of tokens over all phases."""
        return sum(phase.tokens for phase in self.phases)

    def order(
        self, sample_weights: Mapping[str, float], sizes: Mapping[str, int], length: int, itemsize: int, seed: int
    ) -> "TrainingOrder":
        """The training order over sources with `sizes` windows each.

        A window has `length` tokens of `itemsize` bytes. A phase without weights uses `sample_weights`. Raises
        ConfigError where a source runs out in a phase that forbids it.
        """
        from vectorclm.shards.order import MixturePhase, TrainingOrder, windows_per_block

        phases = [
            MixturePhase(phase.tokens // length, phase.weights or sample_weights, phase.when_exhausted)
            for phase in self.phases
        ]
        return TrainingOrder(phases, sizes, seed, windows_per_block=windows_per_block(length, itemsize))


class FinetuneConfig(TrainConfig):
    """Settings of instruction fine-tuning."""

    epochs: float = Field(gt=0, description="Number of passes over the conversations")
    replay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        exclude_if=lambda share: share == 0,
        description="Share of pretraining text among the windows, against forgetting",
    )

    def check_step(self, windows: int, where: str) -> None:
        """Raise ValueError where the passes over so many windows of conversations do not fill one step.

        `where` says what the windows are; the message names the setting and the value that work.
        """
        share = 1 - self.replay
        if round(self.epochs * windows / share) >= self.batch_size:
            return
        needed = math.ceil(self.batch_size * share / windows * 1000) / 1000
        if windows / share >= self.batch_size:
            raise ValueError(
                f"finetune.epochs ({self.epochs:g}) of {where} is less than one step of finetune.batch_size "
                f"({self.batch_size}): set finetune.epochs to {needed:g} at least"
            )
        largest = max(1, round(self.epochs * windows / share))
        raise ValueError(
            f"{where} do not fill one step of finetune.batch_size ({self.batch_size}): lower it to {largest}, draw "
            f"more conversations, or set finetune.epochs to {needed:g} at least"
        )


def check_conversations(config: FinetuneConfig, windows: int) -> None:
    """Raise ConfigError where so many windows of conversations do not fill one step."""
    try:
        config.check_step(windows, f"{windows:,} windows of conversations")
    except ValueError as error:
        raise ConfigError(str(error)) from None
