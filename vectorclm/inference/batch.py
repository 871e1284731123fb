"""Continuous batching: sequences of any length share each decoding step; they come and go between two steps.

A decoding step reads all weights, whether for one token or for one token of each of many sequences, so many take little
longer than one (iteration-level scheduling: Yu et al., Orca, OSDI 2022). A prompt is read in a cache of its own, in
pieces, so that a long one does not hold up the others (Agrawal et al., Sarathi-Serve, arXiv 2403.02310); its keys and
values then move into a row of the batch. The rows in use are the first ones: where a sequence leaves, the last row
takes its place. Shape letters: model.py; R is the number of rows.
"""

from collections import deque
from copy import copy
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from vectorclm.inference.decode import capture_graph
from vectorclm.model import CausalLM, KVCache

PIECE = 256  # tokens of prompts that are read in one step
ROWS = 16  # sequences that are generated at once, where the cache's memory allows
CACHE_BYTES = 2**30  # of all rows together


@dataclass(eq=False)
class BatchSequence:
    """A sequence of token ids in a batch; the owner appends each new token to `ids`."""

    ids: list[int]
    all_logits: bool = False  # whether the logits after every token of the prompt are wanted, not only after the last
    cached: int = 0  # tokens whose keys and values are computed


class BatchCache(KVCache):
    """A KV cache whose rows have lengths of their own: `append` writes a token of each row behind the row's others."""

    def __init__(self, model: CausalLM, rows: int, length: int) -> None:
        like = model.model.embed_tokens.weight
        super().__init__(model.config, rows, length, like)
        self.rows_R = torch.arange(rows, device=like.device)
        self.lengths_R = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.plain = model.new_cache(1, 0)
        self.plain.keys_BKSE = [keys_RKSE[:1] for keys_RKSE in self.keys_BKSE]
        self.plain.values_BKSE = [values_RKSE[:1] for values_RKSE in self.values_BKSE]
        self.reach = length  # keys that a step reads: the longest row's, its new token included

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        used, (keys_RKSE, values_RKSE) = len(k_BKTE), (self.keys_BKSE[layer], self.values_BKSE[layer])
        place = (self.rows_R[:used], slice(None), self.lengths_R[:used])
        keys_RKSE[place] = k_BKTE[:, :, 0]
        values_RKSE[place] = v_BKTE[:, :, 0]
        return keys_RKSE[:used, :, : self.reach], values_RKSE[:used, :, : self.reach]

    def copy_row(self, row: int, source: KVCache, source_row: int, length: int) -> None:
        """Copy the first `length` tokens of a row of another cache, or of this one."""
        for mine, others in ((self.keys_BKSE, source.keys_BKSE), (self.values_BKSE, source.values_BKSE)):
            for to_RKSE, from_RKSE in zip(mine, others, strict=True):
                to_RKSE[row, :, :length] = from_RKSE[source_row, :, :length]

    def first_row(self, length: int) -> KVCache:
        """A plain cache of the first row, which has `length` tokens, in the same memory."""
        row = copy(self.plain)
        row.seen = length
        return row


def rows_that_fit(model: CausalLM) -> int:
    """Rows of a batch for this model: ROWS, or as many as CACHE_BYTES hold, but one at least."""
    config, weight = model.config, model.model.embed_tokens.weight
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return max(1, min(ROWS, CACHE_BYTES // (config.max_position_embeddings * width * weight.element_size())))


S = TypeVar("S", bound=BatchSequence)


class ContinuousBatch(Generic[S]):
    """The sequences that a model generates at once, at most `size` of them.

    The owner adds sequences, appends a token to `ids` of each sequence whose last logits a step returned, and removes
    finished sequences. With `steady`, each step has the same shapes on the same memory, and on a GPU replays a CUDA
    graph; otherwise a step computes the rows and keys in use only.
    """

    def __init__(self, model: CausalLM, size: int, *, steady: bool | None = None) -> None:
        self.model, self.size, self.length = model, size, model.config.max_position_embeddings
        self.is_cuda = model.model.embed_tokens.weight.is_cuda
        self.steady = self.is_cuda if steady is None else steady
        self.cache = BatchCache(model, size, self.length)
        self.rows: list[S] = []  # row r of the cache holds the keys and values of rows[r]
        self.prompts: deque[S] = deque()  # sequences whose prompt is not read yet, in their order
        self.prompt_cache = model.new_cache(1, self.length)  # of the first of `prompts`
        self.key_positions_S = torch.arange(self.length, device=self.cache.rows_R.device)
        self.fed_R1 = torch.zeros(size, 1, dtype=torch.long, device=self.cache.rows_R.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by the number of rows

    def __len__(self) -> int:
        return len(self.rows) + len(self.prompts)

    def add(self, sequence: S) -> None:
        """Add a sequence, whose prompt the next steps read. The batch must have room for it."""
        assert len(self) < self.size
        self.prompts.append(sequence)

    def remove(self, sequence: S) -> None:
        """Remove a sequence; the last row takes the place of its row."""
        if sequence in self.prompts:
            if sequence is self.prompts[0]:
                self.prompt_cache.seen = 0
            self.prompts.remove(sequence)
            return
        row, last = self.rows.index(sequence), self.rows.pop()
        if last is not sequence:
            self.cache.copy_row(row, self.cache, len(self.rows), last.cached)
            self.rows[row] = last

    @torch.inference_mode()
    def step(self) -> list[tuple[S, Tensor]]:
        """One token of each row, and a piece of the prompts; returns the new logits [T, V] of each sequence.

        They are the logits after the last T of the sequence's `cached` tokens. A sequence whose prompt is not read to
        its end is missing, unless it wants all logits.
        """
        found = []
        if self.rows:
            logits_RV = self._decode()
            found = [(sequence, logits_RV[row : row + 1]) for row, sequence in enumerate(self.rows)]
        return found + self._read_prompts()

    def _read_prompts(self) -> list[tuple[S, Tensor]]:
        found, room = [], PIECE
        while self.prompts and room > 0:
            sequence = self.prompts[0]
            piece = sequence.ids[sequence.cached : sequence.cached + room]
            room -= len(piece)
            ids_1T = torch.tensor([piece], device=self.fed_R1.device)
            read = self.model if sequence.all_logits else self.model.next_logits
            logits_TV = read(ids_1T, self.prompt_cache).view(-1, self.model.config.vocab_size)
            sequence.cached += len(piece)
            is_read = sequence.cached == len(sequence.ids)
            if is_read:
                self.cache.copy_row(len(self.rows), self.prompt_cache, 0, sequence.cached)
                self.prompt_cache.seen = 0
                self.rows.append(self.prompts.popleft())
            if is_read or sequence.all_logits:
                found.append((sequence, logits_TV))
        return found

    def _decode(self) -> Tensor:
        """Logits [R, V] after the newest token of each row."""
        used = len(self.rows)
        if used == 1 and not self.steady:  # without a mask and positions, a sequence alone is faster
            (sequence,) = self.rows
            cache = self.cache.first_row(sequence.cached)
            sequence.cached += 1
            fed_11 = torch.tensor([sequence.ids[-1:]], device=self.fed_R1.device)
            return self.model.next_logits(fed_11, cache)
        rows = min(1 << (used - 1).bit_length(), self.size) if self.steady else used  # few numbers of rows: few graphs
        spare = [0] * (rows - used)  # rows without a sequence compute something that nobody reads
        fed_R = torch.tensor([sequence.ids[-1] for sequence in self.rows] + spare)
        lengths_R = torch.tensor([sequence.cached for sequence in self.rows] + spare)
        self.fed_R1[:rows, 0] = fed_R
        self.cache.lengths_R[:rows] = lengths_R
        self.cache.reach = self.length if self.steady else int(lengths_R.max()) + 1
        for sequence in self.rows:
            sequence.cached += 1
        if not self.is_cuda:
            return self._compute(rows)[:used]
        if rows not in self.graphs:
            self.graphs[rows] = capture_graph(lambda: self._compute(rows))
        graph, logits_RV = self.graphs[rows]
        graph.replay()
        return logits_RV[:used]

    def _compute(self, rows: int) -> Tensor:
        positions_S, lengths_R1 = self.key_positions_S[: self.cache.reach], self.cache.lengths_R[:rows, None]
        hidden_R1D = self.model.model(
            self.fed_R1[:rows],
            self.cache,
            lengths_R1,
            positions_S <= lengths_R1[:, :, None],
            key_position_ids_BS=positions_S.expand(rows, -1),
        )
        return self.model.logits(hidden_R1D[:, -1])
