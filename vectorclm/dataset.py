"""Streaming dataset for PyTorch: batches of token windows in a deterministic training order, resumable at any step.

The only state to save is the step. Ranks and loader workers take their share of the same global batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vectorclm.errors import DataError
from vectorclm.nn.loss import IGNORE_INDEX
from vectorclm.runtime.group import Group
from vectorclm.shards.order import BlockGroup, MixturePhase, TrainingOrder
from vectorclm.shards.reader import ShardReader, open_shards
from vectorclm.shards.writer import Windows
from vectorclm.store.artifact import Artifact, Store, default_store
from vectorclm.store.model_ref import expand_prefix
from vectorclm.tokenizer import BOS_ID, EOS_ID, PAD_ID


def position_ids(input_ids: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Position of each token [B, T] in its document, or in the part of the document in its window."""
    begins = input_ids == BOS_ID
    begins[:, 0] = True
    before, here = input_ids[:, :-1], input_ids[:, 1:]
    begins[:, 1:] |= (before == EOS_ID) | ((here == PAD_ID) & (before != PAD_ID))
    places = np.broadcast_to(np.arange(input_ids.shape[1], dtype=np.int32), input_ids.shape)
    return np.subtract(places, np.maximum.accumulate(places * begins, axis=1), dtype=np.int64)


def ignore_mask(input_ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Mask of the tokens in windows of text [B, T] that are never labels.

    These are padding, and the first token of the rest of a long document after another document's EOS, because
    nothing predicts it.
    """
    tokens, length = input_ids.reshape(-1), input_ids.shape[1]  # flat, because row-wise operations take twice as long
    found, other = np.empty((2, len(tokens)), np.bool_)
    np.equal(tokens[:-1], EOS_ID, out=found[1:])
    np.not_equal(tokens, BOS_ID, out=other)
    found &= other
    found[::length] = False  # the first token of a window has no predecessor
    np.equal(tokens, PAD_ID, out=other)
    found |= other
    return found.reshape(input_ids.shape)


def document_labels(input_ids: NDArray[np.integer[Any]], positions: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Labels [B, T] for windows of text, as in transformers; IGNORE_INDEX for tokens without loss.

    Tokens of `ignore_mask` carry no loss. With `positions` (documents masked from each other), neither does the first
    token of each document. Without, EOS predicts the next BOS, as in GPT.
    """
    ignored = ignore_mask(input_ids)
    if positions is not None:
        ignored |= positions == 0
    labels = input_ids.astype(np.int64)
    labels[ignored] = IGNORE_INDEX
    return labels


AHEAD = 2  # groups of each source prefetched beyond the one in use, so that requests overlap
TEXT = 2  # marks the tokens of a window of text among conversations, which gets labels as in pretraining
GATHERED_BLOCKS = 4  # blocks (or one step) whose windows are gathered at a time
# Tokens (or one step) converted to int64 at a time: few calls, and the memory stays in the cache.
WIDENED_TOKENS = 2**16


class Batch(NamedTuple):
    """Windows of tokens, int64 [B, T] each; a label of -100 carries no loss."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None  # 0 at the first token of each document; None without a document mask

    def parts(self, count: int) -> Iterator["Batch"]:
        """Split into `count` batches of equal size, which share memory with this batch."""
        return (Batch(*part) for part in zip(*(x.chunk(count) for x in self if x is not None), strict=True))


def to_batch(windows: Windows, document_mask: bool = False) -> Batch:
    """Convert windows [B, T] to a batch; with `document_mask` it has position ids that restart in each document."""
    input_ids = windows.input_ids.astype(np.int64)
    # From the shards' small integers, which is faster.
    positions = position_ids(windows.input_ids) if document_mask else None
    if windows.supervised is None:
        labels = document_labels(windows.input_ids, positions)
    else:
        labels = np.where(windows.supervised != 0, input_ids, IGNORE_INDEX)
        of_text = windows.supervised[:, 0] == TEXT
        labels[of_text] = document_labels(input_ids[of_text], None if positions is None else positions[of_text])
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        None if positions is None else torch.from_numpy(positions),
    )


def own_rows(batch_size: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """The rows of each global batch that a rank gets; none where there are more ranks than rows."""
    return np.arange(batch_size)[rank::world_size]


def steps_together(block_windows: int, batch_size: int, stride: int = 1) -> int:
    """Steps whose windows a loader worker gathers at a time, where it gets every `stride`-th step."""
    return max(1, GATHERED_BLOCKS * block_windows // (batch_size * stride))


class StreamingLanguageModelDataset(IterableDataset[Batch]):
    """Streams the batches of a training order, one for each step from `start_step` on.

    `readers[label]` has the windows of a source. Each rank of `group` (default: a single process) gets the rows
    `rank::world_size` of the global batch. Loader workers take turns by step, so their number does not change the
    batches. Each worker reads the blocks of the whole global batch: it holds the group of blocks in use of each
    source, and prefetches the next groups. With `document_mask`, batches have position ids.
    """

    def __init__(
        self,
        readers: Mapping[str, ShardReader],
        order: TrainingOrder,
        batch_size: int,
        group: Group | None = None,
        *,
        start_step: int = 0,
        document_mask: bool = False,
    ) -> None:
        super().__init__()
        self.readers = [readers[label] for label in order.labels]
        self.order = order
        self.batch_size = batch_size
        self.start_step = start_step
        group = group or Group()
        self.rank, self.world_size = group.rank, group.world_size
        self.document_mask = document_mask

    @property
    def steps(self) -> int:
        """Steps in the whole training order; a last, partial batch is dropped."""
        return self.order.windows // self.batch_size

    @property
    def window_tokens(self) -> int:
        """Tokens in a window, T."""
        return self.readers[0].sequence_length

    def describe(self, step: int) -> str:
        """List the windows of a step, over all ranks, by shard: `stories/train-00000.arrow 3, 17; …`."""
        sources, windows = self.order.locate(np.arange(self.batch_size) + step * self.batch_size)
        rows: dict[str, list[int]] = {}
        for source, window in zip(sources, windows, strict=True):
            shard, row = self.readers[source].find(int(window))
            rows.setdefault(shard, []).append(row)
        return "; ".join(f"{shard} {', '.join(map(str, sorted(found)))}" for shard, found in sorted(rows.items()))

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over this rank's batches. Raises CorruptBlockError and StoreError where a block cannot be read."""
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        steps = np.arange(self.start_step + number, self.steps, stride)
        own = own_rows(self.batch_size, self.rank, self.world_size)
        together = steps_together(self.readers[0].block_windows, self.batch_size, stride)
        widest = next((reader for reader in self.readers if reader.has_mask), self.readers[0])
        room = widest.empty(together * len(own))  # reused, because new memory is slow
        at_once = max(1, WIDENED_TOKENS // max(1, len(own) * self.window_tokens))
        ahead = Prefetcher(
            self.order, self.readers, int(steps[0]) * self.batch_size if len(steps) else self.order.windows
        )
        try:
            for begin in range(0, len(steps), together):
                here = steps[begin : begin + together]
                windows = room.rows(slice(0, len(here) * len(own)))
                self._gather((here[:, None] * self.batch_size + own).reshape(-1), ahead, windows)
                for first in range(0, len(here), at_once):
                    last = min(first + at_once, len(here))
                    some = windows.rows(slice(first * len(own), last * len(own)))
                    yield from to_batch(some, self.document_mask).parts(last - first)
        finally:
            for reader in self.readers:
                reader.close()

    def _gather(self, places: NDArray[np.int64], ahead: "Prefetcher", into: Windows) -> None:
        """Copy the windows at some positions of the training order to `into`."""
        if len(places):  # empty where there are more ranks than rows
            ahead.reach(places)
            sources, windows = self.order.locate(places)
            for number, reader in enumerate(self.readers):
                rows = np.flatnonzero(sources == number)
                reader.gather(windows[rows], into, rows)
                if into.supervised is not None and not reader.has_mask:
                    into.supervised[rows] = TEXT


@contextmanager
def stream_shards(
    address: str, batch_size: int, *, windows: int = 0, weights: Mapping[str, float] | None = None, seed: int = 0
) -> Iterator[StreamingLanguageModelDataset]:
    """Open the training windows of a stage for the duration of a `with` block, as a stream of batches.

    `address` is `shards/DIGITS` or `chat_shards/DIGITS`, with the first digits of a fingerprint, in the default store;
    or `STORE/shards/DIGITS`. The stream has `windows` windows (default: as many as there are), mixed by `weights` of
    the sources (default: by their sizes). Raises VectorCLMError where there are no such shards, or a file is damaged.
    """
    artifact = _find_shards(address)
    with open_shards(artifact, "train") as readers:
        sizes = {label: len(reader) for label, reader in readers.items()}
        phase = MixturePhase(windows or sum(sizes.values()), weights or sizes)
        order = TrainingOrder([phase], sizes, seed, windows_per_block=next(iter(readers.values())).block_windows)
        yield StreamingLanguageModelDataset(readers, order, batch_size)


def _find_shards(address: str) -> Artifact:
    root, stage, fingerprint = ("", *expand_prefix(address).rsplit("/", 2))[-3:]
    artifact = Store(root or default_store()).find(stage, fingerprint)
    if artifact is None:
        raise DataError(f"there are no shards at {address}: `vectorclm store ls` lists what there is")
    return artifact


class BlockOrder(Protocol):
    """What a prefetcher asks of a training order."""

    def groups(self, place: int = 0) -> Iterator[BlockGroup]:
        """All groups of blocks that positions from `place` on need."""

    def block_windows(self, source: int, block: int) -> range:
        """The windows of a source in one of its blocks."""


class Prefetcher:
    """Prefetches the groups of blocks after the one in use, for each source."""

    def __init__(self, order: BlockOrder, readers: Sequence[ShardReader], place: int) -> None:
        for reader in readers:
            reader.close()  # release blocks of another process or an earlier pass
        self.order = order
        self.readers = readers
        self.groups = order.groups(place)
        self.next = next(self.groups, None)

    def reach(self, places: NDArray[np.int64]) -> None:
        """Hold the groups for these positions, prefetch the next groups, and release all others."""
        for reader in self.readers:
            reader.evict(int(places[0]))
        while (group := self.next) is not None:
            reader = self.readers[group.source]
            if group.place > places[-1] and len(reader.held) > AHEAD:
                break
            reader.prefetch(group.place, (self.order.block_windows(group.source, int(b)) for b in group.blocks))
            self.next = next(self.groups, None)
