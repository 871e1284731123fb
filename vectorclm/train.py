"""The one training loop, and pretraining. Instruction tuning differs in its starting weights and its labels."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader

from vectorclm.checkpoint import Checkpoints, restore, snapshot
from vectorclm.dataset import Batch, CurriculumPlan, StreamingLanguageModelDataset
from vectorclm.errors import ConfigError, DataError, DivergedError
from vectorclm.evaluate import windows_scores
from vectorclm.loss import IGNORE_INDEX
from vectorclm.model import CausalLM, ModelConfig
from vectorclm.muon import OptimizerConfig, ScheduleConfig, build_optimizers, schedule, set_learning_rates
from vectorclm.progress import Progress
from vectorclm.runtime import Runtime
from vectorclm.settings import Settings
from vectorclm.shards import Windows, read_windows

FLUSH_STEPS = 10  # metrics are read back from the device this many steps at a time


class TrainConfig(Settings):
    """What the loop does with any data."""

    batch_size: int = Field(gt=0, description="Windows in one optimizer step, over all devices")
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    gradient_clipping: float = Field(1.0, gt=0, description="Largest norm of the whole gradient")
    validation_interval: int = Field(gt=0, description="Steps between validations")
    validation_windows: int = Field(64, gt=0, description="Held-out windows a source in each of them")


class Phase(Settings):
    """A stretch of the curriculum."""

    tokens: int = Field(gt=0, description="Token budget")
    weights: dict[str, float] = Field(default={}, description="Share of each source; left out, the sample's weights")


class PretrainConfig(TrainConfig):
    """The curriculum: phases in order, each with its budget and mix."""

    phases: list[Phase] = Field(min_length=1)

    @property
    def tokens(self) -> int:
        """Tokens over all phases."""
        return sum(phase.tokens for phase in self.phases)


@dataclass(frozen=True)
class Work:
    """Where a run leaves its traces."""

    stage: str
    folder: Path  # metrics.jsonl grows here
    checkpoints: Checkpoints
    runtime: Runtime


def train(
    model: CausalLM,
    config: TrainConfig,
    dataset: StreamingLanguageModelDataset,
    validation: Mapping[str, Sequence[Windows]],
    token_lengths: Sequence[int],
    seed: int,
    work: Work,
) -> dict[str, Any]:
    """Train `model` in place over the whole `dataset`, from the newest checkpoint if there is one.

    Returns steps, tokens, losses and scores. Raises DivergedError where the loss leaves the finite numbers.
    """
    device = work.runtime.configure_torch()
    model.to(device)
    optimizers = build_optimizers(model, config.optimizer)
    set_learning_rates(optimizers, 1.0)
    metrics = Metrics(work.folder / "metrics.jsonl")
    if (saved := work.checkpoints.latest()) is not None:
        restore(saved, model, optimizers)
        dataset.start_step = saved.step
    metrics.restart(saved.metrics if saved is not None else "")
    steps, start = dataset.steps, dataset.start_step
    interval = work.runtime.checkpoint_interval or max(25, min(1000, steps // 20))
    window_tokens = dataset.window_tokens
    loader = DataLoader(
        dataset, batch_size=None, num_workers=work.runtime.loader_workers, pin_memory=device.type == "cuda"
    )
    micro_batch = work.runtime.micro_batch_size or max(1, (65_536 if device.type == "cuda" else 4_096) // window_tokens)
    scores: dict[str, dict[str, float]] = {}
    with Progress(work.stage, steps * config.batch_size * window_tokens, "tokens") as progress:
        for step, batch in enumerate(loader, start):
            torch.manual_seed(seed * 1_000_003 + step)  # dropout is a function of the step, so nothing needs saving
            factor = schedule(config.schedule, step, steps)
            set_learning_rates(optimizers, factor)
            loss, norm = train_step(model, optimizers, batch, config.gradient_clipping, micro_batch, device)
            tokens = (step + 1) * config.batch_size * window_tokens
            metrics.add(step + 1, tokens, loss, norm, factor * config.optimizer.learning_rate)
            last = step + 1 == steps
            if (step + 1) % FLUSH_STEPS == 0 or last:
                metrics.flush()
            if (step + 1) % config.validation_interval == 0 or last:
                scores = windows_scores(
                    model, validation, token_lengths, config.validation_windows, micro_batch, device
                )
                metrics.write({"step": step + 1, "tokens": tokens, "validation": scores})
            if (step + 1) % interval == 0 and not last:
                metrics.flush()
                work.checkpoints.save(snapshot(step + 1, model, optimizers, metrics.text()))
            progress.at(tokens, metrics.note)
    return {
        "steps": steps,
        "tokens": steps * config.batch_size * window_tokens,
        **metrics.summary(),
        "validation": scores,
    }


def train_step(
    model: CausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Batch,
    gradient_clipping: float,
    micro_batch: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over a batch, a few windows at a time; mean loss (nats a supervised token), gradient norm.

    The loss is the mean over the whole batch's supervised tokens, however they fall into micro-batches. Nothing
    here waits for the device. Raises DataError for a batch with nothing supervised.
    """
    model.train()
    supervised = int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
    if not supervised:
        raise DataError("a batch has no supervised token: its labels are all -100, so there is nothing to learn from")
    total = torch.zeros((), device=device)
    for start in range(0, len(batch.input_ids), micro_batch):
        here = slice(start, start + micro_batch)
        input_ids = batch.input_ids[here].to(device, non_blocking=True)
        labels = batch.labels[here].to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(input_ids, labels) / supervised
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clipping)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm


class Metrics:
    """`metrics.jsonl`: a line a step, read back from the device some steps late."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[tuple[int, int, Tensor, Tensor, float]] = []
        self.since, self.tokens = time.monotonic(), 0
        self.note = ""
        self.losses: list[float] = []
        self.speeds: list[float] = []

    def restart(self, text: str) -> None:
        """Begin with these lines: what the checkpoint knew, nothing after it."""
        self.path.write_text(text)
        lines = [json.loads(line) for line in text.splitlines()]
        self.losses = [line["loss"] for line in lines if "loss" in line]
        self.tokens = max((line["tokens"] for line in lines), default=0)
        self.since = time.monotonic()

    def text(self) -> str:
        """All lines written so far."""
        return self.path.read_text()

    def add(self, step: int, tokens: int, loss: Tensor, norm: Tensor, learning_rate: float) -> None:
        """Remember a step's figures; `loss` and `norm` may still be in the making."""
        self.waiting.append((step, tokens, loss, norm, learning_rate))

    def flush(self) -> None:
        """Write the steps remembered. Raises DivergedError at the first loss that is not finite."""
        if not self.waiting:
            return
        now, tokens = time.monotonic(), self.waiting[-1][1]
        values = torch.stack([torch.stack((loss, norm.to(loss))) for _, _, loss, norm, _ in self.waiting]).tolist()
        speed = (tokens - self.tokens) / max(now - self.since, 1e-9)
        self.since, self.tokens = now, tokens
        self.speeds.append(speed)
        for (step, done, _, _, rate), (loss, norm) in zip(self.waiting, values, strict=True):
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise DivergedError(f"loss {loss} and gradient norm {norm} in step {step}: lower the learning rate")
            line = {"step": step, "tokens": done, "loss": loss, "learning_rate": rate, "grad_norm": norm}
            self.write({**line, "tokens_per_second": round(speed, 1)})
            self.losses.append(loss)
        self.waiting.clear()
        self.note = f"loss {self.losses[-1]:.3f}  {speed:,.0f} tokens/s"

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a") as file:
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


def pretrain(
    model_config: ModelConfig,
    config: PretrainConfig,
    sample_weights: Mapping[str, float],
    shards: Path,
    token_lengths: Sequence[int],
    seed: int,
    work: Work,
) -> tuple[CausalLM, dict[str, Any]]:
    """Train a new model over the curriculum. `sample_weights` is the mix of a phase that names none.

    Raises ConfigError where the plan is shorter than one step.
    """
    labels = sorted(path.name for path in shards.iterdir() if path.is_dir())
    training = {label: read_windows(shards / label, "train") for label in labels}
    length = training[labels[0]][0].input_ids.shape[1]
    sizes = {label: sum(len(shard.input_ids) for shard in parts) for label, parts in training.items()}
    phases = [(phase.tokens // length, phase.weights or sample_weights) for phase in config.phases]
    plan = CurriculumPlan(phases, sizes, seed)
    dataset = StreamingLanguageModelDataset(training, plan, config.batch_size)
    if dataset.steps == 0:
        raise ConfigError(
            f"pretrain.phases hold {config.tokens} tokens, one step takes {config.batch_size * length}: raise them"
        )
    torch.manual_seed(seed)
    model = CausalLM(model_config)
    validation = {label: read_windows(shards / label, "validation") for label in labels}
    summary = train(model, config, dataset, validation, token_lengths, seed, work)
    epochs = {label: round(value, 3) for label, value in plan.epochs().items()}
    return model, {**summary, "epochs": epochs, "parameters": model_config.parameters}
