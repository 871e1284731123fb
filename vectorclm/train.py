"""The one training loop. Pretraining and instruction tuning differ in their starting weights and their labels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader

from vectorclm.bits_per_byte import windows_scores
from vectorclm.checkpoint import Checkpoints, restore, snapshot
from vectorclm.dataset import Batch, StreamingLanguageModelDataset
from vectorclm.distributed import ALONE, Group
from vectorclm.documents import Documents, has_flash
from vectorclm.errors import DataError
from vectorclm.loss import IGNORE_INDEX
from vectorclm.metrics import Metrics
from vectorclm.model import CausalLM
from vectorclm.muon import OptimizerConfig, ScheduleConfig, build_optimizers, schedule, set_learning_rates
from vectorclm.plan import CurriculumPlan
from vectorclm.progress import Progress
from vectorclm.runtime import Runtime
from vectorclm.settings import Settings
from vectorclm.shard_reader import ShardReader

LossFunction = Callable[[Tensor, Tensor, Documents | None], Tensor]  # input_ids, labels, documents
FLUSH_STEPS = 10  # metrics are read back from the device this many steps at a time
RANK_SEED = 0x9E3779B1  # parts the ranks' seeds in their low 32 bits, which are all that the CPU's generator takes


class SamplesConfig(Settings):
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
    samples: SamplesConfig | None = Field(
        None, exclude_if=lambda samples: samples is None, description="What it says meanwhile; left out, nothing"
    )


@dataclass(frozen=True)
class Work:
    """Where a run leaves its traces."""

    stage: str
    folder: Path  # metrics.jsonl and samples.jsonl grow here
    checkpoints: Checkpoints
    runtime: Runtime
    group: Group = ALONE
    respond: Callable[[CausalLM, str, int], str] | None = None  # to a prompt, in so many tokens at the most

    def samples(self, model: CausalLM, asked: SamplesConfig) -> list[dict[str, str]]:
        """The likeliest answer to each prompt."""
        assert self.respond is not None
        return [
            {"prompt": prompt, "answer": self.respond(model, prompt, asked.max_new_tokens)} for prompt in asked.prompts
        ]


def own_share(
    readers: Mapping[str, ShardReader], plan: CurriculumPlan, config: TrainConfig, group: Group
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
    work: Work,
) -> dict[str, Any]:
    """Train `model` in place over the whole `dataset`, from the newest checkpoint if there is one.

    Returns steps, tokens, losses and scores; on ranks other than the first, which alone measures and writes, nothing.
    Raises DivergedError, naming the step's windows, where the loss leaves the finite numbers or all it had learned; the
    checkpoints before it stay. Raises DataError where the checkpoint is of another data set or training order.
    """
    group = work.group
    device = work.runtime.configure_torch(group)
    model.to(device)
    optimizers = build_optimizers(model, config.optimizer, group)
    set_learning_rates(optimizers, 1.0)
    metrics = Metrics(work.folder / "metrics.jsonl", dataset.describe)
    order = dataset.plan.digest(config.batch_size)
    saved = work.checkpoints.latest(order) if group.rank == 0 else None
    if (name := group.share(work.checkpoints.resumed)) is not None:
        saved = saved or work.checkpoints.named(name)
        restore(saved, model, optimizers)
        dataset.start_step = saved.step
    if group.rank == 0:
        metrics.restart(saved.metrics if saved is not None else "")
        if config.samples is not None and saved is None:
            metrics.write({"step": 0, "tokens": 0, "samples": work.samples(model, config.samples)})
    steps, start = dataset.steps, dataset.start_step
    interval = work.runtime.checkpoint_interval or max(25, min(1000, steps // 20))
    window_tokens = dataset.window_tokens
    workers = work.runtime.loader_workers
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        multiprocessing_context="forkserver" if workers else None,  # a fork would copy the locks of other threads
    )
    micro_batch = work.runtime.windows_at_once(window_tokens, device)
    loss_of = loss_function(model, device)
    scores: dict[str, dict[str, float]] = {}
    with Progress(work.stage, steps * config.batch_size * window_tokens, "tokens") as progress:
        for step, batch in enumerate(loader, start):
            # Dropout is a function of step and rank, so nothing needs saving.
            torch.manual_seed(seed * 1_000_003 + step + group.rank * RANK_SEED)
            factor = schedule(config.schedule, step, steps)
            set_learning_rates(optimizers, factor)
            loss, norm = train_step(
                model, optimizers, batch, config.gradient_clipping, micro_batch, device, group, loss_of
            )
            if group.rank:
                continue
            tokens = (step + 1) * config.batch_size * window_tokens
            metrics.add(step + 1, tokens, loss, norm, factor * config.optimizer.learning_rate)
            last = step + 1 == steps
            if (step + 1) % FLUSH_STEPS == 0 or last:
                metrics.flush()
            if (step + 1) % config.validation_interval == 0 or last:
                scores = windows_scores(
                    model,
                    validation,
                    token_lengths,
                    config.validation_windows,
                    micro_batch,
                    device,
                    config.document_mask,
                )
                metrics.write({"step": step + 1, "tokens": tokens, "validation": scores})
            if (asked := config.samples) is not None and ((step + 1) % asked.interval == 0 or last):
                metrics.write({"step": step + 1, "tokens": tokens, "samples": work.samples(model, asked)})
            if (step + 1) % interval == 0 and not last:
                metrics.flush()
                if not metrics.stray:
                    work.checkpoints.save(snapshot(step + 1, model, optimizers, metrics.text(), order))
            progress.at(tokens, metrics.note)
    if group.rank:
        return {}
    return {
        "steps": steps,
        "tokens": steps * config.batch_size * window_tokens,
        **metrics.summary(),
        "validation": scores,
    }


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
    model.train()
    loss_of = loss_of or model.loss
    supervised = group.total(int((batch.labels[:, 1:] != IGNORE_INDEX).sum()))
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
