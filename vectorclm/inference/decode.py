"""Decoding with a KV cache, one token a step; on a GPU each step replays a CUDA graph.

A decoding step of a small model is hundreds of short kernels, and a GPU finishes each before Python launches the next.
A CUDA graph launches all of them at once. It repeats the same work on the same memory, so the position of the token is
a tensor, and attention reads the whole cache with a mask.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from vectorclm.model import CausalLM, KVCache

WARM_UP = 3  # steps before a capture, in which libraries allocate their memory


def decoding(
    model: CausalLM, batch_size: int, length: int, padding_B: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """Return a function that maps the next tokens [B, T] to the logits [B, V] after the last of them.

    The first call takes the prompts, each later call one token for each prompt. A prompt and its continuation have at
    most `length` tokens. `padding_B` is the number of padding tokens at the left of each prompt.
    """
    if model.model.embed_tokens.weight.is_cuda:
        return SteadyDecoding(model, batch_size, length, padding_B, captured=True)
    cache = model.new_cache(batch_size, length)
    return lambda input_ids: model.next_logits(input_ids, cache, padding_B)


class _SteadyCache(KVCache):
    """A KV cache that writes the newest token at a position given by a tensor, and returns its whole memory."""

    def __init__(self, model: CausalLM, batch_size: int, length: int) -> None:
        like = model.model.embed_tokens.weight
        super().__init__(model.config, batch_size, length, like)
        self.position_1 = torch.zeros(1, dtype=torch.long, device=like.device)

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        if k_BKTE.shape[2] > 1:
            return super().append(layer, k_BKTE, v_BKTE)
        keys_BKSE, values_BKSE = self.keys_BKSE[layer], self.values_BKSE[layer]
        return keys_BKSE.index_copy_(2, self.position_1, k_BKTE), values_BKSE.index_copy_(2, self.position_1, v_BKTE)


class SteadyDecoding:
    """Decoding in which each step is the same work on the same memory; with `captured`, steps replay a CUDA graph."""

    def __init__(
        self, model: CausalLM, batch_size: int, length: int, padding_B: Tensor | None = None, *, captured: bool
    ) -> None:
        self.model, self.padding_B, self.captured = model, padding_B, captured
        self.cache = _SteadyCache(model, batch_size, length)
        self.position_1 = self.cache.position_1
        self.positions_S = torch.arange(length, device=self.position_1.device)
        padding_B1 = self.position_1.new_zeros(batch_size, 1) if padding_B is None else padding_B[:, None]
        self.key_position_ids_BS = (self.positions_S - padding_B1).clamp(min=0)
        self.fed_B1 = self.position_1.new_zeros(batch_size, 1)
        self.logits_BV: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.begun = False

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return logits [B, V], which the next call overwrites. Raises ValueError as `CausalLM.next_logits` does."""
        if not self.begun:
            self.begun = True
            self.position_1.fill_(input_ids.shape[1])
            if input_ids.shape[1] > 1:
                return self.model.next_logits(input_ids, self.cache, self.padding_B)
            self.position_1.zero_()
        self.fed_B1.copy_(input_ids)
        if self.captured and self.graph is None:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()
        assert self.logits_BV is not None
        return self.logits_BV

    def _step(self) -> None:
        position_ids_B1, seen_BS = self.position_1.expand(len(self.fed_B1), 1), self.positions_S <= self.position_1
        if self.padding_B is not None:
            position_ids_B1 = position_ids_B1 - self.padding_B[:, None]
            seen_BS = seen_BS & (self.positions_S >= self.padding_B[:, None])
        seen_B1S = seen_BS.expand(len(self.fed_B1), -1)[:, None]
        hidden_B1D = self.model.model(
            self.fed_B1, self.cache, position_ids_B1, seen_B1S, key_position_ids_BS=self.key_position_ids_BS
        )
        self.logits_BV = self.model.logits(hidden_B1D[:, -1])
        self.position_1.add_(1)

    def _capture(self) -> None:
        position_1 = self.position_1.clone()

        def undone() -> None:
            self.position_1.copy_(position_1)

        self.graph, _ = capture_graph(self._step, undone)


T = TypeVar("T")


def capture_graph(step: Callable[[], T], undo: Callable[[], None] | None = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture a step as a CUDA graph, and return the graph and what the step returns, which each replay overwrites.

    Steps of a warm-up run before, on another stream; `undo` reverses the effects of one. The captured step itself has
    no effect before the graph is replayed.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
            if undo is not None:
                undo()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = step()
    return graph, returned
