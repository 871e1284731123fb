"""The group of ranks that train together, and the group of a process that works alone."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # a process alone needs no torch here
    from torch import Tensor, dtype

Value = TypeVar("Value", bound=int | str | None)


class PeerLostError(RuntimeError):
    """Another rank has ended; that rank or the launcher reports the cause."""


class Group:
    """The ranks that train together, and this process's rank. All ranks call each method, in the same order.

    These methods are those of a process alone; `DistributedGroup` has those of several ranks.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, local_world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size  # among the ranks of this machine
        self.at_work = False
        self.node: Group = self  # the ranks of this machine

    def share(self, value: Value, source: int = 0) -> Value:
        """Broadcast the `value` of one rank, the first if none is named, and return it."""
        return value

    def call(self, task: str | None = None) -> str | None:
        """Broadcast the first rank's `task`, which all ranks begin; None releases the other ranks (see `joined`)."""
        return task

    def total(self, count: int) -> int:
        """The sum of `count` over the ranks; waits for the ranks, not for a device."""
        return self.agree(count, stop=False)[0]

    def agree(self, count: int, stop: bool) -> tuple[int, bool]:
        """The sum of `count` over the ranks, and whether any rank wants to stop."""
        return count, stop

    def add(self, tensors: "Sequence[Tensor]") -> None:
        """Replace each tensor (all of one type) by its sum over the ranks."""

    def copies(self, tensors: "Mapping[str, Tensor] | None") -> "Mapping[str, Tensor]":
        """Broadcast the first rank's named tensors, which are in host memory; return them on all ranks."""
        return tensors or {}

    def divide(self, work: "Callable[[Tensor], Tensor]", rows: "Tensor", dtype: "dtype") -> "Tensor":
        """Return `work(rows)`: each rank computes its share of the rows. `work` must treat each row independently.

        The results travel as `dtype`, which must represent them exactly.
        """
        return work(rows)

    def limit_hangs(self, seconds: float) -> None:
        """End all ranks where no rank moves for so many seconds in a step, or one gives no sign of life; 0 = never."""

    def moved(self) -> None:
        """Report that this rank is alive in a step, as after each micro-batch."""

    def steps(self, expected: bool = True) -> AbstractContextManager[None]:
        """Say that the block is made of steps, in which all ranks move; with False, that the first rank works alone."""
        return nullcontext()

    def leave(self, kind: str = "", reason: str = "") -> None:
        """Tell the other ranks that this one ends on purpose, or the error that ends it."""


ALONE = Group()
