"""Block layout of shards: offset and xxh3 checksum of each block, recorded in the artifact's manifest.

A block is about one mebibyte of windows. Every block is checked against its xxh3 before it is used.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from vectorclm.errors import CorruptArtifactError, CorruptBlockError
from vectorclm.shards.order import windows_per_block
from vectorclm.store.artifact import Artifact, repair_advice


@dataclass(frozen=True)
class Column:
    """One flat buffer of a shard, with T values for each window."""

    name: str
    dtype: np.dtype[Any]
    offset: int  # of the first byte in the file
    xxh3: tuple[str, ...]  # of each block


@dataclass(frozen=True)
class Shard:
    """A shard as its manifest describes it."""

    uri: str
    path: str  # of the file on the store's file system
    windows: int
    first_window: int  # number of the source's windows in the shards before
    sequence_length: int
    block_windows: int  # in a block of the source; a block may cross from one shard into the next
    columns: tuple[Column, ...]
    mend: str  # what the user does where the bytes are wrong

    @property
    def skew(self) -> int:
        """Windows of the first block that lie in the previous shard."""
        return self.first_window % self.block_windows

    @property
    def blocks(self) -> int:
        """Number of blocks, parts of blocks included."""
        return -(-(self.skew + self.windows) // self.block_windows)

    def span(self, column: Column, block: int) -> tuple[int, int]:
        """Offsets in the file of a block's first byte, and of the byte after its last."""
        first = max(0, block * self.block_windows - self.skew)
        last = min((block + 1) * self.block_windows - self.skew, self.windows)
        width = self.sequence_length * column.dtype.itemsize
        return column.offset + first * width, column.offset + last * width

    def check(self, column: Column, block: int, data: bytes | memoryview) -> None:
        """Raise CorruptBlockError where the length or checksum of the bytes is wrong."""
        first, last = self.span(column, block)
        found = xxhash.xxh3_64_hexdigest(data)
        if len(data) != last - first or found != column.xxh3[block]:
            raise CorruptBlockError(
                f"{self.uri}, block {block} of {column.name}: {len(data)} bytes with xxh3 {found}, but the manifest "
                f"has {last - first} with {column.xxh3[block]}: {self.mend}"
            )

    def windows_of(self, column: Column, data: bytes | memoryview) -> NDArray[Any]:
        """The bytes of a block as windows [n, T]."""
        return np.frombuffer(data, column.dtype).reshape(-1, self.sequence_length)


class ShardDescriber:
    """Computes the manifest entry of a shard: offsets of its buffers, and the xxh3 of each block.

    Call it with the shards of a source and split in order, because blocks are counted over all of them. The entry of
    any other file is empty.
    """

    def __init__(self) -> None:
        self.windows: Counter[tuple[str, str]] = Counter()  # counted so far, by source and split

    def __call__(self, path: Path) -> dict[str, Any]:
        """The manifest entry of a file."""
        if path.suffix != ".arrow":
            return {}
        source = path.parent.name, path.name.partition("-")[0]
        with pa.memory_map(str(path)) as file:
            start = file.read_buffer().address
            file.seek(0)
            reader = pa.ipc.open_file(file)
            batch, length = reader.get_batch(0), int(reader.schema.metadata[b"sequence_length"])
            windows = batch.num_rows // length
            block_windows = windows_per_block(length, batch.column(0).type.bit_width // 8)
            first = self.windows[source]
            ends = [*range(block_windows - first % block_windows, windows, block_windows), windows]
            buffers = []
            for name, values in zip(batch.schema.names, batch.columns, strict=True):
                rows = values.to_numpy(zero_copy_only=True).reshape(windows, length)
                sums = [xxhash.xxh3_64_hexdigest(rows[i:j]) for i, j in pairwise([0, *ends])]
                offset = values.buffers()[1].address - start
                buffers.append({"name": name, "dtype": rows.dtype.name, "offset": offset, "xxh3": sums})
        self.windows[source] += windows
        counts = {"windows": windows, "first_window": first, "sequence_length": length}
        return {**counts, "block_windows": block_windows, "buffers": buffers}

    def pass_over(self, name: str, entry: Mapping[str, Any]) -> None:
        """Count a shard that an earlier run described by this entry."""
        if "windows" in entry:
            path = PurePosixPath(name)
            self.windows[path.parent.name, path.name.partition("-")[0]] = entry["first_window"] + entry["windows"]


def read_shard(artifact: Artifact, name: str) -> Shard:
    """Read the manifest entry of the shard `name`. Raises CorruptArtifactError where the entry is incomplete."""
    entry = artifact.manifest["files"][name]
    try:
        columns = [
            Column(one["name"], np.dtype(one["dtype"]), int(one["offset"]), tuple(one["xxh3"]))
            for one in entry["buffers"]
        ]
        key = artifact.key(name)
        counts = {field: int(entry[field]) for field in ("windows", "first_window", "sequence_length", "block_windows")}
        uri, path = artifact.store.uri_of(key), artifact.store.path(key)
        shard = Shard(uri, path, columns=tuple(columns), mend=repair_advice(artifact), **counts)
        ends = [shard.span(column, shard.blocks - 1)[1] for column in columns]
        if not ends or max(ends) > entry["bytes"] or any(len(column.xxh3) != shard.blocks for column in columns):
            raise ValueError("its buffers exceed the file")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CorruptArtifactError(
            f"the manifest of {artifact.uri} does not describe {name} completely ({error!r}): {repair_advice(artifact)}"
        ) from error
    return shard
