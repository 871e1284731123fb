"""The processes that train one model together, as torchrun starts them; a process alone pays nothing for it.

The first rank holds the lease, writes and tells; the others compute their share. A rank ends when its launcher or
another rank does, whatever it is doing at that moment.
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

TIMEOUT = timedelta(
    hours=6
)  # the first rank reads, validates and publishes alone; a dead one is noticed by its sockets
BUCKET = 2**23  # elements that are summed over the ranks in one piece

logger = logging.getLogger(__name__)
Value = TypeVar("Value", bound=int | str | None)


class PeerLostError(RuntimeError):
    """Another rank is gone; why, that one or the launcher tells."""


class Group:
    """This process's place among its peers, and what they do together. Every method is called by all ranks alike."""

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, local_world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size  # among those of this machine
        self.at_work = False

    def share(self, value: Value) -> Value:
        """The first rank's `value`, which travels as JSON: nothing that arrives is more than data."""
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
        """The first rank's `task`, which all now begin; None where it lets the others go (see `joined`)."""
        if self.world_size > 1:
            task = self.share(task)
            self.at_work = task is not None
        return task

    def total(self, count: int) -> int:
        """The sum of `count` over the ranks; waits for them, not for a device."""
        return self.agree(count, stop=False)[0]

    def agree(self, count: int, stop: bool) -> tuple[int, bool]:
        """The sum of `count` over the ranks, and whether any of them wants to stop."""
        if self.world_size == 1:
            return count, stop
        counts = torch.tensor([count, int(stop)])
        with _peers():
            dist.all_reduce(counts)
        return int(counts[0]), bool(counts[1])

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor (all of one type) by its sum over the ranks."""
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
        """`work(rows)`, each rank computing its share of the rows. `work` treats each row on its own."""
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
    """The group that torchrun's environment variables describe, while the block runs; without them, ALONE.

    Ranks other than the first wait in `call` for the first to call, or to let them go because it needs no one. Where
    several fail, the first to do so raises its VectorCLMError, and the others end with exit code 2; each writes its
    error into the file that torchrun names. Ranks that worked together and ended well leave the process at the end of
    the block.
    """
    if "RANK" in os.environ:
        _end_with_launcher()
    several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    try:
        with preemption.listening(), _together() if several else nullcontext(ALONE) as group:
            yield group
    except PeerLostError as error:
        said = str(error).partition("\n")[0]
        logger.error("rank %s ends because another has ended (%s)", os.environ["RANK"], said)
        sys.exit(ENDED)  # as if torchrun, which is about to, had asked it to end
    except Exception as error:
        record(error)
        raise


@contextmanager
def _together() -> Iterator[Group]:
    """The group of several ranks, while the block runs."""
    preemption.limit(GRACE)  # as a rank may wait in a collective for others that do not answer
    group = Group(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    with _peers():
        store, _, _ = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=group.rank, world_size=group.world_size, timeout=TIMEOUT)
    try:
        yield group
        if group.at_work:
            group.total(0)  # nobody leaves before all have ended well
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
        signal.alarm(GRACE)  # whatever the peers do
        dist.destroy_process_group()
        signal.alarm(0)


def record(error: Exception) -> None:
    """Write an error into the file that torchrun names for this rank, which it shows, and copies to its own.

    The name is in environment variable TORCHELASTIC_ERROR_FILE; without it nothing is written.
    """
    get_error_handler().record_exception(error)


def end_together(group: Group, code: int) -> NoReturn:
    """End this process and all ranks with an exit code, once all have come here."""
    with suppress(PeerLostError):
        group.total(0)
    if group.world_size == 1:
        sys.exit(code)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End this process, without tearing the group down: gloo may abort where a peer is gone a moment earlier."""
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
    """Whether no other rank has failed before. The first rank keeps the store: without it, that rank has."""
    with suppress(RuntimeError):
        return int(store.add("failed", 1)) == 1
    return False


def _end_with_launcher() -> None:
    """Have the system send SIGTERM when the parent is gone, even by `kill -9` (on Linux: prctl 1)."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
