"""Blocks of a remote store that the processes of a node share: one fetches a block, the others read its copy."""

import fcntl
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vectorclm.errors import CorruptBlockError
from vectorclm.runtime.group import Group
from vectorclm.runtime.temporary import temporary_folder

LOCKS = 256  # lock files; blocks with the same lock are fetched one after the other


@dataclass(frozen=True)
class NodeBlocks:
    """A folder on this machine where a block lies from its first to its last of `readers` reads."""

    folder: Path
    readers: int  # processes of this node, each of which reads a block once

    def keeping(self) -> "NodeBlocks":
        """The same folder for blocks that are read again and again, such as those of validations: they stay."""
        return replace(self, readers=sys.maxsize)

    def read(self, name: str, fetch: Callable[[], bytes], check: Callable[[bytes], None]) -> bytes:
        """The bytes of a block: a copy that `check` accepts, or what `fetch` returns, which is kept for the others."""
        if self.readers < 2:
            return fetch()
        try:
            lock = (self.folder / f"lock-{zlib.crc32(name.encode()) % LOCKS}").open("w")
        except OSError:  # the folder is removed, or the disk full
            return fetch()
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # freed with the file, also where the process is killed
            path = self.folder / name
            reads = path.with_name(f"{name}.reads")  # a byte for each read
            try:
                data = path.read_bytes()
                check(data)
            except (OSError, CorruptBlockError):
                data = fetch()
                with suppress(OSError):
                    reads.unlink(missing_ok=True)
                    path.write_bytes(data)
            with suppress(OSError):
                with reads.open("ab") as file:
                    file.write(b".")
                if reads.stat().st_size >= self.readers:
                    path.unlink()
                    reads.unlink()
            return data


@contextmanager
def node_blocks(group: Group, *, is_local: bool, batch_size: int, workers: int) -> Iterator[NodeBlocks | None]:
    """What the ranks of this node share while the block runs; None where the store `is_local`, or this rank reads none.

    One process alone keeps only what it reads again, so that validations ask the store once. Each of a rank's loader
    `workers` reads the blocks of all windows; a rank without a row of the batch reads none.
    """
    first = group.rank - group.local_rank
    readers = len(range(first, min(first + group.local_world_size, batch_size))) * max(1, workers)
    if is_local or not readers:
        yield None
    elif group.local_rank == 0:
        with temporary_folder("blocks-") as folder:
            group.node.share(str(folder))
            yield NodeBlocks(folder, readers)
    else:
        yield NodeBlocks(Path(group.node.share("")), readers)
