"""Simulate a training on 1 to 4,096 ranks: count what each rank reads, computes and fetches, and what failures cost.

Rows, blocks and groups come from the classes of the training itself: `TrainingOrder`, `own_rows`, `Prefetcher`.
Nothing is trained and no block is read.
"""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vectorclm.config import ExperimentConfig
from vectorclm.dataset import Prefetcher, own_rows, steps_together
from vectorclm.model_config import ModelConfig
from vectorclm.planner.hardware import Cluster, Device, Network
from vectorclm.planner.plan import DEVICE_HOURS_BETWEEN_FAILURES, STORE_BYTES, plan_training
from vectorclm.planner.traffic import muon_matrices, muon_share
from vectorclm.runtime.devices import Runtime
from vectorclm.shards.block_readers import MmapBlockReader
from vectorclm.shards.order import BlockGroup, TrainingOrder
from vectorclm.shards.reader import ShardReader
from vectorclm.shards.writer import token_dtype
from vectorclm.train_tokenizer import usual_bytes_per_token

RANKS = tuple(2**power for power in range(13))  # 1 to 4,096
FAILURES = 200  # that are drawn for each number of ranks
COUNTED_WINDOWS = 4_000_000  # of a longer training, the first are counted and stand for all
RESTART_SECONDS = 30.0  # from the end of a rank to the first step of the next attempt, without what it fetches
MOST_SECONDS_TO_RESUME, MOST_LOST = 60.0, 0.05


class CountingReader(ShardReader):
    """Counts the windows that a rank's prefetcher asks for, and reads none."""

    def __init__(self) -> None:
        super().__init__([], MmapBlockReader())
        self.windows = 0

    def prefetch(self, place: int, windows: Iterable[range]) -> None:
        """Count some blocks, which are needed from position `place` on."""
        self.windows += sum(map(len, windows))
        self.held.append((place, {}))


class SharedGroups:
    """The groups of an order from one position on, computed once for all ranks that resume there."""

    def __init__(self, order: TrainingOrder, place: int) -> None:
        self.order, self.found = order, list[BlockGroup]()
        self.rest = order.groups(place)

    def groups(self, place: int = 0) -> Iterator[BlockGroup]:
        """The groups from the position given at the start."""
        for number in itertools.count():
            if number == len(self.found):
                following = next(self.rest, None)
                if following is None:
                    return
                self.found.append(following)
            yield self.found[number]

    def block_windows(self, source: int, block: int) -> range:
        """The windows of a source in one of its blocks."""
        return self.order.block_windows(source, block)


@dataclass(frozen=True)
class Counts:
    """What was counted for one number of ranks."""

    ranks: int
    most_windows: int  # of a rank in a step
    idle_ranks: int
    waiting: float  # share of the ranks' time that waits for the rank with the most windows
    muon_waiting: float  # share of the ranks' time in Newton-Schulz that waits for the rank with the most matrices
    step_seconds: float
    read_bytes_per_second: float  # of the store
    fetched_bytes: int  # of the store in the whole training, by all nodes
    used_bytes: int  # of them, bytes that are trained on
    resume_bytes: int  # of the store before the first step of an attempt, by all nodes
    lost: float  # share of the time that interruptions cost


# Whether a limit breaks: by the counts, and by the bytes a second that the store gives.
LIMITS: Mapping[str, Callable[[Counts, float], bool]] = {
    "a rank without windows": lambda counts, store: counts.idle_ranks > 0,
    "half of Newton-Schulz is waiting": lambda counts, store: counts.muon_waiting >= 0.5,
    "reading at the store's rate": lambda counts, store: counts.read_bytes_per_second > store,
    "a minute of fetching at a resume": lambda counts, store: counts.resume_bytes / store > MOST_SECONDS_TO_RESUME,
    "5 % of the time lost to interruptions": lambda counts, store: counts.lost > MOST_LOST,
}


class Simulation:
    """An experiment's pretraining on any number of ranks.

    Up to `per_node` ranks are one node, and more are whole nodes. The sources are as large as the sample is expected to
    make them.
    """

    def __init__(self, experiment: ExperimentConfig, device: Device, per_node: int, network: Network) -> None:
        self.experiment, self.device, self.per_node, self.network = experiment, device, per_node, network
        config, length, vocabulary = experiment.pretrain, experiment.shards.sequence_length, experiment.model.vocab_size
        itemsize = token_dtype(vocabulary).itemsize
        per_token = usual_bytes_per_token(vocabulary)
        weights = {source.label: source.weight for source in experiment.sample.sources}
        windows = experiment.sample.bytes / per_token / length / sum(weights.values())
        sizes = {label: max(1, round(windows * weight)) for label, weight in weights.items()}
        self.order = config.order(weights, sizes, length, itemsize, experiment.seed)
        self.window_bytes, self.batch = itemsize * length, config.batch_size
        self.resumed_step = self.order.windows // self.batch // 2
        self.shared = SharedGroups(self.order, self.resumed_step * self.batch)
        self.fetched = self._fetched_by_one()
        self.counted: dict[int, Counts] = {}

    def _fetched_by_one(self) -> int:
        """Bytes that one reader fetches in the whole training: every block of every group."""
        counted = min(self.order.windows, COUNTED_WINDOWS)
        windows = 0
        for group in self.order.groups():
            if group.place >= counted:
                break
            windows += sum(len(self.order.block_windows(group.source, int(block))) for block in group.blocks)
        return round(windows * self.window_bytes * self.order.windows / counted)

    def at(self, ranks: int) -> Counts:
        """The counts for a number of ranks."""
        if ranks not in self.counted:
            self.counted[ranks] = self._count(ranks)
        return self.counted[ranks]

    def _count(self, ranks: int) -> Counts:
        nodes, per_node = max(1, ranks // self.per_node), min(ranks, self.per_node)
        cluster = Cluster(self.device, nodes, per_node, self.network)
        plan = plan_training(self.experiment, cluster)
        own = [own_rows(self.batch, rank, ranks) for rank in range(ranks)]
        rows = [len(each) for each in own]
        of_nodes = [np.sort(np.concatenate(own[first : first + per_node])) for first in range(0, ranks, per_node)]
        reading = [each for each in of_nodes if len(each)]
        resumed = sum(map(self._windows_at_resume, reading))
        resume_bytes = resumed * self.window_bytes + plan.checkpoint  # which the first rank sends to the others
        sent = plan.checkpoint / self.network.bandwidth if nodes > 1 else 0.0
        restart = RESTART_SECONDS + resume_bytes / STORE_BYTES + sent
        return Counts(
            ranks,
            most_windows=max(rows),
            idle_ranks=rows.count(0),
            waiting=1 - sum(rows) / (ranks * max(rows)),
            muon_waiting=muon_waiting(self.experiment.model, cluster),
            step_seconds=plan.step.seconds,
            read_bytes_per_second=len(reading) * self.batch * self.window_bytes / plan.step.seconds,
            fetched_bytes=self.fetched * len(reading),
            used_bytes=self.order.windows // self.batch * self.batch * self.window_bytes,
            resume_bytes=resume_bytes,
            lost=interruption_loss(plan.step.seconds, plan.work.steps, ranks, restart),
        )

    def _windows_at_resume(self, own: NDArray[np.int64]) -> int:
        """Windows that a prefetcher fetches for some rows of each batch, on a resume at half of the training."""
        readers = [CountingReader() for _ in self.order.labels]
        ahead = Prefetcher(self.shared, readers, self.resumed_step * self.batch)
        steps = self.resumed_step + np.arange(steps_together(self.order.windows_per_block, self.batch))
        ahead.reach((steps[:, None] * self.batch + own).reshape(-1))
        return sum(reader.windows for reader in readers)

    def limits(self, store_bytes: float = STORE_BYTES) -> dict[str, int | None]:
        """The fewest ranks at which each limit breaks; None where it holds on 4,096. Steps are compared at RANKS."""
        times = [self.at(ranks).step_seconds for ranks in RANKS]
        slower = next(
            (ranks for ranks, (a, b) in zip(RANKS[1:], itertools.pairwise(times), strict=True) if b > a), None
        )
        found = {"a slower step than with half the ranks": slower}
        for name, broken in LIMITS.items():
            breaks = [number for number, ranks in enumerate(RANKS) if broken(self.at(ranks), store_bytes)]
            found[name] = self._first(broken, store_bytes, breaks[0]) if breaks else None
        return found

    def _first(self, broken: Callable[[Counts, float], bool], store_bytes: float, number: int) -> int:
        """The fewest ranks that break a limit, between two neighbours of RANKS."""
        last = RANKS[number]
        unit = self.per_node if last > self.per_node else 1
        candidates = range(RANKS[max(0, number - 1)] + unit, last + 1, unit)
        at = bisect_left(candidates, True, key=lambda ranks: broken(self.at(ranks), store_bytes))
        return candidates[at] if at < len(candidates) else last


def muon_waiting(model: ModelConfig, cluster: Cluster) -> float:
    """Share of the ranks' time in Newton-Schulz that waits for the rank with the most matrices."""
    done = spent = 0
    for (rows, columns), count in muon_matrices(model).items():
        one = rows * columns * min(rows, columns)
        done += one * count
        spent += one * muon_share(count, cluster) * cluster.per_node
    return 1 - done / spent


def interruption_loss(step_seconds: float, steps: int, ranks: int, restart_seconds: float, seed: int = 0) -> float:
    """Share of the time that interruptions cost: steps done again since the last checkpoint, and restarts.

    Failures are drawn with the mean time between those of Llama 3's training.
    """
    interval = Runtime().steps_between_checkpoints(steps)
    draws = np.random.default_rng(seed).exponential(3600 * DEVICE_HOURS_BETWEEN_FAILURES / ranks, FAILURES)
    done = spent = 0.0  # steps that stay, seconds
    for until in draws:
        reached = max(0.0, until - restart_seconds) / step_seconds
        done += reached // interval * interval
        spent += max(until, restart_seconds)
    return float(1 - done * step_seconds / spent)
