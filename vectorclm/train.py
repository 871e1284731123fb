"""The one training loop, and pretraining. Instruction tuning differs in its starting weights and its labels."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader

from vectorclm.artifact import Artifact
from vectorclm.checkpoint import Checkpoints, restore, snapshot
from vectorclm.dataset import Batch, StreamingLanguageModelDataset
from vectorclm.distributed import ALONE, Group
from vectorclm.documents import Documents, has_flash
from vectorclm.errors import ConfigError, DataError, DivergedError
from vectorclm.evaluate import windows_scores
from vectorclm.loss import IGNORE_INDEX
from vectorclm.model import CausalLM, ModelConfig
from vectorclm.muon import OptimizerConfig, ScheduleConfig, build_optimizers, schedule, set_learning_rates
from vectorclm.plan import MIX_BLOCK, CurriculumPlan, Stretch, WhenExhausted, in_words, windows_per_block
from vectorclm.progress import Progress
from vectorclm.runtime import Runtime
from vectorclm.settings import Settings
from vectorclm.shard_reader import ShardReader, open_shards

logger = logging.getLogger(__name__)

LossFunction = Callable[[Tensor, Tensor, Documents | None], Tensor]  # input_ids, labels, documents
FLUSH_STEPS = 10  # metrics are read back from the device this many steps at a time
SPIKE_STEPS, SPIKE = 50, 8.0  # a loss is judged by so many before it, and by so many of their deviations
DIVERGED_STEPS = 50  # without a way back
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


class Phase(Settings):
    """A stretch of the curriculum."""

    tokens: int = Field(gt=0, description="Token budget")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="Share of each source; left out, the sample's weights"
    )

    when_exhausted: WhenExhausted = Field(
        "repeat",
        description="Where a source runs out: stop before training, another epoch, or its share to the others",
    )

    @model_validator(mode="after")
    def _weights_count(self) -> Self:
        total = sum(self.weights.values())
        if self.weights and not total:
            raise ValueError("every weight of a phase is 0: one must be more")
        if lost := [label for label, weight in self.weights.items() if 0 < weight < total / MIX_BLOCK]:
            raise ValueError(f"{', '.join(lost)} has less than 1/{MIX_BLOCK} of the phase: give it more, or 0")
        return self


class PretrainConfig(TrainConfig):
    """The curriculum: phases in order, each with its budget and mix."""

    phases: list[Phase] = Field(min_length=1)
    zero_output_projections: bool = Field(
        False,
        exclude_if=lambda value: not value,  # so that older experiments keep their fingerprints
        description="What writes to the residual stream starts at zero, not small",
    )

    @property
    def tokens(self) -> int:
        """Tokens over all phases."""
        return sum(phase.tokens for phase in self.phases)

    def plan(
        self, sample_weights: Mapping[str, float], sizes: Mapping[str, int], length: int, itemsize: int, seed: int
    ) -> CurriculumPlan:
        """The training order over sources of these `sizes`, in windows of `length` tokens, `itemsize` bytes each.

        `sample_weights` is the mix of a phase that names none. Raises ConfigError where a source runs out in a phase
        that forbids it.
        """
        phases = [
            Stretch(phase.tokens // length, phase.weights or sample_weights, phase.when_exhausted)
            for phase in self.phases
        ]
        return CurriculumPlan(phases, sizes, seed, windows_per_block=windows_per_block(length, itemsize))


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
    if (done := group.share(saved.step if saved is not None else None)) is not None:
        saved = saved or work.checkpoints.at(done)
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
    micro_batch = work.runtime.micro_batch_size or max(1, (65_536 if device.type == "cuda" else 4_096) // window_tokens)
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
    compiled: LossFunction = torch.compile(model.loss, fullgraph=whole)
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
    def stray(self) -> bool:
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


def pretrain(
    model_config: ModelConfig,
    config: PretrainConfig,
    sample_weights: Mapping[str, float],
    shards: Artifact,
    token_lengths: Sequence[int],
    seed: int,
    work: Work,
) -> tuple[CausalLM, dict[str, Any]]:
    """Train a new model over the curriculum. `sample_weights` is the mix of a phase that names none.

    Raises ConfigError where the plan is shorter than one step, or a source runs out in a phase that forbids it.
    """
    cache = work.runtime.block_cache
    with (
        open_shards(shards, "train", cache=cache) as training,
        open_shards(shards, "validation", cache=cache) as validation,
    ):
        sizes = {label: len(reader) for label, reader in training.items()}
        any_source = next(iter(training.values()))
        plan = config.plan(sample_weights, sizes, any_source.sequence_length, any_source.token_bytes, seed)
        dataset = own_share(training, plan, config, work.group)
        if dataset.steps == 0:
            step = config.batch_size * any_source.sequence_length
            raise ConfigError(f"pretrain.phases hold {config.tokens} tokens, one step takes {step}: raise them")
        epochs = plan.epochs(dataset.steps * config.batch_size)
        logger.info("pretrain reads %s", in_words(epochs))
        torch.manual_seed(seed)
        model = CausalLM(model_config)
        if config.zero_output_projections:
            model.zero_output_projections()
        summary = train(model, config, dataset, validation, token_lengths, seed, work)
    rounded = {label: round(value, 3) for label, value in epochs.items()}
    read = {"epochs": rounded, "read": in_words(epochs)}
    return model, {**summary, **read, "parameters": model_config.parameters}
