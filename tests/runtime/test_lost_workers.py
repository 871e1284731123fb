"""A loader worker that is killed ends a training with an error of its own, and another error stays what it is."""

from collections.abc import Iterator

import psutil
import pytest
from torch.utils.data import DataLoader, IterableDataset

from vectorclm.errors import VectorCLMError
from vectorclm.runtime.lost_workers import lost_workers_explained


class Numbers(IterableDataset[int]):
    """Batches without an end."""

    def __iter__(self) -> Iterator[int]:
        number = 0
        while True:
            yield (number := number + 1)


def test_a_killed_loader_worker_is_named_with_what_to_do() -> None:
    with pytest.raises(VectorCLMError, match=r"DataLoader worker .* run the same again"), lost_workers_explained():
        batches = iter(DataLoader(Numbers(), batch_size=None, num_workers=1, multiprocessing_context="forkserver"))
        assert int(next(batches)) == 1
        for process in psutil.Process().children(recursive=True):
            if "forkserver" in " ".join(process.cmdline()) and process.ppid() != psutil.Process().pid:
                process.kill()
        for _ in range(10_000):
            next(batches)


def test_another_error_stays() -> None:
    with pytest.raises(RuntimeError, match="shapes") as found, lost_workers_explained():
        raise RuntimeError("shapes differ")
    assert not isinstance(found.value, VectorCLMError)
