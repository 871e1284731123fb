"""The training loop of pretraining and of instruction fine-tuning, which differ in starting weights and labels."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vectorclm.dataset import Batch, StreamingLanguageModelDataset
from vectorclm.errors import PreemptedError
from vectorclm.evaluation.bits_per_byte import HeldOutWindows
from vectorclm.memory_plan import DeviceType, TrainingShape, plan_for
from vectorclm.model import CausalLM
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.group import ALONE, Group, PeerLostError
from vectorclm.runtime.preemption import FINISH, ignore_sigterm, preemption
from vectorclm.runtime.progress import Progress
from vectorclm.shards.node_blocks import NodeBlocks, node_blocks
from vectorclm.shards.order import TrainingOrder
from vectorclm.shards.reader import ShardReader
from vectorclm.store.artifact import Artifact
from vectorclm.train_config import TrainConfig
from vectorclm.train_step import TrainStep, loss_function, supervised_tokens
from vectorclm.training.checkpoint import Checkpoints, Snapshot, restore, snapshot
from vectorclm.training.metrics import Metrics
from vectorclm.training.optimizers import build_optimizers, set_learning_rates
from vectorclm.training.schedule import schedule
from vectorclm.validation import Kind, Measurements, Respond

Scores = dict[str, dict[str, float]]
logger = logging.getLogger(__name__)
FLUSH_STEPS = 10  # steps between two reads of the metrics from the device
RANK_SEED = 0x9E3779B1  # makes the ranks' seeds differ in their low 32 bits: the CPU's generator uses no others


@dataclass(frozen=True)
class TrainingRun:
    """One run of a stage: its seed, its folder, its checkpoints, its machine."""

    stage: str
    seed: int
    folder: Path  # of metrics.jsonl and samples.jsonl
    checkpoints: Checkpoints
    runtime: Runtime
    group: Group = ALONE
    respond: Respond | None = None

    def node_blocks(self, shards: Artifact, config: TrainConfig) -> AbstractContextManager[NodeBlocks | None]:
        """What the ranks of this node share of the blocks of `shards`, while the block runs."""
        local, workers = shards.store.is_local, self.runtime.loader_workers
        return node_blocks(self.group, is_local=local, batch_size=config.batch_size, workers=workers)


class Record:
    """The first rank's work beside the steps: it writes metrics, scores and samples, and saves checkpoints."""

    def __init__(
        self,
        model: CausalLM,
        optimizers: Sequence[torch.optim.Optimizer],
        config: TrainConfig,
        dataset: StreamingLanguageModelDataset,
        run: TrainingRun,
    ) -> None:
        self.model, self.optimizers, self.run = model, optimizers, run
        self.order = dataset.order.digest(config.batch_size)
        self.steps, self.step_tokens = dataset.steps, config.batch_size * dataset.window_tokens
        self.interval = run.runtime.steps_between_checkpoints(self.steps)
        self.metrics = Metrics(run.folder / "metrics.jsonl", dataset.describe)
        self.bad_batches = config.bad_batches
        self.scores: Scores = {}
        self.complete = True  # whether the last step has its validation and its samples
        self._kept = 0  # step of the newest checkpoint
        self._seen: dict[str, int] = {}  # last step with a validation, and with samples

    def begin(self, saved: Snapshot | None) -> None:
        """Start, or resume from a checkpoint."""
        self.metrics.restart(saved.metrics if saved is not None else "")
        for line in map(json.loads, saved.metrics.splitlines() if saved is not None else ()):
            self.scores = line.get("validation", self.scores)
            self._seen |= {kind: line["step"] for kind in ("validation", "samples") if kind in line}
        self._kept = saved.step if saved is not None else 0
        if saved is not None and self.run.group.rank == 0:
            logger.info("the training goes on from step %d of %d", saved.step, self.steps)

    def add(self, step: int, loss: Tensor, norm: Tensor, learning_rate: float) -> str:
        """Record a finished step; return the progress bar's note."""
        self.metrics.add(step, step * self.step_tokens, loss, norm, learning_rate)
        if step % FLUSH_STEPS == 0 or step == self.steps:
            self.metrics.flush()
        self.complete = True
        return self.metrics.note

    def accepts(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Judge a step by the steps before; False where its batch is skipped. Raises DivergedError where that ends."""
        self.metrics.flush()
        stop = self.bad_batches == "stop"
        return self.metrics.accepts(step, step * self.step_tokens, float(loss), float(norm), stop=stop)

    def missing(self, step: int, due: Sequence[Kind]) -> list[Kind]:
        """What is due after a step and was not measured before an interruption."""
        wanted = [kind for kind in due if self._seen.get(kind) != step]
        if wanted:
            self.metrics.flush()  # keeps the lines in the order of the steps, wherever the training is interrupted
        return wanted

    def measured(self, step: int, kind: Kind, found: Any) -> None:
        """Record scores or samples; None where SIGTERM prevented them, so that the next attempt measures again."""
        if found is None:
            self.complete = False
            return
        self.metrics.write({"step": step, "tokens": step * self.step_tokens, kind: found})
        self._seen[kind] = step
        self.scores = found if kind == "validation" else self.scores

    def keep_if_due(self, step: int) -> None:
        """Save a checkpoint of the steps done at every interval."""
        if step % self.interval == 0 and step != self.steps and self.complete:
            self.keep(step)

    def keep(self, step: int) -> None:
        """Save a checkpoint of the steps done, unless it exists or the loss is diverging."""
        self.metrics.flush()
        if step > self._kept and not self.metrics.is_diverging:
            saved = snapshot(step, self.model, self.optimizers, self.metrics.text(), self.order)
            self.run.checkpoints.save(saved)
            self._kept = step

    def stop(self, step: int) -> str:
        """Save a checkpoint and wait until it is in the store; return the message for the user."""
        self.keep(step)
        self.run.checkpoints.wait()
        place = f"interrupted by SIGTERM after step {step} of {self.steps}, checkpoint at step {self._kept}"
        return f"{place}: the next run of this stage resumes from there"

    def summary(self) -> dict[str, Any]:
        """Losses, speed and the last validation scores."""
        return {**self.metrics.summary(), "validation": self.scores}


def own_share(
    readers: Mapping[str, ShardReader], order: TrainingOrder, config: TrainConfig, group: Group
) -> StreamingLanguageModelDataset:
    """This rank's rows of every batch in the training order."""
    return StreamingLanguageModelDataset(readers, order, config.batch_size, group, document_mask=config.document_mask)


def train(
    model: CausalLM,
    config: TrainConfig,
    dataset: StreamingLanguageModelDataset,
    validation: Mapping[str, ShardReader],
    token_lengths: Sequence[int],
    run: TrainingRun,
) -> dict[str, Any]:
    """Train `model` in place over the whole `dataset`, from the newest checkpoint if there is one.

    All ranks measure and the first writes. It returns steps, tokens, losses and scores; the other ranks return an empty
    dict. Raises DivergedError, with the step's windows, where the loss is not finite or rises far above its first
    values; the checkpoints before that step stay. Raises DataError where the checkpoint belongs to another data set
    or training order. Raises PreemptedError on all ranks, after a checkpoint, where SIGTERM reached one of them.
    """
    group, runtime = run.group, run.runtime
    device = runtime.configure_torch(group)
    model.to(device)
    optimizers = build_optimizers(model, config.optimizer, group)
    set_learning_rates(optimizers, 1.0)
    saved = _resume(model, optimizers, dataset, run)
    micro_batch = _fit_memory(model, config, dataset, run, device)
    step = TrainStep(model, optimizers, config.gradient_clipping, micro_batch, group, loss_function(model, device))
    preemption.begin_training()
    held_out = HeldOutWindows(validation, token_lengths, config.document_mask)
    measurements = Measurements(model, config, held_out, micro_batch, run.respond, group)
    record = Record(model, optimizers, config, dataset, run) if group.rank == 0 else None
    if record is not None:
        record.begin(saved)
    _measure(measurements, dataset.start_step, dataset.steps, record)
    batches = iter(load(dataset, runtime, device))  # its workers end with this function, after the last checkpoint
    done, stopped = _run_steps(step, dataset, batches, measurements, run, record)
    preemption.limit(FINISH)
    if stopped:
        raise PreemptedError(group.share(record.stop(done) if record is not None else ""))
    if record is None:
        return {}
    return {"steps": dataset.steps, "tokens": dataset.steps * record.step_tokens, **record.summary()}


def _fit_memory(
    model: CausalLM,
    config: TrainConfig,
    dataset: StreamingLanguageModelDataset,
    run: TrainingRun,
    device: torch.device,
) -> int:
    """Windows that fit in memory at once by the memory plan, which also decides on activation checkpointing."""
    kind: DeviceType = "cuda" if device.type == "cuda" else "cpu"
    shape = TrainingShape(model.config, dataset.window_tokens, kind, config.document_mask, config.optimizer.matrices)
    own_windows = -(-config.batch_size // run.group.world_size)
    plan = plan_for(shape, own_windows, run.runtime, device, run.group.local_world_size)
    model.model.activation_checkpointing = plan.activation_checkpointing
    fastest = run.runtime.windows_at_once(dataset.window_tokens, device)
    return fastest if plan.windows >= min(fastest, own_windows) else plan.windows


def _resume(
    model: CausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    dataset: StreamingLanguageModelDataset,
    run: TrainingRun,
) -> Snapshot | None:
    """Restore the newest checkpoint on all ranks, if there is one; the first rank reads it for all."""
    order = dataset.order.digest(dataset.batch_size)
    saved = run.checkpoints.latest(order) if run.group.rank == 0 else None
    step = run.group.share(None if saved is None else saved.step)
    if step is not None:
        weights = run.group.copies(None if saved is None else saved.model)
        states = run.group.copies(None if saved is None else saved.optimizers)
        saved = saved or Snapshot(step, weights, states, "", order)
        restore(saved, model, optimizers)
        dataset.start_step = step
    return saved


def _run_steps(
    step: TrainStep,
    dataset: StreamingLanguageModelDataset,
    batches: Iterator[Batch],
    measurements: Measurements,
    run: TrainingRun,
    record: Record | None,
) -> tuple[int, bool]:
    """Train from the dataset's first step to its last; the steps done, and whether SIGTERM stopped the training."""
    config, group, steps = measurements.config, run.group, dataset.steps
    step_tokens = config.batch_size * dataset.window_tokens
    with Progress(run.stage, steps * step_tokens, "tokens") as progress, group.steps():
        if dataset.start_step:
            progress.resume(dataset.start_step * step_tokens, f"step {dataset.start_step:,} of {steps:,}")
        for done in range(dataset.start_step, steps):
            batch = preemption.unless_requested(partial(next, batches))
            supervised, stopped = _agreed(batch, group, record, done)
            if stopped or batch is None:
                progress.stop()
                return done, stopped
            # Dropout is a function of step and rank, so a checkpoint needs no generator state.
            torch.manual_seed(run.seed * 1_000_003 + done + group.rank * RANK_SEED)
            factor = schedule(config.schedule, done, steps)
            set_learning_rates(step.optimizers, factor)
            compute = partial(step.accumulate, batch, supervised)
            # The ranks have agreed on this step. A single process may cancel it: nothing changes before its end.
            total = compute() if group.world_size > 1 else preemption.unless_requested(compute)
            if total is None:
                progress.stop()
                return done, True
            norm = step.reduce(total)
            accepted = config.bad_batches == "record" or _accepted(record, done + 1, total, norm, group)
            step.apply(accepted)
            note = ""
            if record is not None and accepted:
                with group.steps(expected=False):
                    note = record.add(done + 1, total, norm, factor * config.optimizer.learning_rate)
            _measure(measurements, done + 1, steps, record)
            if record is not None:
                with group.steps(expected=False):
                    record.keep_if_due(done + 1)
                progress.at((done + 1) * step_tokens, note)
        _, stopped = group.agree(0, record is not None and not record.complete)
    return steps, stopped


def _accepted(record: Record | None, step: int, loss: Tensor, norm: Tensor, group: Group) -> bool:
    """Whether the weights follow this batch. The first rank judges it by the steps before, and waits for the device."""
    with group.steps(expected=False):
        judged = 1 if record is None else int(record.accepts(step, loss, norm))
    return bool(group.share(judged))


def _measure(measurements: Measurements, step: int, steps: int, record: Record | None) -> None:
    """Validate and sample on all ranks where this is due after a step and not done before an interruption."""
    if not (due := measurements.due(step, steps)):
        return
    with _kept_where_lost(record, step):
        wanted = measurements.group.share("" if record is None else " ".join(record.missing(step, due)))
        for kind in due:
            if kind in wanted.split():
                found = measurements.measure(kind)
                if record is not None:
                    record.measured(step, kind, found)
                if found is None:
                    return


@contextmanager
def _kept_where_lost(record: Record | None, done: int) -> Iterator[None]:
    """Where another rank is lost while the block runs, the first rank saves a checkpoint of the steps done."""
    try:
        yield
    except PeerLostError:
        if record is not None:
            record.keep(done)
        raise


def _agreed(batch: Batch | None, group: Group, record: Record | None, done: int) -> tuple[int, bool]:
    """The supervised tokens of a batch over all ranks, and whether a rank must stop before this step."""
    with _kept_where_lost(record, done):
        return group.agree(0 if batch is None else supervised_tokens(batch), preemption.requested)


def load(dataset: StreamingLanguageModelDataset, runtime: Runtime, device: torch.device) -> "DataLoader[Batch]":
    """A DataLoader over a dataset's batches, with the runtime's number of worker processes."""
    workers = runtime.loader_workers
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        multiprocessing_context="forkserver" if workers else None,  # a fork copies the locks of other threads
        worker_init_fn=ignore_sigterm,
    )
