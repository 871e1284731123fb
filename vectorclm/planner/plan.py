"""What a training costs on a cluster: time, money, traffic of the store, memory, checkpoints, and what limits it."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vectorclm.config import ExperimentConfig
from vectorclm.memory_plan import USABLE, DeviceType, TrainingShape, checkpoint_bytes
from vectorclm.model_config import ModelConfig
from vectorclm.planner.hardware import SLOW_WIRE, Cluster, Device, network
from vectorclm.planner.step import StepTime, Workload, beside_seconds, step_time
from vectorclm.shards.order import BLOCK_BYTES
from vectorclm.shards.writer import token_dtype
from vectorclm.train_config import TrainConfig, TrainingWork
from vectorclm.train_tokenizer import usual_bytes_per_token

# Unexpected interruptions of Llama 3's training: 419 in 54 days on 16,384 GPUs (arXiv 2407.21783).
DEVICE_HOURS_BETWEEN_FAILURES = 54 * 24 * 16_384 / 419
COPIED_BYTES = 6e9  # a second, of a snapshot from a device to memory that is not pinned
WRITTEN_BYTES = 0.2e9  # a second, of a checkpoint to the store, with its hashes (two CPU cores)
STORE_BYTES = 5_500 * BLOCK_BYTES  # a second: S3 answers 5,500 GETs a second and prefix (its user guide), one a block


@dataclass(frozen=True)
class Prices:
    """What is paid, and what the store gives."""

    device_hour: float | None = None
    store_bytes: float = STORE_BYTES  # a second, to all nodes together


@dataclass(frozen=True)
class TrainingPlan:
    """An experiment's pretraining on a cluster."""

    cluster: Cluster
    work: Workload
    step: StepTime
    validation_seconds: float  # of all validations
    sample_seconds: float  # of all samples
    efficiency: float  # speed over that of so many devices without exchange
    store_bytes: float  # a second, of all nodes: the ranks of one share what they read
    checkpoint: int  # bytes
    checkpoint_seconds: float  # between two checkpoints
    warnings: tuple[str, ...]
    cost: float | None

    @property
    def hours(self) -> float:
        """Of all steps, validations and samples."""
        return (self.step.seconds * self.work.steps + self.validation_seconds + self.sample_seconds) / 3600

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster."""
        return self.work.step_tokens / self.step.seconds

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two checkpoints."""
        return max(1, round(self.checkpoint_seconds / self.step.seconds))

    def as_json(self) -> dict[str, Any]:
        """All figures, in seconds, bytes and hours."""
        step, plan = self.step, self.step.plan
        return {
            "device": self.cluster.device.name,
            "nodes": self.cluster.nodes,
            "ranks": self.cluster.ranks,
            "step": {
                "seconds": step.seconds,
                "compute": step.compute,
                "gradients": step.gradients,
                "muon": step.muon,
            },
            "sent_bytes": {
                "gradients": step.gradient_exchange.sent,
                "muon": step.muon_exchange.sent,
            },
            "steps": self.work.steps,
            "validation_seconds": self.validation_seconds,
            "sample_seconds": self.sample_seconds,
            "tokens_per_second": self.tokens_per_second,
            "efficiency": self.efficiency,
            "hours": self.hours,
            "device_hours": self.hours * self.cluster.ranks,
            "cost": self.cost,
            "store_bytes_per_second": self.store_bytes,
            "memory": {**asdict(plan), "bytes": plan.bytes, "device": self.cluster.device.memory},
            "checkpoint_bytes": self.checkpoint,
            "checkpoint_interval": {"seconds": self.checkpoint_seconds, "steps": self.checkpoint_steps},
            "warnings": list(self.warnings),
        }


def workload(
    model: ModelConfig, config: TrainConfig, length: int, training: TrainingWork, kind: DeviceType
) -> Workload:
    """A training of windows of `length` tokens, as the planner sees it on devices of a kind."""
    shape = TrainingShape(model, length, kind, config.document_mask, config.optimizer.matrices)
    prompts = 1 if config.samples is None else len(config.samples.prompts)
    return Workload(
        shape,
        config.batch_size,
        training.steps,
        token_dtype(model.vocab_size).itemsize,
        training.validation_tokens,
        training.sample_tokens,
        prompts,
    )


def pretraining(experiment: ExperimentConfig) -> TrainingWork:
    """What an experiment's pretraining computes where the sample is as large as it may be."""
    return experiment.pretraining_work(experiment.sample.bytes / usual_bytes_per_token(experiment.model.vocab_size))


def hours_alone(device: Device, work: Workload) -> float:
    """Hours of a training on one device."""
    cluster = Cluster(device, 1, 1, network(SLOW_WIRE))
    return (step_time(work, cluster).seconds * work.steps + sum(beside_seconds(work, cluster))) / 3600


def plan_training(experiment: ExperimentConfig, cluster: Cluster, prices: Prices = Prices()) -> TrainingPlan:
    """Plan an experiment's pretraining on a cluster."""
    kind, length = cluster.device.kind, experiment.shards.sequence_length
    work = workload(experiment.model, experiment.pretrain, length, pretraining(experiment), kind)
    step = step_time(work, cluster)
    alone = step_time(work, Cluster(cluster.device, 1, 1, cluster.network))
    read = min(cluster.nodes, work.batch_size) * work.token_bytes * work.step_tokens / step.seconds
    validation, samples = beside_seconds(work, cluster)
    hours = (step.seconds * work.steps + validation + samples) / 3600
    size = checkpoint_bytes(work.shape)
    return TrainingPlan(
        cluster,
        work,
        step,
        validation,
        samples,
        alone.seconds / (cluster.ranks * step.seconds),
        read,
        size,
        max(checkpoint_interval(size / COPIED_BYTES, cluster.ranks), size / WRITTEN_BYTES),
        tuple(_warnings(work, cluster, step, read, prices)),
        None if prices.device_hour is None else prices.device_hour * hours * cluster.ranks,
    )


def checkpoint_interval(cost: float, ranks: int) -> float:
    """The best seconds between checkpoints that stop the training for `cost` seconds (Daly, FGCS 2006, equation 37).

    The first term is Young's (CACM 1974): the root of twice the cost times the mean time between failures.
    """
    between = 3600 * DEVICE_HOURS_BETWEEN_FAILURES / ranks
    if cost >= 2 * between:
        return between
    share = math.sqrt(cost / (2 * between))
    return math.sqrt(2 * cost * between) * (1 + share / 3 + share**2 / 9) - cost


def fewer(cluster: Cluster) -> Iterator[Cluster]:
    """Smaller clusters of the same kind: half the nodes again and again, then half the devices of one node."""
    nodes, per_node = cluster.nodes, cluster.per_node
    while nodes * per_node > 1:
        nodes, per_node = (nodes // 2, per_node) if nodes > 1 else (1, per_node // 2)
        yield Cluster(cluster.device, nodes, per_node, cluster.network)


def _warnings(work: Workload, cluster: Cluster, step: StepTime, read: float, prices: Prices) -> Iterator[str]:
    """What is wrong with the cluster for this training, and what to do."""
    ranks, name = cluster.ranks, cluster.device.name
    times = {small.ranks: step_time(work, small).seconds for small in fewer(cluster)}
    best = min(times, key=lambda count: times[count], default=ranks)
    if best != ranks and times[best] <= step.seconds:
        yield (
            f"{best} ranks are faster: a step takes {1e3 * times[best]:,.1f} ms on {best} {name} and "
            f"{1e3 * step.seconds:,.1f} on {ranks}, because the exchange takes "
            f"{1e3 * (step.gradients + step.muon_exchange.seconds):,.1f}: "
            "take fewer nodes, a faster network, or a larger batch_size"
        )
    if ranks > work.batch_size:
        yield (
            f"{ranks - work.batch_size} of {ranks} ranks have nothing to do: a step has {work.batch_size} windows; "
            f"take at most {work.batch_size} ranks, or a larger batch_size"
        )
    if read > prices.store_bytes:
        yield (
            f"the nodes read {read / 1e6:,.0f} MB a second and the store gives {prices.store_bytes / 1e6:,.0f}: "
            "take fewer nodes, or a faster store"
        )
    room = USABLE[cluster.device.kind] * cluster.device.memory
    if step.plan.bytes > room:
        yield (
            f"a rank needs {step.plan.bytes / 1e9:,.1f} GB and a {name} has {room / 1e9:,.1f} to use: take a device "
            "with more memory, or a smaller model"
        )
