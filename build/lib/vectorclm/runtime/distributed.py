"""Distributed training under torchrun: the group of ranks, its collectives, and its end; one process has no overhead.

The first rank holds the lease, writes files and reports; the others compute their share. A rank ends when its launcher
or another rank ends, whatever the rank is doing at that moment.
"""

import ctypes
import json
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from vectorclm.errors import VectorCLMError
from vectorclm.runtime.preemption import ENDED, GRACE, preemption

# The first rank reads, validates and publishes alone, while the others wait. A dead rank's sockets close at once.
TIMEOUT = timedelta(hours=6)
BUCKET = 2**23  # elements in one all-reduce

logger = logging.getLogger(__name__)
Value = TypeVar("Value", bound=int | str | None)


class PeerLostError(RuntimeError):
    """Another rank has ended; that rank or the launcher reports the cause."""


class Group:
    """The ranks that train together, and this process's rank. All ranks call each method, in the same order."""

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, local_world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size  # among the ranks of this machine
        self.at_work = False

    def share(self, value: Value) -> Value:
        """Broadcast the first rank's `value` and return it. The value travels as JSON, so no code can arrive."""
        if self.world_size == 1:
            return value
        data = bytearray(json.dumps(value).encode() if self.rank == 0 else b"")
        size = torch.tensor([len(data)])
        with _peers():
            dist.broadcast(size, src=0)
            text = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(text, src=0)
        shared: Value = json.loads(bytes(text.tolist()))
        return shared

    def call(self, task: str | None = None) -> str | None:
        """Broadcast the first rank's `task`, which all ranks begin; None releases the other ranks (see `joined`)."""
        if self.world_size > 1:
            task = self.share(task)
            self.at_work = task is not None
        return task

    def total(self, count: int) -> int:
        """The sum of `count` over the ranks; waits for the ranks, not for a device."""
        return self.agree(count, stop=False)[0]

    def agree(self, count: int, stop: bool) -> tuple[int, bool]:
        """The sum of `count` over the ranks, and whether any rank wants to stop."""
        if self.world_size == 1:
            return count, stop
        counts = torch.tensor([count, int(stop)])
        with _peers():
            dist.all_reduce(counts)
        return int(counts[0]), bool(counts[1])

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor (all of one type) by its sum over the ranks (all-reduce in buckets)."""
        bucket: list[Tensor] = []
        for tensor in tensors:
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) >= BUCKET or tensor is tensors[-1]:
                flat = torch.cat([t.flatten() for t in bucket])
                with _peers():
                    dist.all_reduce(flat)
                for t, summed in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                    t.copy_(summed.view_as(t))
                bucket = []

    def divide(self, work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Return `work(rows)`: each rank computes its share of the rows. `work` must treat each row independently."""
        if self.world_size == 1:
            return work(rows)
        share = -(-len(rows) // self.world_size)
        padding = rows.new_zeros(share * self.world_size - len(rows), *rows.shape[1:])
        mine = work(torch.cat([rows, padding])[self.rank * share : (self.rank + 1) * share])
        done = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        with _peers():
            dist.all_gather(done, mine.contiguous())
        return torch.cat(done)[: len(rows)]


ALONE = Group()


@contextmanager
def joined() -> Iterator[Group]:
    """Join the group that torchrun's environment variables describe, while the block runs; without them, ALONE.

    The other ranks wait in `call` until the first rank calls, or releases them because it needs no help. Where several
    ranks fail, the first to fail raises its VectorCLMError, and the others end with exit code 2. Each rank writes its
    error into the file that torchrun names. Ranks that worked together and succeeded end the process at the end of the
    block.
    """
    if "RANK" in os.environ:
        _end_with_launcher()
    several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    try:
        with preemption.listening(), _together() if several else nullcontext(ALONE) as group:
            yield group
    except PeerLostError as error:
        cause = str(error).partition("\n")[0]
        logger.error("rank %s ends because another has ended (%s)", os.environ["RANK"], cause)
        sys.exit(ENDED)  # the exit code of SIGTERM, which torchrun is about to send
    except Exception as error:
        record(error)
        raise


@contextmanager
def _together() -> Iterator[Group]:
    """The group of several ranks, while the block runs."""
    preemption.limit(GRACE)  # a rank may wait in a collective for ranks that do not answer
    group = Group(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    with _peers():
        store, _, _ = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=group.rank, world_size=group.world_size, timeout=TIMEOUT)
    try:
        yield group
        if group.at_work:
            group.total(0)  # no rank leaves before all have succeeded
            _leave(0)
    except VectorCLMError as error:
        if not _is_first(store):
            record(error)
            sys.exit(2)
        raise
    finally:
        if group.rank == 0 and not group.at_work:
            with suppress(PeerLostError):
                group.call(None)
        signal.alarm(GRACE)  # whatever the other ranks do
        dist.destroy_process_group()
        signal.alarm(0)


def record(error: Exception) -> None:
    """Write an error into the file that torchrun names for this rank; torchrun prints the error.

    The environment variable TORCHELASTIC_ERROR_FILE holds the file's name; without the variable nothing is written.
    """
    get_error_handler().record_exception(error)


def end_together(group: Group, code: int) -> NoReturn:
    """End this process and all ranks with an exit code, once all ranks have called this function."""
    with suppress(PeerLostError):
        group.total(0)
    if group.world_size == 1:
        sys.exit(code)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End this process without destroying the group: gloo may abort where another rank ended a moment earlier."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(str(error)) from error


def _is_first(store: Any) -> bool:
    """Whether no other rank has failed before. Without the rendezvous store, the first rank, its host, has failed."""
    with suppress(RuntimeError):
        return int(store.add("failed", 1)) == 1
    return False


def _end_with_launcher() -> None:
    """Have Linux send SIGTERM when the parent process ends, even by `kill -9` (prctl PR_SET_PDEATHSIG)."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
