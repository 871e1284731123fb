"""Reads blocks of shards: memory maps of local files, or concurrent ranged GETs from a remote store with retries.

Remote blocks are fetched into memory only. A block that is late, short, corrupt or missing is fetched again; a
persistent failure is an error that names the block.
"""

import itertools
import logging
import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vectorclm.errors import CorruptArtifactError, CorruptBlockError, StoreError
from vectorclm.shards.blocks import Column, Shard
from vectorclm.shards.node_blocks import NodeBlocks
from vectorclm.shards.writer import Windows
from vectorclm.store.durable import temporary_file
from vectorclm.store.patience import OUTAGE_SECONDS
from vectorclm.store.storage import Storage

logger = logging.getLogger(__name__)


class Blocks(Protocol):
    """The interface of block readers."""

    def begin(self, shard: Shard, block: int) -> Callable[[], Windows]:
        """Start reading a block. Returns a function that waits for the verified windows."""

    def drop(self, shard: Shard, block: int) -> None:
        """Release a block."""

    def close(self) -> None:
        """Release all blocks."""


class MmapBlockReader:
    """Reads blocks of memory-mapped local files; each block is verified on its first read."""

    def __init__(self) -> None:
        self.maps: dict[str, mmap.mmap] = {}
        self.seen: dict[str, NDArray[np.bool_]] = {}

    def __reduce__(self) -> tuple[type["MmapBlockReader"], tuple[()]]:
        """A reader in another process maps the files itself."""
        return (MmapBlockReader, ())

    def begin(self, shard: Shard, block: int) -> Callable[[], Windows]:
        """Return a function that reads the block; nothing is read before the call."""
        return partial(self._read, shard, block)

    def drop(self, shard: Shard, block: int) -> None:
        """Release the block's pages from this process; the system may keep them cached."""
        if shard.path in self.maps:
            for column in shard.columns:
                first, last = shard.span(column, block)
                first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
                if last > first:
                    self.maps[shard.path].madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Do nothing: each map is released with the last of its windows."""

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
        except (FileNotFoundError, ValueError) as error:  # ValueError: the file is too short
            raise CorruptArtifactError(f"{shard.uri} is missing or truncated ({error}): run its stage again") from error
        self.seen[shard.path] = np.zeros(shard.blocks, bool)
        return self.maps[shard.path]


@dataclass(frozen=True)
class RetryPolicy:
    """Concurrency, timeouts and retries of requests to a remote store."""

    requests: int = 16  # concurrent requests
    deadline: float = 30.0  # seconds per request
    total: float = OUTAGE_SECONDS  # before failing while the store returns errors
    told: float = 20.0  # seconds after which a warning says that the store returns errors
    refused: float = 5.0  # seconds before failing while the store refuses the credentials
    refetches: int = 5  # of a corrupt block


class RemoteBlockReader:
    """Reads blocks of a remote store by ranged GETs with a timeout; the first retry is immediate, later ones back off.

    `cache` is a local folder that keeps blocks, or None; `node` is what the processes of this machine share, or None.
    Blocks from there are verified, too. The reading process opens its own client, because a client does not survive a
    fork, and opens a new one when it reads after `close`.
    """

    def __init__(
        self,
        store: Storage,
        patience: RetryPolicy = RetryPolicy(),
        cache: Path | None = None,
        node: NodeBlocks | None = None,
    ) -> None:
        self.store = store
        self.node = node
        self.patience = patience
        self.cache = cache
        self.fetched = 0  # bytes
        self.is_away = False  # whether a warning has said that the store returns errors
        self.lock = threading.Lock()
        self.opened: _Opened | None = None

    def __reduce__(self) -> tuple[type["RemoteBlockReader"], tuple[Any, ...]]:
        """A reader in another process opens its own client."""
        return (RemoteBlockReader, (self.store, self.patience, self.cache, self.node))

    def begin(self, shard: Shard, block: int) -> Callable[[], Windows]:
        """Fetch a block in the background. The returned function raises the errors of the fetch."""
        if self.opened is None or self.opened.process != os.getpid():
            self.opened = _Opened(open_client(self.store.fs, self.patience), self.patience.requests)
        return self.opened.pool.submit(self._read, self.opened, shard, block).result

    def drop(self, shard: Shard, block: int) -> None:
        """Do nothing: a block's memory is released with the last of its windows."""

    def close(self) -> None:
        """Cancel pending requests and ignore those in progress."""
        if self.opened is not None and self.opened.process == os.getpid():
            self.opened.closed.set()
            self.opened.pool.shutdown(wait=False, cancel_futures=True)
        self.opened = None

    def _read(self, opened: "_Opened", shard: Shard, block: int) -> Windows:
        columns = {column: self._shared(opened, shard, column, block) for column in shard.columns}
        return Windows(**{column.name: shard.windows_of(column, data) for column, data in columns.items()})

    def _shared(self, opened: "_Opened", shard: Shard, column: Column, block: int) -> bytes:
        fetch = partial(self._cached, opened, shard, column, block)
        if self.node is None:
            return fetch()
        name = f"{shard.path.replace('/', '-')}-{column.name}-{block}"
        return self.node.read(name, fetch, partial(shard.check, column, block))

    def _cached(self, opened: "_Opened", shard: Shard, column: Column, block: int) -> bytes:
        if (cache := self.cache) is None:
            return self._fetch(opened, shard, column, block)
        path = cache / shard.path.lstrip("/") / f"{column.name}-{block:05d}"
        with suppress(OSError, CorruptBlockError):
            data = path.read_bytes()
            shard.check(column, block, data)
            return data
        data = self._fetch(opened, shard, column, block)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary_file(path) as part:
                part.write_bytes(data)
                part.replace(path)
        except OSError as error:  # a full disk must not stop a training
            self.cache = None
            logger.warning("blocks are no longer kept in %s: %s", cache, error)
        return data

    def _fetch(self, opened: "_Opened", shard: Shard, column: Column, block: int) -> bytes:
        """Fetch and verify the bytes of a block, with retries.

        Raises CorruptBlockError where the bytes stay corrupt, CorruptArtifactError where the file does not exist, and
        StoreError for other persistent failures.
        """
        first, last = shard.span(column, block)
        began, corrupt = time.monotonic(), 0
        for tries in itertools.count(1):
            try:
                data = self._request(opened.client, shard.path, first, last)
                shard.check(column, block, data)
                self.is_away = False
                return data
            except FileNotFoundError as error:
                raise CorruptArtifactError(f"{shard.uri} is missing: run its stage again") from error
            except CorruptBlockError as error:
                corrupt += 1
                if corrupt > self.patience.refetches or opened.closed.is_set():
                    raise
                problem: Exception = error
            except Exception as error:  # each store's client raises its own types
                problem = error
            refused, spent = isinstance(problem, PermissionError), time.monotonic() - began
            late = spent > (self.patience.refused if refused else self.patience.total) or opened.closed.is_set()
            if late and not isinstance(problem, CorruptBlockError):
                hint = "; check the credentials, which may have expired" if refused else ""
                raise StoreError(
                    f"{shard.uri}, block {block} of {column.name} cannot be read: {tries} attempts in {spent:.0f} s, "
                    f"the last failed with {type(problem).__name__}: {problem}{hint}"
                ) from problem
            if spent > self.patience.told and not self.is_away:
                self.is_away = True
                logger.warning("%s cannot be read (%s); tried again", shard.uri, problem)
            if tries > 1:  # a single failure, such as a closed connection, is retried without a pause
                opened.closed.wait(random.uniform(0.5, 1) * min(10.0, 0.05 * 2**tries))
        raise AssertionError  # never

    def _request(self, client: Any, path: str, first: int, last: int) -> bytes:
        deadline = {"timeout": self.patience.deadline} if client.async_impl else {}
        data: bytes = client.cat_file(path, start=first, end=last, **deadline)
        with self.lock:
            self.fetched += len(data)
        return data


class _Opened:
    """The client and threads of one process."""

    def __init__(self, client: Any, requests: int) -> None:
        self.client = client
        self.pool = ThreadPoolExecutor(requests, "blocks")
        self.process = os.getpid()
        self.closed = threading.Event()


def open_client(fs: Any, patience: RetryPolicy) -> Any:
    """A separate client of the store; for S3 with a connection for each request, and without retries of its own."""
    options = dict(fs.storage_options)
    is_s3 = "s3" in fs.protocol
    if is_s3:
        limits = {"max_pool_connections": patience.requests, "read_timeout": patience.deadline}
        named = {"user_agent": "vectorclm"}  # botocore builds its own user agent of 16 parts for each request
        config = {**named, **options.get("config_kwargs", {}), **limits, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = config
    client = type(fs)(*fs.storage_args, **options, skip_instance_cache=True)
    if is_s3:
        client.retries = 1
    return client
