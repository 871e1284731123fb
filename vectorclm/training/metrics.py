"""Training metrics for each step, with detection of loss spikes and divergence."""

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

from vectorclm.errors import CorruptArtifactError, DivergedError
from vectorclm.formats.json_files import table_lines

logger = logging.getLogger(__name__)

SPIKE_STEPS, SPIKE = 50, 8.0  # a spike is 8 standard deviations above the mean of the 50 losses before it
SKIPPED = 10  # batches one after another that are skipped; the cause is then not a batch
DIVERGED_STEPS = 50  # steps with a high mean loss that count as a divergence


class Metrics:
    """Writer of `metrics.jsonl`: one line for each step and one for each event.

    The figures are read from the device several steps late. An event is
    `{"step", "tokens", "event": {"kind", "told", "windows"}}`, of the kind spike, divergence, not_finite,
    skipped or stopped. Text samples of the model are written to `samples.jsonl` in the same folder.
    """

    def __init__(self, path: Path, describe: Callable[[int], str]) -> None:
        self.path = path
        self.samples = path.with_name("samples.jsonl")
        self.describe = describe  # names the windows of a step; steps count from 0
        self.waiting: list[tuple[int, int, Tensor, Tensor, float]] = []
        self.since, self.tokens = time.monotonic(), 0
        self.note = ""
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.skipped = 0  # batches since the last step
        self.speeds: list[float] = []

    def restart(self, text: str) -> None:
        """Reset both files to the lines of a checkpoint. Raises CorruptArtifactError where they are no metrics."""
        lines = list(table_lines(text.encode(), "the metrics of the checkpoint"))
        for line in lines:
            if type(line.get("tokens")) is not int or not isinstance(line.get("loss", 0.0), float | int):
                raise CorruptArtifactError(f"the metrics of the checkpoint have a line without figures: {line!r:.100}")
        samples = [line for line in lines if "samples" in line]
        self.path.write_text("".join(text.splitlines(keepends=True)[: len(lines) - len(samples)]))  # samples come last
        self.samples.unlink(missing_ok=True)
        for line in samples:
            self.write(line)
        self.losses = [line["loss"] for line in lines if "loss" in line]
        self.norms = [line["grad_norm"] for line in lines if "loss" in line]
        kinds = ["" if "loss" in line else line["event"]["kind"] for line in lines if {"loss", "event"} & line.keys()]
        self.skipped = next((n for n, kind in enumerate(reversed(kinds)) if kind != "skipped"), len(kinds))
        self.tokens = max((line["tokens"] for line in lines), default=0)
        self.since = time.monotonic()

    def text(self) -> str:
        """All lines written so far, of both files."""
        return self.path.read_text() + (self.samples.read_text() if self.samples.is_file() else "")

    def add(self, step: int, tokens: int, loss: Tensor, norm: Tensor, learning_rate: float) -> None:
        """Queue a step's figures; the device may still compute `loss` and `norm`."""
        self.waiting.append((step, tokens, loss, norm, learning_rate))

    def flush(self) -> None:
        """Write the queued steps and their events. Raises DivergedError at the first step that diverged."""
        if not self.waiting:
            return
        now, tokens = time.monotonic(), self.waiting[-1][1]
        values = torch.stack([torch.stack((loss, norm.to(loss))) for _, _, loss, norm, _ in self.waiting]).tolist()
        speed = (tokens - self.tokens) / max(now - self.since, 1e-9)
        self.since, self.tokens = now, tokens
        self.speeds.append(speed)
        for (step, done, _, _, rate), (loss, norm) in zip(self.waiting, values, strict=True):
            self._check(step, done, loss, norm)
            line = {"step": step, "tokens": done, "loss": loss, "learning_rate": rate, "grad_norm": norm}
            self.write({**line, "tokens_per_second": round(speed, 1)})
            self.losses.append(loss)
            self.norms.append(norm)
            self.skipped = 0
        self.waiting.clear()
        self.note = f"loss {self.losses[-1]:.3f}  {speed:,.0f} tokens/s"

    @property
    def is_diverging(self) -> bool:
        """Whether the last ten losses are far above the first ten: a checkpoint would keep a diverging model."""
        return self._is_diverging_at(len(self.losses))

    def _is_diverging_at(self, steps: int) -> bool:
        """Whether the ten losses up to this step were far above the first ten."""
        return steps > 10 and _is_far_above(self.losses[steps - 10 : steps], self.losses[:10])

    def check_end(self) -> None:
        """Raise DivergedError where the last losses are far above the very first, as after a few wild steps."""
        last = self.losses[-10:][-max(1, len(self.losses) // 2) :]
        if len(self.losses) < 2 or not _is_far_above(last, self.losses[:1]):
            return
        at = 1 + next(n for n, loss in enumerate(self.losses) if _is_far_above([loss], self.losses[:1]))
        message = f"the loss ends at {fmean(last):.3f}, far above its first value {self.losses[0]:.3f}"
        windows = self.describe(at - 1)
        steps = len(self.losses)
        event = {"kind": "divergence", "told": message, "windows": windows}
        self.write({"step": at, "tokens": self.tokens // steps * at, "event": event})
        raise DivergedError(
            f"divergence in step {at}: {message}. Lower the learning rate, or check this step's windows: {windows}"
        )

    def _check(self, step: int, tokens: int, loss: float, norm: float) -> None:
        """Compare a step with the steps before it; write an event for a spike or a divergence."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            kind, message, at = "not_finite", f"loss {loss} and gradient norm {norm}", step
        elif is_divergence(self.losses):
            at = 1 + next(n for n in range(len(self.losses), 0, -1) if not self._is_diverging_at(n))
            kind = "divergence"
            message = f"from there to step {step - 1} the loss is far above its first values"
        elif is_spike(self.losses, loss):
            kind, message, at = "spike", f"loss {loss:.3f}, after {self.losses[-1]:.3f}", step
        else:
            return
        windows = self.describe(at - 1)
        event = {"kind": kind, "told": message, "windows": windows}
        self.write({"step": at, "tokens": tokens // step * at, "event": event})
        headline = f"{kind.replace('_', ' ')} in step {at}: {message}"
        if kind == "spike":
            logger.warning("%s; its windows are %s", headline, windows)
            return
        raise DivergedError(
            f"{headline}. Lower the learning rate, or check this step's windows: {windows}. The last checkpoints "
            "before it are kept"
        )

    def accepts(self, step: int, tokens: int, loss: float, norm: float, *, stop: bool) -> bool:
        """Whether a step stands out neither in its loss (nats a token) nor in its gradient's norm; else write an event.

        Every step before must have been flushed. Raises DivergedError with `stop`, or where SKIPPED batches one after
        another stand out.
        """
        told = _outlier("loss", self.losses, loss) or _outlier("gradient norm", self.norms, norm)
        if told is None:
            return True
        self.skipped += 1
        windows, kind = self.describe(step - 1), "stopped" if stop else "skipped"
        self.write({"step": step, "tokens": tokens, "event": {"kind": kind, "told": told, "windows": windows}})
        if stop:
            raise DivergedError(
                f"bad batch in step {step}: {told}. Check its windows: {windows}; lower the learning rate, or leave "
                'such batches out with bad_batches = "skip"'
            )
        logger.warning("step %d is skipped: %s; its windows are %s", step, told, windows)
        if self.skipped == SKIPPED:
            raise DivergedError(
                f"{SKIPPED} batches one after another stand out, the last in step {step}: {told}. This is no single "
                "bad batch: lower the learning rate"
            )
        return False

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line to `samples.jsonl` if it has samples, else to `metrics.jsonl`."""
        with (self.samples if "samples" in line else self.path).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def summary(self) -> dict[str, float]:
        """First and last loss, each a mean over up to ten steps, and the median speed.

        Raises DivergedError where the training ends far above its start.
        """
        self.check_end()
        speeds = sorted(self.speeds) or [0.0]
        first, last = self.losses[:10], self.losses[-10:]
        return {
            "first_loss": sum(first) / len(first),
            "last_loss": sum(last) / len(last),
            "tokens_per_second": speeds[len(speeds) // 2],
        }


def _outlier(name: str, before: Sequence[float], value: float) -> str | None:
    """What stands out about a value; None where it is one of many."""
    if not math.isfinite(value):
        return f"{name} {value}"
    return f"{name} {value:.3f}, after {before[-1]:.3f}" if is_spike(before, value) else None


def is_spike(before: Sequence[float], loss: float) -> bool:
    """Whether a loss is above the mean of the SPIKE_STEPS before it by SPIKE deviations and a tenth of that mean."""
    recent = before[-SPIKE_STEPS:]
    return len(recent) == SPIKE_STEPS and loss > fmean(recent) + max(SPIKE * stdev(recent), 0.1 * fmean(recent))


def is_divergence(losses: Sequence[float]) -> bool:
    """Whether the mean of the last DIVERGED_STEPS is 1 nat above and twice that of the first ten."""
    return len(losses) >= DIVERGED_STEPS + 10 and _is_far_above(losses[-DIVERGED_STEPS:], losses[:10])


def _is_far_above(now: Sequence[float], first: Sequence[float]) -> bool:
    return fmean(now) > max(fmean(first) + 1, 2 * fmean(first))
