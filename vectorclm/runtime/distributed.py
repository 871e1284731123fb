"""Collectives of several ranks under torchrun, through torch.distributed."""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from vectorclm.runtime.group import Group, PeerLostError, Value
from vectorclm.runtime.watchdog import Watchdog, own_address, watch

# The first rank reads, validates and publishes alone, while the others wait; watchdogs find what is lost.
TIMEOUT = timedelta(hours=6)
STORE_TIMEOUT = timedelta(minutes=30)  # torch's own for the rendezvous
LOOPBACK = "127.0.0.1"
BUCKET = 2**23  # elements in one all-reduce


class DistributedGroup(Group):
    """The ranks that torchrun started, and this process's rank, with the watchdog that ends them together."""

    def __init__(self, ranks: Sequence[int], watchdog: Watchdog, first: int = 0, process_group: Any = None) -> None:
        super().__init__(*ranks)
        self.watchdog = watchdog
        self._first, self._process_group = first, process_group  # among all ranks; None = torch's default group

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

    def share(self, value: Value, source: int = 0) -> Value:
        """Broadcast the `value` of one rank and return it. The value travels as JSON, so no code can arrive."""
        data = bytearray(json.dumps(value).encode() if self.rank == source else b"")
        size = torch.tensor([len(data)])
        with self._collective():
            dist.broadcast(size, src=self._first + source, group=self._process_group)
            text = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(text, src=self._first + source, group=self._process_group)
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
            dist.all_reduce(counts, group=self._process_group)
        return int(counts[0]), bool(counts[1])

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor (all of one type) by its sum over the ranks (all-reduce in buckets)."""
        bucket: list[Tensor] = []
        for tensor in tensors:
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) >= BUCKET or tensor is tensors[-1]:
                flat = torch.cat([t.flatten() for t in bucket])
                with self._collective():
                    dist.all_reduce(flat, group=self._process_group)
                for t, summed in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                    t.copy_(summed.view_as(t))
                bucket = []

    def copies(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Broadcast the first rank's named tensors, which are in host memory; return them on all ranks."""
        named = {} if tensors is None else tensors
        layout = {
            name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in named.items()
        }
        found = {}
        for name, (dtype, shape) in json.loads(self.share(json.dumps(layout))).items():
            found[name] = named[name] if self.rank == 0 else torch.empty(shape, dtype=getattr(torch, dtype))
            with self._collective():
                dist.broadcast(found[name], src=self._first, group=self._process_group)
        return found

    def divide(self, work: Callable[[Tensor], Tensor], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `work(rows)`: each rank computes its share of the rows. `work` must treat each row independently.

        The results travel as `dtype`, which must represent them exactly. No rank sends rows that it does not have.
        """
        found = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        for rank, share in enumerate(found.tensor_split(self.world_size)):
            if rank == self.rank and len(share):
                share.copy_(work(rows.tensor_split(self.world_size)[rank]))
        with self._collective():
            for rank, share in enumerate(found.tensor_split(self.world_size)):
                if len(share):
                    dist.broadcast(share, src=self._first + rank, group=self._process_group)
        return found.to(rows.dtype)


def connect(relay: bool = False) -> tuple[DistributedGroup, Any]:
    """Join the ranks that torchrun's environment variables describe; return the group and its rendezvous store.

    Raises ConfigError, naming a host, where packages, code, hardware or clocks of the nodes differ. With `relay`, a
    watchdog reports as JSON lines.
    """
    ranks = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    rank, world_size, local_rank, local_world_size = ranks
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # connects only ranks that exchange, not each to each
    with _peers():
        store = _open_store(rank, world_size, local_world_size)
        watchdog = watch(rank, world_size, store, relay, hardware(local_world_size))
        if local_world_size < world_size and (interface := _interface(own_address())) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # else it is that of the host's name
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        group = DistributedGroup(ranks, watchdog)
        if local_world_size == 1:
            group.node = Group()
        elif local_world_size < world_size:
            first = rank - local_rank
            members = list(range(first, first + local_world_size))
            inside = dist.new_group(members, timeout=TIMEOUT, backend=backend, use_local_synchronization=True)
            local = [local_rank, local_world_size, local_rank, local_world_size]
            group.node = DistributedGroup(local, watchdog, first, inside)
    return group, store


def _open_store(rank: int, world_size: int, local_world_size: int) -> Any:
    """The rendezvous store of all ranks; on one machine the first rank serves it on loopback alone.

    torch itself listens on all interfaces, without a password.
    """
    if local_world_size < world_size or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(rendezvous("env://"))
        return store
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    port = int(os.environ["MASTER_PORT"])
    new_store = partial(dist.TCPStore, LOOPBACK, port, world_size, timeout=STORE_TIMEOUT)  # type: ignore[attr-defined]
    if rank > 0:
        return new_store(is_master=False)
    try:
        server = socket.create_server((LOOPBACK, port), backlog=world_size)
    except OSError as error:
        raise PeerLostError(f"cannot listen on {LOOPBACK}, port {port}: {error}") from error
    return new_store(is_master=True, master_listen_fd=server.detach())  # the store closes the socket


def hardware(local_world_size: int) -> dict[str, Any]:
    """What the bits of a matrix product depend on: each node orthogonalises all of Muon's matrices for itself."""
    return {
        "ranks": local_world_size,
        "CPU cores": os.cpu_count(),
        "CPU instructions": torch.backends.cpu.get_cpu_capability(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _interface(address: str) -> str | None:
    """The network interface that has an address; None where this machine does not know it."""
    for name, known in psutil.net_if_addrs().items():
        if address in (entry.address for entry in known):
            return name
    return None


def disconnect() -> None:
    """Leave the group."""
    dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(str(error)) from error
