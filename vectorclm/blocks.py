"""Verified windows by number, out of an artifact's shards: from memory maps, or fetched ahead into memory.

A block is about a mebibyte of windows, and the manifest has an xxh3 of each: no byte is used that was not judged. Of a
local store the files are mapped. Of a remote one the blocks are ranged GETs, many in flight, into memory only; what
comes late, short, spoiled or not at all is fetched again, and what stays so is an error that names it.
"""

import itertools
import logging
import mmap
import os
import random
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from vectorclm.artifact import Artifact, Store, mend
from vectorclm.errors import CorruptArtifactError, CorruptBlockError, StoreError
from vectorclm.plan import GROUP_BLOCKS, windows_per_block
from vectorclm.shards import Windows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """One flat buffer of a shard: so many values for each window."""

    name: str
    dtype: np.dtype[Any]
    offset: int  # of its first byte in the file
    xxh3: tuple[str, ...]  # of each block


@dataclass(frozen=True)
class Shard:
    """What the manifest says of a shard."""

    uri: str
    path: str  # of the file, on the store's file system
    windows: int
    first_window: int  # of its source: so many are in the shards before
    sequence_length: int
    block_windows: int  # in a block of the source, which may begin in one shard and end in the next
    columns: tuple[Column, ...]

    @property
    def skew(self) -> int:
        """Windows of its first block that are in the shard before."""
        return self.first_window % self.block_windows

    @property
    def blocks(self) -> int:
        """How many there are, or parts of such."""
        return -(-(self.skew + self.windows) // self.block_windows)

    def span(self, column: Column, block: int) -> tuple[int, int]:
        """A block's first byte in the file, and the one after its last."""
        first = max(0, block * self.block_windows - self.skew)
        last = min((block + 1) * self.block_windows - self.skew, self.windows)
        width = self.sequence_length * column.dtype.itemsize
        return column.offset + first * width, column.offset + last * width

    def check(self, column: Column, block: int, data: bytes | memoryview) -> None:
        """Raise CorruptBlockError where the bytes are not those of the block."""
        first, last = self.span(column, block)
        found = xxhash.xxh3_64_hexdigest(data)
        if len(data) != last - first or found != column.xxh3[block]:
            raise CorruptBlockError(
                f"{self.uri}, block {block} of {column.name}: {len(data)} bytes of xxh3 {found}, the manifest says "
                f"{last - first} of {column.xxh3[block]}: delete the artifact and run its stage again"
            )

    def windows_of(self, column: Column, data: bytes | memoryview) -> NDArray[Any]:
        """A block's bytes as windows [n, T]."""
        return np.frombuffer(data, column.dtype).reshape(-1, self.sequence_length)


class ShardDescriber:
    """Says of each shard where its buffers lie, and an xxh3 of each block: what a manifest has beside its SHA-256.

    The shards of a source and split come in their order, and their blocks are those that a plan reads: counted over
    all of them. Of any other file it says nothing more.
    """

    def __init__(self) -> None:
        self.windows: Counter[tuple[str, str]] = Counter()  # so far, by source and split

    def __call__(self, path: Path) -> dict[str, Any]:
        """What there is to say of a file."""
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

    def pass_over(self, name: str, said: Mapping[str, Any]) -> None:
        """Go on after a shard of which this was said."""
        if "windows" in said:
            path = PurePosixPath(name)
            self.windows[path.parent.name, path.name.partition("-")[0]] = said["first_window"] + said["windows"]


def read_shard(artifact: Artifact, name: str) -> Shard:
    """What the manifest says of the shard `name`. Raises CorruptArtifactError where that is not whole."""
    said = artifact.manifest["files"][name]
    try:
        columns = [
            Column(one["name"], np.dtype(one["dtype"]), int(one["offset"]), tuple(one["xxh3"]))
            for one in said["buffers"]
        ]
        key = f"{artifact.stage}/{artifact.fingerprint}/{name}"
        counts = {field: int(said[field]) for field in ("windows", "first_window", "sequence_length", "block_windows")}
        shard = Shard(artifact.store.uri_of(key), artifact.store.path(key), columns=tuple(columns), **counts)
        ends = [shard.span(column, shard.blocks - 1)[1] for column in columns]
        if not ends or max(ends) > said["bytes"] or any(len(column.xxh3) != shard.blocks for column in columns):
            raise ValueError("its buffers are not in the file")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CorruptArtifactError(
            f"the manifest of {artifact.uri} does not say what is in {name} ({error!r}): {mend(artifact)}"
        ) from error
    return shard


class Blocks(Protocol):
    """Where blocks come from."""

    def begin(self, shard: Shard, block: int) -> Callable[[], Windows]:
        """Begin to read a block, now or when its verified windows are asked for."""

    def drop(self, shard: Shard, block: int) -> None:
        """A block is needed no more."""

    def close(self) -> None:
        """Nothing is needed any more."""


class Mapped:
    """Blocks of local files, mapped into memory; each is verified when it is touched first."""

    def __init__(self) -> None:
        self.maps: dict[str, mmap.mmap] = {}
        self.seen: dict[str, NDArray[np.bool_]] = {}

    def __reduce__(self) -> tuple[type["Mapped"], tuple[()]]:
        """Another process maps the files itself."""
        return (Mapped, ())

    def begin(self, shard: Shard, block: int) -> Callable[[], Windows]:
        """Nothing is read before it is asked for."""
        return partial(self._read, shard, block)

    def drop(self, shard: Shard, block: int) -> None:
        """Take its pages out of this process, so that what was read does not pile up; the system may keep them."""
        if shard.path in self.maps:
            for column in shard.columns:
                first, last = shard.span(column, block)
                first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
                if last > first:
                    self.maps[shard.path].madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """The maps go with the last of their windows."""

    def _read(self, shard: Shard, block: int) -> Windows:
        file = self.maps.get(shard.path) or self._open(shard)
        columns = {}
        for column in shard.columns:
            first, last = shard.span(column, block)
            data = memoryview(file)[first:last]
            if not self.seen[shard.path][block]:
                shard.check(column, block, data)
            columns[column.name] = shard.windows_of(column, data)
        self.seen[shard.path][block] = True
        return Windows(**columns)

    def _open(self, shard: Shard) -> mmap.mmap:
        end = max(shard.span(column, shard.blocks - 1)[1] for column in shard.columns)
        try:
            with Path(shard.path).open("rb") as file:
                self.maps[shard.path] = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError) as error:  # ValueError: the file is shorter
            raise CorruptArtifactError(f"{shard.uri} is missing or cut off ({error}): run its stage again") from error
        self.seen[shard.path] = np.zeros(shard.blocks, bool)
        return self.maps[shard.path]


@dataclass(frozen=True)
class Patience:
    """How a remote store is asked, and asked again."""

    requests: int = 16  # in flight
    deadline: float = 30.0  # seconds for a request
    total: float = 180.0  # seconds, until a store that answers with faults is given up
    refused: float = 5.0  # seconds, until one that refuses our key is
    refetches: int = 5  # of a block that came spoiled


class Fetched:
    """Blocks of a remote store: ranged GETs, each with a deadline, tried again after a growing pause.

    `cache` is a local folder that keeps them, or None; what comes from there is verified, too. Opened by the process
    that reads, as no client outlives a fork, and opened again where it is read after it was closed.
    """

    def __init__(self, store: Store, patience: Patience = Patience(), cache: Path | None = None) -> None:
        self.store = store
        self.patience = patience
        self.cache = cache
        self.fetched = 0  # bytes
        self.lock = threading.Lock()
        self.opened: _Opened | None = None

    def __reduce__(self) -> tuple[type["Fetched"], tuple[Any, ...]]:
        """Another process opens a client of its own."""
        return (Fetched, (self.store, self.patience, self.cache))

    def begin(self, shard: Shard, block: int) -> Callable[[], Windows]:
        """Have it fetched behind the caller's back; the errors come when it is asked for."""
        if self.opened is None or self.opened.process != os.getpid():
            self.opened = _Opened(open_client(self.store.fs, self.patience), self.patience.requests)
        return self.opened.pool.submit(self._read, self.opened, shard, block).result

    def drop(self, shard: Shard, block: int) -> None:
        """Its memory goes with the last of its windows."""

    def close(self) -> None:
        """Begin nothing more, and forget what is under way."""
        if self.opened is not None and self.opened.process == os.getpid():
            self.opened.closed.set()
            self.opened.pool.shutdown(wait=False, cancel_futures=True)
        self.opened = None

    def _read(self, opened: "_Opened", shard: Shard, block: int) -> Windows:
        columns = {column: self._cached(opened, shard, column, block) for column in shard.columns}
        return Windows(**{column.name: shard.windows_of(column, data) for column, data in columns.items()})

    def _cached(self, opened: "_Opened", shard: Shard, column: Column, block: int) -> bytes:
        if (cache := self.cache) is None:
            return self._fetch(opened, shard, column, block)
        path = cache / shard.path.lstrip("/") / f"{column.name}-{block:05d}"
        with suppress(OSError, CorruptBlockError):
            data = path.read_bytes()
            shard.check(column, block, data)
            return data
        data = self._fetch(opened, shard, column, block)
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(path)
        except OSError as error:  # a full disk stops no training
            self.cache = None
            with suppress(OSError):
                part.unlink()
            logger.warning("blocks are no longer kept in %s: %s", cache, error)
        return data

    def _fetch(self, opened: "_Opened", shard: Shard, column: Column, block: int) -> bytes:
        """The verified bytes of a block.

        Raises CorruptBlockError where they stay spoiled, CorruptArtifactError where there is no such file, and
        StoreError for what else does not pass.
        """
        first, last = shard.span(column, block)
        began, spoiled = time.monotonic(), 0
        for tries in itertools.count(1):
            try:
                data = self._request(opened.client, shard.path, first, last)
                shard.check(column, block, data)
                return data
            except FileNotFoundError as error:
                raise CorruptArtifactError(f"{shard.uri} is missing: run its stage again") from error
            except CorruptBlockError as error:
                spoiled += 1
                if spoiled > self.patience.refetches or opened.closed.is_set():
                    raise
                problem: Exception = error
            except Exception as error:  # each store's client has its own
                problem = error
            refused, spent = isinstance(problem, PermissionError), time.monotonic() - began
            late = spent > (self.patience.refused if refused else self.patience.total) or opened.closed.is_set()
            if late and not isinstance(problem, CorruptBlockError):
                hint = "; check the credentials, which may have expired" if refused else ""
                raise StoreError(
                    f"{shard.uri}, block {block} of {column.name} cannot be read: {tries} tries in {spent:.0f} s, the "
                    f"last ended with {type(problem).__name__}: {problem}{hint}"
                ) from problem
            opened.closed.wait(random.uniform(0.5, 1) * min(10.0, 0.05 * 2**tries))
        raise AssertionError  # never

    def _request(self, client: Any, path: str, first: int, last: int) -> bytes:
        deadline = {"timeout": self.patience.deadline} if client.async_impl else {}
        data: bytes = client.cat_file(path, start=first, end=last, **deadline)
        with self.lock:
            self.fetched += len(data)
        return data


class _Opened:
    """What one process reads with."""

    def __init__(self, client: Any, requests: int) -> None:
        self.client = client
        self.pool = ThreadPoolExecutor(requests, "blocks")
        self.process = os.getpid()
        self.closed = threading.Event()


def open_client(fs: Any, patience: Patience) -> Any:
    """A client of its own: of S3 one with as many connections as requests, that leaves the trying again to us."""
    options = dict(fs.storage_options)
    is_s3 = "s3" in fs.protocol
    if is_s3:
        limits = {"max_pool_connections": patience.requests, "read_timeout": patience.deadline}
        config = {**options.get("config_kwargs", {}), **limits, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = config
    client = type(fs)(*fs.storage_args, **options, skip_instance_cache=True)
    if is_s3:
        client.retries = 1
    return client


class ShardReader:
    """The windows of one source and split by number, verified.

    Where the order of reading is known, `want` says what comes, so that it is fetched meanwhile, and `forget` how far
    one is: what is held is what was wanted since.
    """

    def __init__(self, shards: Sequence[Shard], blocks: Blocks) -> None:
        self.shards = shards
        self.source = blocks
        self.firsts = np.cumsum([0, *(shard.windows for shard in shards)])
        self.skews = np.array([shard.skew for shard in shards])
        self.block_firsts = np.cumsum([0, *(shard.blocks for shard in shards)])
        self.held: deque[tuple[int, dict[int, Callable[[], Windows]]]] = deque()

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Sequence[Shard], Blocks]]:
        """Another process holds nothing yet."""
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
        """Whether they say which tokens carry loss."""
        return any(column.name == "supervised" for column in self.shards[0].columns)

    def empty(self, windows: int) -> Windows:
        """Room for so many windows."""
        shape = (windows, self.sequence_length)
        return Windows(**{column.name: np.empty(shape, column.dtype) for column in self.shards[0].columns})

    def want(self, place: int, windows: Iterable[range]) -> None:
        """Begin to read the blocks of `windows`, which are needed from `place` on."""
        blocks: dict[int, Callable[[], Windows]] = {}
        for some in windows:
            (first, last), _ = self._where(np.array([some[0], some[-1]]))
            for block in range(first, last + 1):
                blocks[block] = self._held(block) or self.source.begin(*self._shard(block))
        self.held.append((place, blocks))

    def forget(self, place: int) -> None:
        """Let go what was wanted before that which is needed at `place`."""
        while len(self.held) > 1 and self.held[1][0] <= place:
            for block in self.held.popleft()[1]:
                if self._held(block) is None:
                    self.source.drop(*self._shard(block))

    def gather(self, windows: NDArray[np.int64], into: Windows, rows: NDArray[np.int64]) -> None:
        """Copy `windows` [n] to the `rows` [n] of `into`. Raises what `Fetched` and `Mapped` raise."""
        blocks, places = self._where(windows)
        order = np.argsort(blocks, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1):
            if len(here):
                block = int(blocks[here[0]])
                found = (self._held(block) or self.source.begin(*self._shard(block)))()
                for target, column in zip(into, found, strict=True):
                    if target is not None and column is not None:
                        target[rows[here]] = column[places[here]]

    def in_order(self, count: int, limit: int = 0) -> Iterator[Windows]:
        """The first `limit` windows, `count` at a time; 0 = all of them."""
        limit, wanted = min(limit or len(self), len(self)), 0
        group = GROUP_BLOCKS * self.block_windows
        for start in range(0, limit, count):
            self.forget(start)
            while wanted < min(limit, start + group):
                self.want(wanted, [range(wanted, min(limit, wanted + group))])
                wanted += group
            rows = np.arange(min(count, limit - start))
            found = self.empty(len(rows))
            self.gather(start + rows, found, rows)
            yield found

    def close(self) -> None:
        """Stop what is under way; it can be read again."""
        self.held.clear()
        self.source.close()

    def find(self, window: int) -> tuple[str, int]:
        """The shard that holds a window, and its row in there."""
        number = int(np.searchsorted(self.firsts, window, side="right")) - 1
        return "/".join(self.shards[number].path.split("/")[-2:]), window - int(self.firsts[number])

    def _held(self, block: int) -> Callable[[], Windows] | None:
        return next((blocks[block] for _, blocks in self.held if block in blocks), None)

    def _shard(self, block: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self.block_firsts, block, side="right")) - 1
        return self.shards[number], block - int(self.block_firsts[number])

    def _where(self, windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The block of each window, counted over all shards, and its row in there."""
        shard = np.searchsorted(self.firsts, windows, side="right") - 1
        within = windows - self.firsts[shard]
        block, row = np.divmod(within + self.skews[shard], self.block_windows)
        return block + self.block_firsts[shard], np.minimum(row, within)


@contextmanager
def open_shards(
    artifact: Artifact, split: str, *, cache: str | None = None, patience: Patience = Patience()
) -> Iterator[dict[str, ShardReader]]:
    """Readers of each source's windows of a split, while the block runs; nothing is read yet but the manifest.

    `cache` is a local folder that keeps blocks of a remote store. Raises CorruptArtifactError where the manifest is
    not whole.
    """
    blocks: Blocks = Mapped()
    if not artifact.store.is_local:
        blocks = Fetched(artifact.store, patience, None if cache is None else Path(cache))
    shards: dict[str, list[Shard]] = {}
    for name in sorted(artifact.manifest["files"]):
        if fnmatchcase(name, f"*/{split}-*.arrow"):
            shards.setdefault(name.partition("/")[0], []).append(read_shard(artifact, name))
    try:
        yield {label: ShardReader(parts, blocks) for label, parts in shards.items()}
    finally:
        blocks.close()
