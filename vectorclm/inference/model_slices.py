"""Calls of a model that the workers of a stage divide among themselves, each with a copy of the model on its CPU."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vectorclm.model import CausalLM
from vectorclm.runtime.workers import Shared, Workers, current_workers

_shared: WeakKeyDictionary[CausalLM, tuple[Workers, Shared]] = WeakKeyDictionary()  # the models of this process


def by_model(model: CausalLM, work: Callable[..., Any], calls: Iterable[tuple[Any, ...]], *same: Any) -> Iterator[Any]:
    """The results of `work(model, *same, *arguments)` for each call, in order, by the `current_workers`.

    The workers compute with as many threads as this process. A call that computes the same tokens in the same batch
    has the same result wherever it runs.
    """
    workers = current_workers()
    shared, rest = _handle(model, workers), workers.share(same)
    yield from workers.each(_call, ((work, shared, rest, *arguments) for arguments in calls))


def _handle(model: CausalLM, workers: Workers) -> Shared:
    """The model for workers; it travels to them once, whatever calls it later."""
    if not workers.ahead:  # this process, where it does not travel
        return workers.share((model, torch.get_num_threads()))
    if model not in _shared or _shared[model][0] is not workers:
        _shared[model] = workers, workers.share((model, torch.get_num_threads()))
    return _shared[model][1]


def _call(work: Callable[..., Any], shared: Shared, rest: Shared, *arguments: Any) -> Any:
    model, threads = shared.value()
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return work(model, *rest.value(), *arguments)
