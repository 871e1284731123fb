"""Validation and text samples during a training: all ranks compute their share, and the first rank records the sum."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from vectorclm.evaluation.bits_per_byte import HeldOutWindows, WindowSums, scores_of, sum_windows
from vectorclm.model import CausalLM
from vectorclm.runtime.group import Group
from vectorclm.runtime.preemption import preemption
from vectorclm.train_config import TrainConfig

Kind = Literal["validation", "samples"]
Respond = Callable[[CausalLM, str, int], str]  # answers a prompt in at most so many tokens


@dataclass(frozen=True)
class Measurements:
    """What a training measures beside its steps. All ranks call `measure` at the same steps."""

    model: CausalLM
    config: TrainConfig
    held_out: HeldOutWindows
    micro_batch: int  # windows in one forward pass
    respond: Respond | None
    group: Group

    def due(self, step: int, steps: int) -> list[Kind]:
        """What is measured after `step` of `steps`, on all ranks alike."""
        last, samples = step == steps, self.config.samples
        found: list[Kind] = []
        if step and (step % self.config.validation_interval == 0 or last):
            found.append("validation")
        if samples is not None and (step % samples.interval == 0 or last):
            found.append("samples")
        return found

    def measure(self, kind: Kind) -> Any:
        """Scores or samples of the whole group; None on all ranks where SIGTERM reached one of them meanwhile."""
        own: Callable[[], Any] = self._own_sums if kind == "validation" else self._own_answers
        share = preemption.unless_requested(partial(own))
        _, abandoned = self.group.agree(0, share is None)
        if abandoned or share is None:
            return None
        return self._scores(share) if kind == "validation" else self._samples(share)

    def _own_sums(self) -> dict[str, WindowSums]:
        limit = self.config.validation_windows
        return sum_windows(self.model, self.held_out, self.micro_batch, limit, group=self.group)

    def _scores(self, own: dict[str, WindowSums]) -> dict[str, dict[str, float]]:
        sums = torch.tensor(list(own.values()), dtype=torch.float64)  # counts below 2^53 are exact
        if self.group.world_size > 1:
            self.group.add([sums])
        return {label: scores_of(WindowSums(*row)) for label, row in zip(own, sums.tolist(), strict=True)}

    def _own_answers(self) -> dict[int, str]:
        """The likeliest answers to this rank's prompts, by their place in the list."""
        samples = self.config.samples
        assert samples is not None and self.respond is not None
        found = {}
        for place in range(self.group.rank, len(samples.prompts), self.group.world_size):
            found[place] = self.respond(self.model, samples.prompts[place], samples.max_new_tokens)
            self.group.moved()
        return found

    def _samples(self, own: dict[int, str]) -> list[dict[str, str]]:
        assert self.config.samples is not None
        found = []
        for place, prompt in enumerate(self.config.samples.prompts):
            answer = self.group.share(own.get(place, ""), place % self.group.world_size)
            found.append({"prompt": prompt, "answer": answer})
        return found
