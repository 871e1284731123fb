"""A training's figures, step by step, and its spikes and divergences, judged as they come."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from vectorclm.errors import DivergedError

logger = logging.getLogger(__name__)

SPIKE_STEPS, SPIKE = 50, 8.0  # a loss is judged by so many before it, and by so many of their deviations
DIVERGED_STEPS = 50  # without a way back


class Metrics:
    """`metrics.jsonl`: a line a step, read back from the device some steps late, and one for each event among them.

    An event is a step that went wrong: `{"step", "tokens", "event": {"kind", "told", "windows"}}`, of the kind spike,
    divergence or not_finite. What the model says in training is in `samples.jsonl` beside it.
    """

    def __init__(self, path: Path, describe: Callable[[int], str]) -> None:
        self.path = path
        self.samples = path.with_name("samples.jsonl")
        self.describe = describe  # the windows of a step, counted from 0
        self.waiting: list[tuple[int, int, Tensor, Tensor, float]] = []
        self.since, self.tokens = time.monotonic(), 0
        self.note = ""
        self.losses: list[float] = []
        self.speeds: list[float] = []

    def restart(self, text: str) -> None:
        """Begin with these lines: what the checkpoint knew, nothing after it."""
        lines = [json.loads(line) for line in text.splitlines()]
        said = [line for line in lines if "samples" in line]
        self.path.write_text("".join(text.splitlines(keepends=True)[: len(lines) - len(said)]))  # samples come last
        self.samples.unlink(missing_ok=True)
        for line in said:
            self.write(line)
        self.losses = [line["loss"] for line in lines if "loss" in line]
        self.tokens = max((line["tokens"] for line in lines), default=0)
        self.since = time.monotonic()

    def text(self) -> str:
        """All lines written so far, of both files."""
        return self.path.read_text() + (self.samples.read_text() if self.samples.is_file() else "")

    def add(self, step: int, tokens: int, loss: Tensor, norm: Tensor, learning_rate: float) -> None:
        """Remember a step's figures; `loss` and `norm` may still be in the making."""
        self.waiting.append((step, tokens, loss, norm, learning_rate))

    def flush(self) -> None:
        """Write the steps remembered, and what happened in them. Raises DivergedError at the first that went astray."""
        if not self.waiting:
            return
        now, tokens = time.monotonic(), self.waiting[-1][1]
        values = torch.stack([torch.stack((loss, norm.to(loss))) for _, _, loss, norm, _ in self.waiting]).tolist()
        speed = (tokens - self.tokens) / max(now - self.since, 1e-9)
        self.since, self.tokens = now, tokens
        self.speeds.append(speed)
        for (step, done, _, _, rate), (loss, norm) in zip(self.waiting, values, strict=True):
            self._look(step, done, loss, norm)
            line = {"step": step, "tokens": done, "loss": loss, "learning_rate": rate, "grad_norm": norm}
            self.write({**line, "tokens_per_second": round(speed, 1)})
            self.losses.append(loss)
        self.waiting.clear()
        self.note = f"loss {self.losses[-1]:.3f}  {speed:,.0f} tokens/s"

    @property
    def is_diverging(self) -> bool:
        """Whether the last steps look like the beginning of a divergence: no checkpoint of them is worth keeping."""
        return self._strayed(len(self.losses))

    def _strayed(self, steps: int) -> bool:
        """Whether the loss was far above the first after so many steps."""
        return steps > 10 and _is_far_above(self.losses[steps - 10 : steps], self.losses[:10])

    def _look(self, step: int, tokens: int, loss: float, norm: float) -> None:
        """Judge a step by those before it."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            kind, told, at = "not_finite", f"loss {loss} and gradient norm {norm}", step
        elif is_divergence(self.losses):
            at = 1 + next(n for n in range(len(self.losses), 0, -1) if not self._strayed(n))
            kind, told = "divergence", f"from there to step {step - 1} the loss is far above what it was at first"
        elif is_spike(self.losses, loss):
            kind, told, at = "spike", f"loss {loss:.3f}, after {self.losses[-1]:.3f}", step
        else:
            return
        windows = self.describe(at - 1)
        event = {"kind": kind, "told": told, "windows": windows}
        self.write({"step": at, "tokens": tokens // step * at, "event": event})
        said = f"{kind.replace('_', ' ')} in step {at}: {told}"
        if kind == "spike":
            logger.warning("%s; its windows are %s", said, windows)
            return
        raise DivergedError(
            f"{said}. Lower the learning rate, or look at the windows of this step, {windows}. The last checkpoints "
            "before it are kept"
        )

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, to the file that it belongs to."""
        with (self.samples if "samples" in line else self.path).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def summary(self) -> dict[str, float]:
        """First and last loss (each a mean over up to ten steps) and the median speed."""
        speeds = sorted(self.speeds) or [0.0]
        first, last = self.losses[:10], self.losses[-10:]
        return {
            "first_loss": sum(first) / len(first),
            "last_loss": sum(last) / len(last),
            "tokens_per_second": speeds[len(speeds) // 2],
        }


def is_spike(before: Sequence[float], loss: float) -> bool:
    """Whether a loss stands out from the SPIKE_STEPS before it: by SPIKE deviations and a tenth of their mean."""
    recent = before[-SPIKE_STEPS:]
    return len(recent) == SPIKE_STEPS and loss > fmean(recent) + max(SPIKE * stdev(recent), 0.1 * fmean(recent))


def is_divergence(losses: Sequence[float]) -> bool:
    """Whether the mean of the last DIVERGED_STEPS is a nat above, and twice, that of the first ten."""
    return len(losses) >= DIVERGED_STEPS + 10 and _is_far_above(losses[-DIVERGED_STEPS:], losses[:10])


def _is_far_above(now: Sequence[float], first: Sequence[float]) -> bool:
    return fmean(now) > max(fmean(first) + 1, 2 * fmean(first))
