"""Collectives of several ranks under torchrun, through torch.distributed."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from vectorclm.runtime.group import Group, PeerLostError, Value
from vectorclm.runtime.watchdog import Watchdog, watch

# The first rank reads, validates and publishes alone, while the others wait. A dead rank's sockets close at once.
TIMEOUT = timedelta(hours=6)
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # environment variables that torchrun sets
BUCKET = 2**23  # elements in one all-reduce


class DistributedGroup(Group):
    """The ranks that torchrun started, and this process's rank, with the watchdog that ends them together."""

    def __init__(self, ranks: Mapping[str, int], watchdog: Watchdog) -> None:
        super().__init__(*(ranks[name] for name in RANKS))
        self.watchdog = watchdog

    def limit_hangs(self, seconds: float) -> None:
        """End all ranks where no rank moves for so many seconds in a step, or one gives no sign of life; 0 = never."""
        self.watchdog.limit_hangs(seconds)

    def moved(self) -> None:
        """Report that this rank is alive in a step, as after each micro-batch."""
        self.watchdog.moved()

    def steps(self, expected: bool = True) -> AbstractContextManager[None]:
        """Say that the block is made of steps, in which all ranks move; with False, that the first rank works alone."""
        return self.watchdog.steps(expected)

    def leave(self, kind: str = "", reason: str = "") -> None:
        """Tell the other ranks that this one ends on purpose, or the error that ends it."""
        self.watchdog.leave(kind, reason)

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Begin a collective, which all ranks do in the same order. Raises PeerLostError where another rank is lost."""
        self.watchdog.moved(collective=True)
        with _peers():
            yield

    def share(self, value: Value) -> Value:
        """Broadcast the first rank's `value` and return it. The value travels as JSON, so no code can arrive."""
        data = bytearray(json.dumps(value).encode() if self.rank == 0 else b"")
        size = torch.tensor([len(data)])
        with self._collective():
            dist.broadcast(size, src=0)
            text = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(text, src=0)
        shared: Value = json.loads(bytes(text.tolist()))
        return shared

    def call(self, task: str | None = None) -> str | None:
        """Broadcast the first rank's `task`, which all ranks begin; None releases the other ranks (see `joined`)."""
        task = self.share(task)
        self.at_work = task is not None
        return task

    def agree(self, count: int, stop: bool) -> tuple[int, bool]:
        """The sum of `count` over the ranks, and whether any rank wants to stop."""
        counts = torch.tensor([count, int(stop)])
        with self._collective():
            dist.all_reduce(counts)
        return int(counts[0]), bool(counts[1])

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor (all of one type) by its sum over the ranks (all-reduce in buckets)."""
        bucket: list[Tensor] = []
        for tensor in tensors:
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) >= BUCKET or tensor is tensors[-1]:
                flat = torch.cat([t.flatten() for t in bucket])
                with self._collective():
                    dist.all_reduce(flat)
                for t, summed in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                    t.copy_(summed.view_as(t))
                bucket = []

    def divide(self, work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Return `work(rows)`: each rank computes its share of the rows. `work` must treat each row independently."""
        share = -(-len(rows) // self.world_size)
        padding = rows.new_zeros(share * self.world_size - len(rows), *rows.shape[1:])
        mine = work(torch.cat([rows, padding])[self.rank * share : (self.rank + 1) * share])
        done = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        with self._collective():
            dist.all_gather(done, mine.contiguous())
        return torch.cat(done)[: len(rows)]


def connect(relay: bool = False) -> tuple[DistributedGroup, Any]:
    """Join the ranks that torchrun's environment variables describe; return the group and its rendezvous store.

    Raises ConfigError, naming a host, where packages, code or clocks of the nodes differ. With `relay`, a watchdog
    reports as JSON lines.
    """
    ranks = {name: int(os.environ[name]) for name in RANKS}
    rank, world_size = ranks["RANK"], ranks["WORLD_SIZE"]
    with _peers():
        store, _, _ = next(rendezvous("env://"))
        watchdog = watch(rank, world_size, store, relay)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    return DistributedGroup(ranks, watchdog), store


def disconnect() -> None:
    """Leave the group."""
    dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(str(error)) from error
