"""Learning-rate schedules: a linear warm-up, then a function of the step for each kind."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, model_validator

from vectorclm.settings import Settings

ScheduleKind = Literal["cosine", "warmup_stable_decay"]


class RateChange(Settings):
    """A change of all learning rates in the course of a training."""

    from_step: int = Field(gt=0, description="Number of steps done when it begins")
    factor: float = Field(gt=0, le=10, description="By which the rates are multiplied from then on")


class ScheduleConfig(Settings):
    """The learning rate's factor over the steps: a linear warm-up, then a fall to the floor."""

    kind: ScheduleKind = Field(default="cosine", description="Shape of the fall after the warm-up")
    warmup: float = Field(default=0.02, ge=0, lt=1, description="Share of the steps in the warm-up")
    floor: float = Field(default=0.1, ge=0, le=1, description="Learning rate of the last step, as a share of the peak")
    decay: float = Field(
        default=0.2, gt=0, le=1, description="Share of the steps in the decay; warmup_stable_decay only"
    )
    changes: list[RateChange] = Field(
        default=[],
        exclude_if=lambda changes: not changes,
        description="Changes of the rates on the way, as after a divergence. The training goes on from a checkpoint of "
        "the same training without the last change, if there is one before it",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.kind == "warmup_stable_decay" and self.warmup + self.decay > 1 + 1e-9:
            raise ValueError(f"warmup ({self.warmup}) and decay ({self.decay}) are more than all steps: lower one")
        if any(before.from_step >= after.from_step for before, after in pairwise(self.changes)):
            raise ValueError("changes must be in the order of their from_step, each later than the one before")
        return self


def _cosine(config: ScheduleConfig, step: int, steps: int, warmup: int) -> float:
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _warmup_stable_decay(config: ScheduleConfig, step: int, steps: int, warmup: int) -> float:
    decay = max(1, round(config.decay * steps))
    left = min(1.0, (steps - 1 - step) / decay)
    return config.floor + (1 - config.floor) * left


# The factor after the warm-up, from the settings, the step (from 0), the number of steps, and the warm-up's steps.
# `schedule` computes the warm-up, and calls the function for later steps only. The last step returns `config.floor`.
SCHEDULES: Mapping[ScheduleKind, Callable[[ScheduleConfig, int, int, int], float]] = {
    "cosine": _cosine,
    "warmup_stable_decay": _warmup_stable_decay,
}


def schedule(config: ScheduleConfig, step: int, steps: int) -> float:
    """The learning rate's factor in step `step` (from 0) of `steps`. A pure function: a resumed run needs no state.

    Cosine: Loshchilov & Hutter, arXiv 1608.03983, without restarts. Warmup-stable-decay: Hu et al.,
    arXiv 2404.06395, section 4, with a linear decay.
    """
    warmup = max(1, round(config.warmup * steps))
    changed = math.prod(change.factor for change in config.changes if step >= change.from_step)
    if step < warmup:
        return changed * (step + 1) / warmup
    return changed * SCHEDULES[config.kind](config, step, steps, warmup)
