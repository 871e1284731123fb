"""Where blocks come from: memory maps of local files, or ranged GETs from a remote store.

Of a local store the files are mapped. Of a remote one the blocks are fetched, many at a time, into memory only; what
comes late, short, spoiled or not at all is fetched again, and what stays so is an error that names it.
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
from vectorclm.shards.writer import Windows
from vectorclm.store.durable import temporary_beside
from vectorclm.store.storage import Storage

logger = logging.getLogger(__name__)


class Blocks(Protocol):
    """Where blocks come from."""

    def begin(self, shard: Shard, block: int) -> Callable[[], Windows]:
        """Begin to read a block, now or when its verified windows are asked for."""

    def drop(self, shard: Shard, block: int) -> None:
        """A block is needed no more."""

    def close(self) -> None:
        """Nothing is needed any more."""


class MmapBlockReader:
    """Blocks of local files, mapped into memory; each is verified when it is touched first."""

    def __init__(self) -> None:
        self.maps: dict[str, mmap.mmap] = {}
        self.seen: dict[str, NDArray[np.bool_]] = {}

    def __reduce__(self) -> tuple[type["MmapBlockReader"], tuple[()]]:
        """Another process maps the files itself."""
        return (MmapBlockReader, ())

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
class RetryPolicy:
    """How a remote store is asked, and asked again."""

    requests: int = 16  # in flight
    deadline: float = 30.0  # seconds for a request
    total: float = 180.0  # seconds, until a store that answers with faults is given up
    refused: float = 5.0  # seconds, until one that refuses our key is
    refetches: int = 5  # of a block that came spoiled


class RemoteBlockReader:
    """Blocks of a remote store: ranged GETs, each with a deadline, tried again at once, then after growing pauses.

    `cache` is a local folder that keeps them, or None; what comes from there is verified, too. Opened by the process
    that reads, as no client outlives a fork, and opened again where it is read after it was closed.
    """

    def __init__(self, store: Storage, patience: RetryPolicy = RetryPolicy(), cache: Path | None = None) -> None:
        self.store = store
        self.patience = patience
        self.cache = cache
        self.fetched = 0  # bytes
        self.lock = threading.Lock()
        self.opened: _Opened | None = None

    def __reduce__(self) -> tuple[type["RemoteBlockReader"], tuple[Any, ...]]:
        """Another process opens a client of its own."""
        return (RemoteBlockReader, (self.store, self.patience, self.cache))

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
        part = temporary_beside(path)
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
            if tries > 1:  # a single fault, as of a connection that the server closed, costs no pause
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


def open_client(fs: Any, patience: RetryPolicy) -> Any:
    """A client of its own: of S3 one with as many connections as requests, that leaves the trying again to us."""
    options = dict(fs.storage_options)
    is_s3 = "s3" in fs.protocol
    if is_s3:
        limits = {"max_pool_connections": patience.requests, "read_timeout": patience.deadline}
        named = {"user_agent": "vectorclm"}  # botocore's own is put together, of 16 parts, for each request
        config = {**named, **options.get("config_kwargs", {}), **limits, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = config
    client = type(fs)(*fs.storage_args, **options, skip_instance_cache=True)
    if is_s3:
        client.retries = 1
    return client
