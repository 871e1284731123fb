"""Continuous batching: each sequence gets the tokens that it gets alone, whoever comes, goes and waits beside it."""

import random

import pytest
import torch
from torch import Tensor

from tests.conftest import random_model
from tests.nn.kinds import KINDS, registered, with_attention
from tests.test_model import CONFIG
from vectorclm.bench.inference import differing_tokens
from vectorclm.inference import batch as batch_module
from vectorclm.inference.batch import BatchSequence, ContinuousBatch, rows_that_fit
from vectorclm.inference.generate import generate
from vectorclm.model import CausalLM

LENGTH = CONFIG.max_position_embeddings


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_model(CONFIG).eval()


def prompts(sizes: list[int]) -> list[list[int]]:
    draw = random.Random(4)
    return [[draw.randrange(5, CONFIG.vocab_size) for _ in range(size)] for size in sizes]


def run(batch: ContinuousBatch[BatchSequence], waiting: dict[int, list[BatchSequence]], ends: dict[int, int]) -> None:
    """Generate: at each step the sequences of `waiting` arrive where there is room; `ends` are the final lengths."""
    late: list[BatchSequence] = []
    for number in range(200):
        late += waiting.get(number, [])
        while late and len(batch) < batch.size:
            batch.add(late.pop(0))
        for sequence, logits_TV in batch.step():
            sequence.ids.append(int(logits_TV[-1].argmax()))
            if len(sequence.ids) >= ends[id(sequence)]:
                batch.remove(sequence)
        assert len(batch.rows) <= batch.size
    assert not late and not len(batch)


@pytest.mark.parametrize("steady", [False, True])
def test_sequences_that_come_and_go_get_the_tokens_of_one_at_a_time(
    model: CausalLM, steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine sequences for four rows, prompts in pieces of 7 tokens; the longest fills the context."""
    monkeypatch.setattr(batch_module, "PIECE", 7)
    sizes, arrivals, new = (
        [3, 30, 1, 12, 7, 8, 14, 40, 5],
        [0, 0, 1, 2, 2, 2, 9, 9, 30],
        [9, 20, 30, 1, 5, 12, 2, 24, 6],
    )
    given = prompts(sizes)
    sequences = [BatchSequence(list(ids)) for ids in given]
    waiting: dict[int, list[BatchSequence]] = {}
    for sequence, arrival in zip(sequences, arrivals, strict=True):
        waiting.setdefault(arrival, []).append(sequence)
    ends = {id(sequence): size + more for sequence, size, more in zip(sequences, sizes, new, strict=True)}
    run(ContinuousBatch(model, 4, steady=steady), waiting, ends)
    assert max(len(sequence.ids) for sequence in sequences) == LENGTH
    for sequence, ids, more in zip(sequences, given, new, strict=True):
        alone = list(generate(model, ids, more, stop_ids=()))
        assert differing_tokens(model, ids, alone, sequence.ids[len(ids) :]) == (0, 0)


def test_a_sequence_that_leaves_early_changes_nothing_for_the_others(model: CausalLM) -> None:
    """It leaves from the queue of prompts, while its prompt is read, and from the middle of the rows."""
    given = prompts([20, 6, 9, 300 % LENGTH, 11])
    stays, leaves = [BatchSequence(list(given[i])) for i in (0, 2, 4)], [BatchSequence(list(given[i])) for i in (1, 3)]
    batch: ContinuousBatch[BatchSequence] = ContinuousBatch(model, 6)
    for sequence in (stays[0], leaves[0], stays[1]):
        batch.add(sequence)

    def step() -> None:
        for sequence, logits_TV in batch.step():
            sequence.ids.append(int(logits_TV[-1].argmax()))

    step()
    batch.remove(leaves[0])
    batch.add(leaves[1])
    batch.remove(leaves[1])
    batch.add(stays[2])
    for _ in range(12):
        step()
    assert [len(sequence.ids) for sequence in stays] == [20 + 13, 9 + 13, 11 + 12]
    for sequence, ids in zip(stays, (given[0], given[2], given[4]), strict=True):
        assert sequence.ids[len(ids) :] == list(generate(model, ids, 13, stop_ids=()))[: len(sequence.ids) - len(ids)]


def test_all_logits_of_a_prompt_come_in_pieces(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "PIECE", 8)
    (ids,) = prompts([21])
    sequence, pieces = BatchSequence(list(ids), all_logits=True), list[Tensor]()
    batch: ContinuousBatch[BatchSequence] = ContinuousBatch(model, 1)
    batch.add(sequence)
    while sequence.cached < 21:
        pieces += [logits_TV for _, logits_TV in batch.step()]
    assert [len(piece) for piece in pieces] == [8, 8, 5]
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat(pieces), model(torch.tensor([ids]))[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention_runs_in_a_batch(kind: str) -> None:
    with registered(kind):
        model = random_model(with_attention(CONFIG, kind)).eval()
        given = prompts([13, 5, 21])
        sequences = [BatchSequence(list(ids)) for ids in given]
        batch: ContinuousBatch[BatchSequence] = ContinuousBatch(model, 3)
        run(batch, {0: sequences}, {id(sequence): len(sequence.ids) + 15 for sequence in sequences})
        for sequence, ids in zip(sequences, given, strict=True):
            assert sequence.ids[len(ids) :] == list(generate(model, ids, 15, stop_ids=()))


def test_a_batch_has_as_many_rows_as_its_cache_has_memory_for(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batch: ContinuousBatch[BatchSequence] = ContinuousBatch(model, 1)
    row = sum(tensor.nbytes for tensor in (*batch.cache.keys_BKSE, *batch.cache.values_BKSE))
    assert rows_that_fit(model) == batch_module.ROWS
    for memory, rows in ((3 * row, 3), (3 * row - 1, 2), (1, 1)):
        monkeypatch.setattr(batch_module, "CACHE_BYTES", memory)
        assert rows_that_fit(model) == rows
