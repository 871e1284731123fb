"""The one training loop. Pretraining and instruction tuning differ in their starting weights and their labels."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader

from vectorclm.dataset import Batch, StreamingLanguageModelDataset
from vectorclm.errors import DataError, PreemptedError
from vectorclm.evaluation.bits_per_byte import HeldOutWindows, windows_scores
from vectorclm.model import CausalLM
from vectorclm.nn.attention import Documents, has_flash
from vectorclm.nn.loss import IGNORE_INDEX
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.distributed import ALONE, Group, PeerLostError
from vectorclm.runtime.preemption import FINISH, ignore_sigterm, preemption
from vectorclm.runtime.progress import Progress
from vectorclm.settings import Settings
from vectorclm.shards.order import TrainingOrder
from vectorclm.shards.reader import ShardReader
from vectorclm.training.checkpoint import Checkpoints, Snapshot, restore, snapshot
from vectorclm.training.metrics import Metrics
from vectorclm.training.muon import OptimizerConfig, ScheduleConfig, build_optimizers, schedule, set_learning_rates

LossFunction = Callable[[Tensor, Tensor, Documents | None], Tensor]  # input_ids, labels, documents
Scores = dict[str, dict[str, float]]
FLUSH_STEPS = 10  # metrics are read back from the device this many steps at a time
RANK_SEED = 0x9E3779B1  # parts the ranks' seeds in their low 32 bits, which are all that the CPU's generator takes


class GenerationSamplesConfig(Settings):
    """What a model in training says, every so often, to the same prompts."""

    prompts: list[str] = Field(min_length=1, description="Begun texts in pretraining, questions in tuning")
    interval: int = Field(gt=0, description="Steps between samples; there is one at the start and one at the end, too")
    max_new_tokens: int = Field(48, ge=1, description="Longest sample, in tokens")


class TrainConfig(Settings):
    """What the loop does with any data."""

    batch_size: int = Field(gt=0, description="Windows in one optimizer step, over all devices")
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    gradient_clipping: float = Field(1.0, gt=0, description="Largest norm of the whole gradient")
    validation_interval: int = Field(gt=0, description="Steps between validations")
    validation_windows: int = Field(64, gt=0, description="Held-out windows a source in each of them")
    document_mask: bool = Field(True, description="No attention from one document in a window to another")
    samples: GenerationSamplesConfig | None = Field(
        None, exclude_if=lambda samples: samples is None, description="What it says meanwhile; left out, nothing"
    )


@dataclass(frozen=True)
class TrainingRun:
    """Where a run leaves its traces."""

    stage: str
    folder: Path  # metrics.jsonl and samples.jsonl grow here
    checkpoints: Checkpoints
    runtime: Runtime
    group: Group = ALONE
    respond: Callable[[CausalLM, str, int], str] | None = None  # to a prompt, in so many tokens at the most

    def samples(self, model: CausalLM, asked: GenerationSamplesConfig) -> list[dict[str, str]]:
        """The likeliest answer to each prompt."""
        assert self.respond is not None
        return [
            {"prompt": prompt, "answer": self.respond(model, prompt, asked.max_new_tokens)} for prompt in asked.prompts
        ]


class Record:
    """What the first rank does beside the steps: it writes their figures, validates, samples and keeps checkpoints."""

    def __init__(
        self,
        model: CausalLM,
        optimizers: Sequence[torch.optim.Optimizer],
        config: TrainConfig,
        dataset: StreamingLanguageModelDataset,
        validate: Callable[[], Scores],
        work: TrainingRun,
    ) -> None:
        self.model, self.optimizers, self.config, self.work = model, optimizers, config, work
        self.validate = validate
        self.order = dataset.plan.digest(config.batch_size)
        self.steps, self.step_tokens = dataset.steps, config.batch_size * dataset.window_tokens
        self.interval = work.runtime.checkpoint_interval or max(25, min(1000, self.steps // 20))
        self.metrics = Metrics(work.folder / "metrics.jsonl", dataset.describe)
        self.scores: Scores = {}
        self.complete = True  # whether nothing is left to do for the last step
        self._kept = 0  # the step of the newest checkpoint
        self._seen: dict[str, int] = {}  # the last step that was validated, and that had samples

    def begin(self, saved: Snapshot | None) -> None:
        """Go on from a checkpoint, or start; what is left to do for its last step is done."""
        self.metrics.restart(saved.metrics if saved is not None else "")
        for line in map(json.loads, saved.metrics.splitlines() if saved is not None else ()):
            self.scores = line.get("validation", self.scores)
            self._seen |= {kind: line["step"] for kind in ("validation", "samples") if kind in line}
        self._kept = saved.step if saved is not None else 0
        self._look(self._kept)

    def add(self, step: int, loss: Tensor, norm: Tensor, learning_rate: float) -> str:
        """A step is done; what a progress bar says of it."""
        last = step == self.steps
        self.metrics.add(step, step * self.step_tokens, loss, norm, learning_rate)
        if step % FLUSH_STEPS == 0 or last:
            self.metrics.flush()
        self._look(step)
        if step % self.interval == 0 and not last and self.complete:
            self.keep(step)
        return self.metrics.note

    def _look(self, step: int) -> None:
        """Validate and sample where a step asks for it and has it not; given up where SIGTERM comes."""
        last, asked = step == self.steps, self.config.samples
        work: dict[str, Callable[[], Any]] = {}
        if step and (step % self.config.validation_interval == 0 or last):
            work["validation"] = self.validate
        if asked is not None and (step % asked.interval == 0 or last):
            work["samples"] = partial(self.work.samples, self.model, asked)
        self.complete = True
        for kind, measure in work.items():
            if self._seen.get(kind) == step:
                continue
            self.metrics.flush()  # so that lines come in the order of the steps, wherever a training is interrupted
            if (found := preemption.unless_requested(measure)) is None:
                self.complete = False
                return
            self.metrics.write({"step": step, "tokens": step * self.step_tokens, kind: found})
            self._seen[kind] = step
            self.scores = found if kind == "validation" else self.scores

    def keep(self, step: int) -> None:
        """Have a checkpoint of the steps done, but for one that is there, or where the loss has gone astray."""
        self.metrics.flush()
        if step > self._kept and not self.metrics.is_diverging:
            saved = snapshot(step, self.model, self.optimizers, self.metrics.text(), self.order)
            self.work.checkpoints.save(saved)
            self._kept = step

    def stop(self, step: int) -> str:
        """Keep a checkpoint, which is in the store when this returns; what is to be said of it."""
        self.keep(step)
        self.work.checkpoints.wait()
        said = f"interrupted by SIGTERM after step {step} of {self.steps}, checkpoint at step {self._kept}"
        return f"{said}: run the same again, and it goes on from there"

    def summary(self) -> dict[str, Any]:
        """Losses, speed, and the last scores."""
        return {**self.metrics.summary(), "validation": self.scores}


def own_share(
    readers: Mapping[str, ShardReader], plan: TrainingOrder, config: TrainConfig, group: Group
) -> StreamingLanguageModelDataset:
    """This rank's rows of every batch of the plan."""
    return StreamingLanguageModelDataset(
        readers,
        plan,
        config.batch_size,
        rank=group.rank,
        world_size=group.world_size,
        document_mask=config.document_mask,
    )


def train(
    model: CausalLM,
    config: TrainConfig,
    dataset: StreamingLanguageModelDataset,
    validation: Mapping[str, ShardReader],
    token_lengths: Sequence[int],
    seed: int,
    work: TrainingRun,
) -> dict[str, Any]:
    """Train `model` in place over the whole `dataset`, from the newest checkpoint if there is one.

    Returns steps, tokens, losses and scores; on ranks other than the first, which alone measures and writes, nothing.
    Raises DivergedError, naming the step's windows, where the loss leaves the finite numbers or all it had learned; the
    checkpoints before it stay. Raises DataError where the checkpoint is of another data set or training order, and
    PreemptedError on all ranks alike, after a checkpoint, where SIGTERM came to one of them.
    """
    group = work.group
    device = work.runtime.configure_torch(group)
    model.to(device)
    optimizers = build_optimizers(model, config.optimizer, group)
    set_learning_rates(optimizers, 1.0)
    order = dataset.plan.digest(config.batch_size)
    saved = work.checkpoints.latest(order) if group.rank == 0 else None
    if (name := group.share(work.checkpoints.resumed)) is not None:
        saved = saved or work.checkpoints.named(name)
        restore(saved, model, optimizers)
        dataset.start_step = saved.step
    steps, start = dataset.steps, dataset.start_step
    window_tokens = dataset.window_tokens
    micro_batch = work.runtime.windows_at_once(window_tokens, device)
    loss_of = loss_function(model, device)
    preemption.begin_training()
    record = None
    if group.rank == 0:

        def validate() -> Scores:
            held_out = HeldOutWindows(validation, token_lengths, config.document_mask)
            return windows_scores(model, held_out, micro_batch, config.validation_windows)

        record = Record(model, optimizers, config, dataset, validate, work)
        record.begin(saved)
    batches = iter(load(dataset, work.runtime, device))
    stopped = False
    with Progress(work.stage, steps * config.batch_size * window_tokens, "tokens") as progress:
        for done in range(start, steps):
            batch = preemption.unless_requested(partial(next, batches))
            supervised, stopped = _agreed(batch, group, record, done)
            if stopped or batch is None:
                break
            # Dropout is a function of step and rank, so nothing needs saving.
            torch.manual_seed(seed * 1_000_003 + done + group.rank * RANK_SEED)
            factor = schedule(config.schedule, done, steps)
            set_learning_rates(optimizers, factor)
            compute = partial(accumulate, model, batch, supervised, micro_batch, device, loss_of)
            # Ranks have agreed on this step; a process alone may give it up, as nothing has changed before its end.
            total = compute() if group.world_size > 1 else preemption.unless_requested(compute)
            if stopped := total is None:
                break
            loss, norm = update(model, optimizers, total, config.gradient_clipping, group)
            if record is not None:
                note = record.add(done + 1, loss, norm, factor * config.optimizer.learning_rate)
                progress.at((done + 1) * config.batch_size * window_tokens, note)
        else:
            done = steps
            _, stopped = group.agree(0, record is not None and not record.complete)
    preemption.limit(FINISH)
    if stopped:
        raise PreemptedError(group.share(record.stop(done) if record is not None else ""))
    if record is None:
        return {}
    return {"steps": steps, "tokens": steps * config.batch_size * window_tokens, **record.summary()}


def _agreed(batch: Batch | None, group: Group, record: "Record | None", done: int) -> tuple[int, bool]:
    """The supervised tokens of a batch over all ranks, and whether one of these is asked to stop before its step.

    Where another rank is gone the first keeps what was done before.
    """
    try:
        return group.agree(0 if batch is None else supervised_tokens(batch), preemption.requested)
    except PeerLostError:
        if record is not None:
            record.keep(done)
        raise


def load(dataset: StreamingLanguageModelDataset, runtime: Runtime, device: torch.device) -> "DataLoader[Batch]":
    """The batches of a dataset, read ahead by as many processes as the runtime says."""
    workers = runtime.loader_workers
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        multiprocessing_context="forkserver" if workers else None,  # a fork would copy the locks of other threads
        worker_init_fn=ignore_sigterm,
    )


def loss_function(model: CausalLM, device: torch.device) -> LossFunction:
    """The model's loss, on a GPU compiled: whole, where no attention has to be made document by document.

    Environment variable TORCHDYNAMO_DISABLE=1 leaves it as it is.
    """
    if device.type != "cuda":
        return model.loss
    whole = has_flash(device) and not model.config.attention_dropout
    # The compiler, too, then chooses no kernel by timing it, as that can change from one process to the next.
    fixed = torch.are_deterministic_algorithms_enabled()
    compiled: LossFunction = torch.compile(model.loss, fullgraph=whole, options={"deterministic": fixed})
    return compiled


def train_step(
    model: CausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Batch,
    gradient_clipping: float,
    micro_batch: int,
    device: torch.device,
    group: Group = ALONE,
    loss_of: LossFunction | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over a batch, a few windows at a time; mean loss (nats a supervised token), gradient norm.

    The loss is the mean over the whole batch's supervised tokens, however they fall into ranks and micro-batches.
    `loss_of` is the model's loss, as it is or compiled. Nothing here waits for the device. Raises DataError for a batch
    with nothing supervised.
    """
    supervised = group.total(supervised_tokens(batch))
    total = accumulate(model, batch, supervised, micro_batch, device, loss_of or model.loss)
    return update(model, optimizers, total, gradient_clipping, group)


def supervised_tokens(batch: Batch) -> int:
    """The tokens of a batch that carry loss."""
    return int((batch.labels[:, 1:] != IGNORE_INDEX).sum())


def accumulate(
    model: CausalLM,
    batch: Batch,
    supervised: int,
    micro_batch: int,
    device: torch.device,
    loss_of: LossFunction,
) -> Tensor:
    """Add up the gradients of a batch, and its loss, each divided by the supervised tokens of all ranks.

    Raises DataError where these are none.
    """
    model.train()
    if not supervised:
        raise DataError("a batch has no supervised token: its labels are all -100, so there is nothing to learn from")
    total = torch.zeros((), device=device)
    for start in range(0, len(batch.input_ids), micro_batch):
        here = slice(start, start + micro_batch)
        input_ids = batch.input_ids[here].to(device, non_blocking=True)
        labels = batch.labels[here].to(device, non_blocking=True)
        documents = Documents.at(None if batch.position_ids is None else batch.position_ids[here], device)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(input_ids, labels, documents) / supervised
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def update(
    model: CausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    total: Tensor,
    gradient_clipping: float,
    group: Group,
) -> tuple[Tensor, Tensor]:
    """Change the weights by the gradients of all ranks; the loss over these, and the gradient's norm."""
    if group.world_size > 1:
        group.add([total, *_gradients(model)])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clipping)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm


def _gradients(model: CausalLM) -> Iterator[Tensor]:
    """Every parameter's gradient; zeros where a rank had no rows."""
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        yield p.grad
