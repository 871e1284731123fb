"""The curriculum as a stream: which windows make up step n is a pure function of (plan, seed, n).

So resuming costs the same at step 10 and at step 10 million, no state needs saving but the step, and ranks and
loader workers only take their share of the same global batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vectorclm.errors import ConfigError
from vectorclm.loss import IGNORE_INDEX
from vectorclm.shards import Windows

BLOCK = 1024  # windows over which the mix of a phase is exact


def mix64(x: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """A keyed hash of 64-bit integers (the finalizer of splitmix64, Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(key & 0xFFFFFFFFFFFFFFFF) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Where each of `index` (all below `size`) stands in a random order of range(size), without making that order.

    A four-round Feistel network over the next even power of two, walked until the value falls below `size`
    (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, method 2).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (mix64(right, key * 4 + turn) & mask)
        value[outside] = left << shift | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided by `weights` into whole numbers, the largest remainders rounded up."""
    exact = np.array(weights) / sum(weights) * total
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return [int(count) for count in counts]


@dataclass(frozen=True)
class Segment:
    """A phase of the plan: `windows` drawn by `weights`, from each source's counter on at `starts`."""

    first: int  # the global number of its first window
    windows: int
    pattern: NDArray[np.int64]  # source of each window in a block, in this phase's quotas
    starts: tuple[int, ...]


class CurriculumPlan:
    """Which window of which source stands at each place of the training order.

    `phases` are (windows, weight per source); `sizes` the windows that each source has. Counters go on across
    phases: a source repeats only once all its windows were used, and then in a new order.
    """

    def __init__(self, phases: Sequence[tuple[int, Mapping[str, float]]], sizes: Mapping[str, int], seed: int) -> None:
        self.labels = sorted(sizes)
        self.sizes = [sizes[label] for label in self.labels]
        self.seed = seed
        self.segments: list[Segment] = []
        first, counters = 0, [0] * len(self.labels)
        for number, (windows, weights) in enumerate(phases):
            unknown = set(weights) - set(sizes)
            if unknown:
                raise ConfigError(
                    f"phase {number + 1} weighs {', '.join(sorted(unknown))}, "
                    f"but the sources are {', '.join(self.labels)}"
                )
            counts = quotas([weights.get(label, 0.0) for label in self.labels], BLOCK)
            pattern = np.repeat(np.arange(len(self.labels)), counts)
            self.segments.append(Segment(first, windows, pattern, tuple(counters)))
            counters = self._used_after(number)
            first += windows
        self.windows = first
        self.used = dict(zip(self.labels, counters, strict=True))

    def epochs(self) -> dict[str, float]:
        """How often the whole plan reads each source."""
        return {label: self.used[label] / size for label, size in zip(self.labels, self.sizes, strict=True)}

    def locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source (index into `labels`) and window (index within the source) at each of `places`."""
        source, counter = np.empty_like(places), np.empty_like(places)
        number_of = np.searchsorted([segment.first for segment in self.segments], places, side="right") - 1
        local = places - np.array([segment.first for segment in self.segments])[number_of]
        for number, block in {(int(n), int(b)) for n, b in zip(number_of, local // BLOCK, strict=True)}:
            here = (number_of == number) & (local // BLOCK == block)
            sources, counters = self._block(number, block)
            source[here], counter[here] = sources[local[here] % BLOCK], counters[local[here] % BLOCK]
        window = np.empty_like(places)
        epoch = counter // np.array(self.sizes)[source]
        for s, e in {(int(s), int(e)) for s, e in zip(source, epoch, strict=True)}:
            here = (source == s) & (epoch == e)
            index = counter[here] % self.sizes[s]
            window[here] = permute(index, self.sizes[s], key=(self.seed * 1_000_003 + s) * 1_000_003 + e)
        return source, window

    def _block(self, number: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of each window in a block of a phase, and how many of that source came before it in the plan."""
        segment = self.segments[number]
        generator = np.random.Generator(np.random.Philox(key=[self.seed, number << 40 | block]))
        sources = segment.pattern[generator.permutation(BLOCK)]
        counters = np.empty_like(sources)
        for s, start in enumerate(segment.starts):
            places = np.flatnonzero(sources == s)
            counters[places] = start + len(places) * block + np.arange(len(places))
        return sources, counters

    def _used_after(self, number: int) -> list[int]:
        """How many windows of each source were used when a phase ends."""
        segment = self.segments[number]
        blocks, rest = divmod(segment.windows, BLOCK)
        part = np.bincount(self._block(number, blocks)[0][:rest], minlength=len(self.labels))
        whole = np.bincount(segment.pattern, minlength=len(self.labels)) * blocks
        return [int(count) for count in np.array(segment.starts) + whole + part]


class Batch(NamedTuple):
    """Windows of tokens, int64 [B, T] each; a label of -100 carries no loss."""

    input_ids: Tensor
    labels: Tensor


def collate(windows: Sequence[tuple[NDArray[Any], NDArray[Any] | None]]) -> Batch:
    """Rows [T] of token ids, each with its supervision or None, as a batch."""
    input_ids = torch.from_numpy(np.stack([ids for ids, _ in windows]).astype(np.int64))
    if windows[0][1] is None:
        return Batch(input_ids, input_ids)
    supervised = torch.from_numpy(np.stack([mask for _, mask in windows if mask is not None]))
    return Batch(input_ids, input_ids.where(supervised != 0, IGNORE_INDEX))


class StreamingLanguageModelDataset(IterableDataset[Batch]):
    """The batches of a plan, one for each step from `start_step` on.

    `shards[label]` are the shards of a source. Every rank gets the rows `rank::world_size` of the global batch;
    loader workers take turns by step, so their number changes nothing.
    """

    def __init__(
        self,
        shards: Mapping[str, Sequence[Windows]],
        plan: CurriculumPlan,
        batch_size: int,
        *,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.shards = shards
        self.plan = plan
        self.batch_size = batch_size
        self.start_step = start_step
        self.rank = rank
        self.world_size = world_size
        self.bounds = {
            label: np.cumsum([0, *(len(shard.input_ids) for shard in parts)]) for label, parts in shards.items()
        }

    @property
    def steps(self) -> int:
        """Steps in the whole plan; a last, partial batch is left out."""
        return self.plan.windows // self.batch_size

    @property
    def window_tokens(self) -> int:
        """Tokens in a window, T."""
        return int(self.shards[self.plan.labels[0]][0].input_ids.shape[1])

    def batch(self, step: int) -> Batch:
        """This rank's rows of a step."""
        places = np.arange(self.batch_size)[self.rank :: self.world_size] + step * self.batch_size
        sources, windows = self.plan.locate(places)
        return collate([self._row(self.plan.labels[s], int(w)) for s, w in zip(sources, windows, strict=True)])

    def _row(self, label: str, window: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
        number = int(np.searchsorted(self.bounds[label], window, side="right")) - 1
        shard, row = self.shards[label][number], window - self.bounds[label][number]
        return shard.input_ids[row], None if shard.supervised is None else shard.supervised[row]

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for step in range(self.start_step + first, self.steps, stride):
            yield self.batch(step)
