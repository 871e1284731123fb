"""Random access to the verified windows of an artifact's shards, with prefetching."""

import glob
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vectorclm.errors import CorruptBlockError
from vectorclm.shards.block_readers import Blocks, MmapBlockReader, RemoteBlockReader, RetryPolicy
from vectorclm.shards.blocks import Shard, read_shard
from vectorclm.shards.node_blocks import NodeBlocks
from vectorclm.shards.order import GROUP_BLOCKS
from vectorclm.shards.writer import Windows
from vectorclm.store.artifact import Artifact


class ShardReader:
    """Reads the windows of one source and split by number, verified.

    Where the reading order is known, `prefetch` starts to fetch the next blocks, and `evict` releases the blocks that
    were prefetched for earlier positions.
    """

    def __init__(self, shards: Sequence[Shard], blocks: Blocks) -> None:
        self.shards = shards
        self.source = blocks
        self.firsts = np.cumsum([0, *(shard.windows for shard in shards)])
        self.skews = np.array([shard.skew for shard in shards])
        self.block_firsts = np.cumsum([0, *(shard.blocks for shard in shards)])
        self.held: deque[tuple[int, dict[int, Callable[[], Windows]]]] = deque()

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Sequence[Shard], Blocks]]:
        """A reader in another process starts without blocks."""
        return (ShardReader, (self.shards, self.source))

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def sequence_length(self) -> int:
        """Tokens in a window, T."""
        return self.shards[0].sequence_length

    @property
    def token_bytes(self) -> int:
        """Bytes of a token id."""
        return self.shards[0].columns[0].dtype.itemsize

    @property
    def block_windows(self) -> int:
        """Windows in a block; the last block of each shard may have fewer."""
        return self.shards[0].block_windows

    @property
    def has_mask(self) -> bool:
        """Whether the windows have a mask of the tokens that carry loss."""
        return any(column.name == "supervised" for column in self.shards[0].columns)

    def empty(self, windows: int) -> Windows:
        """Allocate uninitialized memory for `windows` windows."""
        shape = (windows, self.sequence_length)
        return Windows(**{column.name: np.empty(shape, column.dtype) for column in self.shards[0].columns})

    def prefetch(self, place: int, windows: Iterable[range]) -> None:
        """Start to read the blocks of `windows`, which are needed from position `place` on."""
        blocks: dict[int, Callable[[], Windows]] = {}
        for some in windows:
            (first, last), _ = self._where(np.array([some[0], some[-1]]))
            for block in range(first, last + 1):
                blocks[block] = self._held(block) or self.source.begin(*self._shard(block))
        self.held.append((place, blocks))

    def evict(self, place: int) -> None:
        """Release the blocks that are no longer needed at position `place`."""
        while len(self.held) > 1 and self.held[1][0] <= place:
            for block in self.held.popleft()[1]:
                if self._held(block) is None:
                    self.source.drop(*self._shard(block))

    def gather(self, windows: NDArray[np.int64], into: Windows, rows: NDArray[np.int64]) -> None:
        """Copy `windows` [n] to the `rows` [n] of `into`. Raises the errors of the block reader."""
        blocks, places = self._where(windows)
        order = np.argsort(blocks, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1):
            if len(here):
                block = int(blocks[here[0]])
                found = (self._held(block) or self.source.begin(*self._shard(block)))()
                for target, column in zip(into, found, strict=True):
                    if target is not None and column is not None:
                        target[rows[here]] = column[places[here]]

    def in_order(self, count: int, limit: int = 0, share: tuple[int, int] = (0, 1)) -> Iterator[Windows]:
        """Iterate over the first `limit` windows (0 = all), `count` at a time; of them, over part n of m (`share`)."""
        limit, (number, shares) = min(limit or len(self), len(self)), share
        wanted, limit = limit * number // shares, limit * (number + 1) // shares
        group = GROUP_BLOCKS * self.block_windows
        for start in range(wanted, limit, count):
            self.evict(start)
            while wanted < min(limit, start + group):
                self.prefetch(wanted, [range(wanted, min(limit, wanted + group))])
                wanted += group
            rows = np.arange(min(count, limit - start))
            found = self.empty(len(rows))
            self.gather(start + rows, found, rows)
            yield found

    def close(self) -> None:
        """Cancel pending reads; the reader can be used again."""
        self.held.clear()
        self.source.close()

    def find(self, window: int) -> tuple[str, int]:
        """The name of the shard with a window, and the window's row in this shard."""
        number = int(np.searchsorted(self.firsts, window, side="right")) - 1
        return "/".join(self.shards[number].path.split("/")[-2:]), window - int(self.firsts[number])

    def _held(self, block: int) -> Callable[[], Windows] | None:
        return next((blocks[block] for _, blocks in self.held if block in blocks), None)

    def _shard(self, block: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self.block_firsts, block, side="right")) - 1
        return self.shards[number], block - int(self.block_firsts[number])

    def _where(self, windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The block of each window, counted over all shards, and the window's row in this block."""
        shard = np.searchsorted(self.firsts, windows, side="right") - 1
        within = windows - self.firsts[shard]
        block, row = np.divmod(within + self.skews[shard], self.block_windows)
        return block + self.block_firsts[shard], np.minimum(row, within)


@contextmanager
def open_shards(
    artifact: Artifact,
    split: str,
    *,
    cache: str | None = None,
    patience: RetryPolicy = RetryPolicy(),
    node: NodeBlocks | None = None,
) -> Iterator[dict[str, ShardReader]]:
    """Open a reader for each source of a split, for the duration of a `with` block; only the manifest is read at once.

    `cache` is a local folder that keeps blocks of a remote store; `node` shares them between processes. Raises
    CorruptArtifactError where the manifest is incomplete.
    """
    blocks: Blocks = MmapBlockReader()
    if not artifact.store.is_local:
        blocks = RemoteBlockReader(artifact.store, patience, None if cache is None else Path(cache), node)
    shards: dict[str, list[Shard]] = {}
    for name in sorted(artifact.manifest["files"]):
        if fnmatchcase(name, f"*/{split}-*.arrow"):
            shards.setdefault(name.partition("/")[0], []).append(read_shard(artifact, name))
    try:
        yield {label: ShardReader(parts, blocks) for label, parts in shards.items()}
    except CorruptBlockError as error:
        for shard in itertools.chain(*shards.values()):
            if f"{shard.uri}, " in str(error):  # check the file's hash, so that its stage does not reuse it
                list(artifact.differences(glob.escape(shard.uri.removeprefix(f"{artifact.uri}/"))))
        raise
    finally:
        blocks.close()
