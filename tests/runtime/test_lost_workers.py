"""A loader worker that is killed ends a training with an error of its own, and another error stays what it is."""

from collections.abc import Iterator

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from vectorclm.errors import VectorCLMError
from vectorclm.runtime.lost_workers import lost_workers_explained


class Batches(IterableDataset[Tensor]):
    """Tensors without an end, which travel by the worker's socket."""

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.ones(1000)


@pytest.mark.parametrize("signalled", [True, False])
def test_a_killed_loader_worker_is_named_with_what_to_do(signalled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the signal of its death comes first, or the end of its socket."""
    if not signalled:
        monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_error_if_any_worker_fails", lambda: None)
    with (
        pytest.raises(VectorCLMError, match=r"DataLoader worker.*: run the same again"),
        lost_workers_explained(1),
    ):
        batches = iter(DataLoader(Batches(), batch_size=None, num_workers=1, multiprocessing_context="forkserver"))
        assert next(batches).sum() == 1000
        own = psutil.Process()
        killed = [each for each in own.children(recursive=True) if is_loader(each) and each.ppid() != own.pid]
        assert killed
        for process in killed:
            process.kill()
        psutil.wait_procs(killed)
        for _ in range(10_000):
            next(batches)


def is_loader(process: psutil.Process) -> bool:
    return "forkserver" in " ".join(process.cmdline())


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ConnectionResetError("of a server"), EOFError()])
def test_another_error_stays(error: Exception) -> None:
    with pytest.raises(type(error)) as found, lost_workers_explained(0):
        raise error
    assert found.value is error
