"""Deterministic shuffled training order: the window at position n is a pure function of (phases, seed, n).

Resuming takes the same time at position 10 and at position 10 billion, a checkpoint needs only a number, and ranks and
loader workers take their share of the same order. The order suits reads from an object store:

- A source's windows are cut into *blocks* of `windows_per_block`, about a mebibyte of tokens and one request each.
  Block b starts with window b x windows_per_block; the last block of a source may be short.
- An epoch of a source reads its blocks in a random order, in *groups* of GROUP_BLOCKS. Within a group, the windows of
  all blocks are shuffled. Groups of a source never overlap in time, so a reader that holds one group of each source
  in memory and prefetches the next one fetches every block once an epoch and uses all of it. The short block is
  always the last of an epoch.
- Sources are mixed in *mix blocks* of MIX_BLOCK windows, and shuffled within each. At the end of every mix block, each
  source is less than one window away from its exact share of the phase.

`TrainingOrder.groups(position)` returns the groups that a reader needs from a position on, in order.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vectorclm.errors import ConfigError
from vectorclm.settings import digest
from vectorclm.shards.config import MIX_BLOCK, WhenExhausted

ORDER = 2  # version of the order; increase it when new code changes the order of windows
BLOCK_BYTES = 2**20  # of tokens in a block
GROUP_BLOCKS = 16  # blocks whose windows are shuffled together
ROUNDS = np.array([[0], [16], [32], [48]], np.uint64)  # first bit of the key for each round
PATTERN, BLOCKS, WINDOWS = range(3)  # the purpose of a permutation, so that no two are the same


def windows_per_block(sequence_length: int, itemsize: int) -> int:
    """Windows of `sequence_length` tokens, `itemsize` bytes each, in a block; at least one."""
    return max(1, BLOCK_BYTES // (itemsize * sequence_length))


def format_epochs(epochs: Mapping[str, float]) -> str:
    """Format the epochs of each source: "fineweb-edu 1.00 epochs, cosmopedia 0.83"."""
    first, *others = (f"{label} {value:.2f}" for label, value in epochs.items())
    return ", ".join([f"{first} epochs", *others])


def mix64(x: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A keyed hash of 64-bit integers (the finalizer of splitmix64, Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + key * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key_of(*parts: int) -> NDArray[np.uint64]:
    """Derive a 64-bit key from integers."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mix64(np.array([part], np.uint64), key)
    return key


def permute(index: NDArray[np.int64], size: NDArray[np.int64] | int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Pseudorandom permutation of range(size), evaluated at each `index` without building the permutation.

    `size` (up to 2**32) and `key` are scalars, or one value for each index, to evaluate many permutations at once.
    Cycle walking over a four-round Feistel network on the next power of two (Black & Rogaway, "Ciphers with Arbitrary
    Finite Domains", CT-RSA 2002, method 2).
    """
    value, sizes = index.astype(np.uint32), np.broadcast_to(size, index.shape)
    bits = np.broadcast_to(np.frexp(np.subtract(size, 1))[1].astype(np.uint32), index.shape)  # of the largest value
    keys = np.broadcast_to((key >> ROUNDS).astype(np.uint32), (4, *index.shape))
    value = _feistel(value, bits, keys)
    outside = np.flatnonzero(value >= sizes)
    while len(outside):
        value[outside] = _feistel(value[outside], bits[outside], keys[:, outside])
        outside = outside[value[outside] >= sizes[outside]]
    return value.astype(np.int64)


def _feistel(value: NDArray[np.uint32], bits: NDArray[np.uint32], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Feistel permutation of `bits`-bit integers; for odd `bits`, the halves swap widths in each round.

    `keys` [4, n] are the round keys. A round uses the upper bits of a hash with the factors of MurmurHash3
    (Appleby, 2011): 32-bit products are several times as fast as those of mix64.
    """
    low: NDArray[np.uint32] = bits >> np.uint32(1)
    left: NDArray[np.uint32] = value >> low
    right: NDArray[np.uint32] = value ^ left << low
    drop, next_drop = np.uint32(32) - bits + low, np.uint32(32) - low
    for key in keys:
        x = (right ^ key) * np.uint32(0x85EBCA6B)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0xC2B2AE35)
        left, right = right, left ^ x >> drop
        drop, next_drop = next_drop, drop
    return left << low | right


class MixturePhase(NamedTuple):
    """A phase of training, in windows: its length, its mix, and what happens when a source is exhausted."""

    windows: int
    weights: Mapping[str, float]  # by source, each at least 1/MIX_BLOCK of the sum; other sources are not used
    when_exhausted: WhenExhausted = "repeat"


class BlockGroup(NamedTuple):
    """Blocks of one source whose windows are read and shuffled together."""

    source: int  # index into the order's labels
    epoch: int
    number: int  # within the epoch
    place: int  # position of the first window that needs the group, counted from the requested position on
    blocks: NDArray[np.int64]  # numbers of the blocks within the source, up to GROUP_BLOCKS


@dataclass(frozen=True)
class Segment:
    """A part of the order with a constant mix: a phase, or with "renormalise" the part until a source is exhausted."""

    first: int  # position of the first window
    windows: int
    shares: NDArray[np.float64]  # [sources], with sum 1
    used: NDArray[np.int64]  # [sources], windows read before the segment
    deficit: NDArray[np.float64]  # [sources], exact shares of all earlier segments minus `used`

    def counts(self, windows: int) -> NDArray[np.int64]:
        """Windows [sources] of each source among the first `windows` of this segment.

        Each count is the exact share rounded down, or up for the sources with the largest deficit. As a share is at
        least one window of a mix block, counts never decrease from one mix block to the next.
        """
        exact = self.shares * windows
        counts = np.floor(exact + 1e-9).astype(np.int64)
        fraction = exact - counts
        deficit = np.where(fraction > 1e-9, self.deficit + fraction, -np.inf)
        counts[np.argsort(-deficit, kind="stable")[: windows - counts.sum()]] += 1
        return counts


class TrainingOrder:
    """The source and window at each position of the training order.

    `phases` follow each other; `sizes` are the windows of each source. Counters continue across phases: a source
    repeats no window before all its windows were read, and each epoch has a new order. Raises ConfigError for a weight
    of an unknown source, for a weight that is too small, and for a source exhausted in a phase that forbids it.
    """

    def __init__(
        self, phases: Sequence[MixturePhase], sizes: Mapping[str, int], seed: int, *, windows_per_block: int
    ) -> None:
        self.phases = phases
        self.labels = sorted(sizes)
        self.sizes = [sizes[label] for label in self.labels]
        self.seed = seed
        self.windows_per_block = windows_per_block
        self._keys = [key_of(seed, purpose) for purpose in (PATTERN, BLOCKS, WINDOWS)]
        self.segments: list[Segment] = []
        self.windows = 0
        self._used, self._deficit = np.zeros(len(sizes), np.int64), np.zeros(len(sizes))
        for number, phase in enumerate(phases, 1):
            self._add_phase(f"phase {number}", phase)
        self._ends = np.array([segment.first + segment.windows for segment in self.segments])

    def _add_phase(self, name: str, phase: MixturePhase) -> None:
        """Add the segments of a phase: one, or with "renormalise" one for each mix of remaining sources."""
        sizes, weights = np.array(self.sizes), self._weights(name, phase)
        before, left = self._used, phase.windows
        while left:
            windows = left
            if phase.when_exhausted == "renormalise":  # until the next source runs out
                weights[self._used >= sizes] = 0
                if not weights.any():
                    raise ConfigError(
                        f"{name} takes {phase.windows:,} windows, but its sources have only {phase.windows - left:,} "
                        'left: sample more, shorten the phase, or set its when_exhausted to "repeat"'
                    )
                shares = weights / weights.sum()
                windows = min(left, int(((sizes - self._used)[weights > 0] / shares[weights > 0]).min()))
            self._add_segment(windows, weights / weights.sum())
            left -= windows
        if phase.when_exhausted == "stop":
            self._refuse_repeats(name, self._used - before, before)

    def _refuse_repeats(self, name: str, wanted: NDArray[np.int64], before: NDArray[np.int64]) -> None:
        """Raise ConfigError where a phase needs more windows of a source than are unread."""
        left = np.maximum(np.array(self.sizes) - before, 0)
        lines = [
            f"{wanted[s]:,} windows of {self.labels[s]}, which has {left[s]:,} left of {self.sizes[s]:,}"
            for s in np.flatnonzero(wanted > left)
        ]
        if lines:
            raise ConfigError(
                f"{name} takes {', and '.join(lines)}: sample more of it, give it less weight, shorten the phase, or "
                'set its when_exhausted to "repeat" or "renormalise"'
            )

    def _weights(self, name: str, phase: MixturePhase) -> NDArray[np.float64]:
        """The phase's weight of each source. Raises ConfigError for invalid weights."""
        if unknown := set(phase.weights) - set(self.labels):
            raise ConfigError(
                f"{name} weighs {', '.join(sorted(unknown))}, but the sources are {', '.join(self.labels)}"
            )
        weights = np.array([phase.weights.get(label, 0.0) for label in self.labels])
        if lost := [self.labels[s] for s in np.flatnonzero((weights > 0) & (weights * MIX_BLOCK < weights.sum()))]:
            raise ConfigError(f"{name}: {', '.join(lost)} has less than 1/{MIX_BLOCK} of it: give it more, or 0")
        return weights

    def _add_segment(self, windows: int, shares: NDArray[np.float64]) -> None:
        segment = Segment(self.windows, windows, shares, self._used, self._deficit)
        counts = segment.counts(windows)
        self.segments.append(segment)
        self.windows += windows
        self._used, self._deficit = self._used + counts, self._deficit + shares * windows - counts

    def locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source (index into `labels`) and window (index within the source) at each of the positions `places`."""
        source, counter = self._read(places)
        epoch, index = np.divmod(counter, np.array(self.sizes)[source])
        return source, self._window(source, epoch, index)

    def blocks(self, source: int, epoch: int, group: int) -> NDArray[np.int64]:
        """Block numbers of a group, in reading order: up to GROUP_BLOCKS.

        All windows of these blocks are read in this group, and nowhere else in this epoch.
        """
        first = group * GROUP_BLOCKS
        order = np.arange(first, min(first + GROUP_BLOCKS, -(-self.sizes[source] // self.windows_per_block)))
        same = np.zeros(len(order), np.int64)
        return self._block(same + source, same + epoch, order)

    def block_windows(self, source: int, block: int) -> range:
        """The windows of a source in one of its blocks. A block may cross from one shard into the next."""
        first = block * self.windows_per_block
        return range(first, min(first + self.windows_per_block, self.sizes[source]))

    def groups(self, place: int = 0) -> Iterator[BlockGroup]:
        """All groups that positions from `place` on need, ordered by their first use, for prefetching.

        A group is no longer needed once the next group of its source is in use. Groups that are partly read at
        `place` come first, as whole groups. Groups are computed lazily.
        """
        in_group = GROUP_BLOCKS * self.windows_per_block
        sizes = np.array(self.sizes)
        in_epoch = -(-sizes // in_group)
        last = np.full(len(sizes), -1)  # number of each source's last group, counted over its epochs
        while place < self.windows:
            segment, end = (int(found[0]) for found in self._mix_blocks(np.array([place])))
            newest = self.segments[segment].used + self.segments[segment].counts(end - self.segments[segment].first) - 1
            if (newest // sizes * in_epoch + newest % sizes // in_group > last).any():  # usually, none is new
                source, counter = self._read(np.arange(place, end))
                epoch, index = np.divmod(counter, sizes[source])
                number = epoch * in_epoch[source] + index // in_group
                # One integer for each group, because numpy finds the first of each fast.
                _, first = np.unique(source << 40 | number, return_index=True)
                for at in np.sort(first):
                    s, e, g = int(source[at]), int(epoch[at]), int(index[at] // in_group)
                    if number[at] > last[s]:
                        last[s] = number[at]
                        yield BlockGroup(s, e, g, place + int(at), self.blocks(s, e, g))
            place = end

    def boundaries(self) -> NDArray[np.int64]:
        """The position after each mix block, where the mix is exact. Boundaries are at most MIX_BLOCK windows apart."""
        ends = [np.arange(s.first + s.windows, s.first, -MIX_BLOCK)[::-1] for s in self.segments]
        return np.concatenate(ends)

    def read_before(self, place: int) -> dict[str, int]:
        """Windows read of each source before position `place`, repetitions included."""
        counts = np.zeros(len(self.labels), np.int64)
        if place:
            number, end = (int(found[0]) for found in self._mix_blocks(np.array([place - 1])))
            segment = self.segments[number]
            start = max(segment.first, end - MIX_BLOCK)
            sources, _ = self._read(np.arange(start, place))
            counts = segment.used + segment.counts(start - segment.first)
            counts = counts + np.bincount(sources, minlength=len(self.labels))
        return {label: int(count) for label, count in zip(self.labels, counts, strict=True)}

    def epochs(self, place: int | None = None) -> dict[str, float]:
        """Epochs of each source that are read before position `place`, or in the whole order."""
        used = self.read_before(self.windows if place is None else place)
        return {label: used[label] / size for label, size in zip(self.labels, self.sizes, strict=True)}

    def digest(self, batch_size: int) -> str:
        """SHA-256 (hex) of everything that decides which windows form a step of `batch_size`."""
        phases: list[Any] = [[phase.windows, dict(phase.weights), phase.when_exhausted] for phase in self.phases]
        sizes = dict(zip(self.labels, self.sizes, strict=True))
        rest = {"seed": self.seed, "windows_per_block": self.windows_per_block, "batch_size": batch_size}
        return digest({"order": ORDER, "phases": phases, "sizes": sizes, **rest})

    def _mix_blocks(self, places: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Segment index of each of `places`, and the position after its mix block.

        The first mix block of a segment is the short one: with a short last one, a source's count could be negative.
        """
        number = np.searchsorted(self._ends, places, side="right")
        return number, places + (self._ends[number] - places - 1) % MIX_BLOCK + 1

    def _read(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source at each position, and the number of windows of this source read before it."""
        number, ends = self._mix_blocks(places)
        mixed, first, which = np.unique(ends, return_index=True, return_inverse=True)
        sources = np.empty((len(mixed), MIX_BLOCK), np.int64)
        counters = np.empty_like(sources)
        for row, (one, end) in enumerate(zip(number[first], mixed, strict=True)):
            self._mix(self.segments[one], int(end), sources[row], counters[row])
        within = MIX_BLOCK - (ends - places)
        return sources[which, within], counters[which, within]

    def _mix(self, segment: Segment, end: int, sources: NDArray[np.int64], counters: NDArray[np.int64]) -> None:
        """Write the mix block that ends at `end` to `sources` and `counters` [MIX_BLOCK]; a short one at their end."""
        size = min(end - segment.first, MIX_BLOCK)
        before = segment.counts(end - size - segment.first)
        counts = segment.counts(end - segment.first) - before
        order = permute(np.arange(size), size, self._key(PATTERN, end))
        mixed = np.repeat(np.arange(len(counts), dtype=np.int16), counts)[order]  # 16 bits, which sort fast
        sources[-size:] = mixed
        first = np.repeat(segment.used + before - np.cumsum(counts) + counts, counts)
        counters[-size:][np.argsort(mixed, kind="stable")] = first + np.arange(size)

    def _key(self, purpose: int, what: NDArray[np.int64] | int) -> NDArray[np.uint64]:
        return mix64(np.atleast_1d(what).astype(np.uint64), self._keys[purpose])

    def _window(
        self, source: NDArray[np.int64], epoch: NDArray[np.int64], index: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The window at position `index` of an epoch of a source."""
        in_group = GROUP_BLOCKS * self.windows_per_block
        group, place = np.divmod(index, in_group)
        size = np.minimum(np.array(self.sizes)[source] - group * in_group, in_group)
        place = permute(place, size, self._key(WINDOWS, source << 56 | epoch << 32 | group))
        turn, row = np.divmod(place, self.windows_per_block)
        return self._block(source, epoch, group * GROUP_BLOCKS + turn) * self.windows_per_block + row

    def _block(self, source: NDArray[np.int64], epoch: NDArray[np.int64], turn: NDArray[np.int64]) -> NDArray[np.int64]:
        """The block at position `turn` of an epoch of a source; the short block stays last."""
        whole = np.array(self.sizes)[source] // self.windows_per_block
        block, key = turn.copy(), self._key(BLOCKS, source << 32 | epoch)
        shuffled = turn < whole
        block[shuffled] = permute(turn[shuffled], whole[shuffled], key[shuffled])
        return block
