"""The order of windows is a pure function of plan, seed and step: exact mix, no repeat, same for every reader."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vectorclm.dataset import BLOCK, CurriculumPlan, StreamingLanguageModelDataset, permute, quotas
from vectorclm.errors import ConfigError
from vectorclm.loss import IGNORE_INDEX
from vectorclm.shards import Windows

SIZES = {"a": 3000, "b": 900}


def shards(label: str) -> list[Windows]:
    """Two shards whose windows hold their own number (and a million for source b)."""
    numbers = np.arange(SIZES[label])[:, None] + np.zeros((1, 4), int) + (1_000_000 if label == "b" else 0)
    cut = SIZES[label] // 3
    return [Windows(numbers[:cut], None), Windows(numbers[cut:], None)]


def make(plan: CurriculumPlan, batch_size: int = 24, **options: int) -> StreamingLanguageModelDataset:
    return StreamingLanguageModelDataset({label: shards(label) for label in SIZES}, plan, batch_size, **options)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 4097])
def test_permute_is_a_permutation_that_depends_on_its_key(size: int) -> None:
    first = permute(np.arange(size), size, key=1)
    assert sorted(first) == list(range(size))
    if size > 100:
        assert (first != permute(np.arange(size), size, key=2)).mean() > 0.9
        assert (first != np.arange(size)).mean() > 0.9


def test_quotas_are_whole_and_sum_up() -> None:
    assert quotas([0.5, 0.25, 0.25], 10) == [5, 3, 2]
    assert sum(quotas([0.1, 0.2, 0.7], 1024)) == 1024


def test_the_mix_is_exact_at_every_block_and_counters_go_on_across_phases() -> None:
    plan = CurriculumPlan([(2 * BLOCK, {"a": 0.75, "b": 0.25}), (BLOCK, {"a": 0.5, "b": 0.5})], SIZES, seed=7)
    source, window = plan.locate(np.arange(plan.windows))
    for block, share in enumerate([0.75, 0.75, 0.5]):
        assert (source[block * BLOCK : (block + 1) * BLOCK] == 0).sum() == share * BLOCK
    assert plan.used == {"a": 2048, "b": 1024}
    assert plan.epochs() == {"a": 2048 / 3000, "b": 1024 / 900}
    seen = Counter(zip(source.tolist(), window.tolist(), strict=True))
    assert max(seen[0, i] for i in range(3000)) == 1  # not exhausted: nothing twice
    assert Counter(seen[1, i] for i in range(900)) == {1: 776, 2: 124}  # all of it before any of it again
    first_epoch = window[source == 1][:900]
    assert sorted(first_epoch) == list(range(900))


def test_another_epoch_has_another_order() -> None:
    plan = CurriculumPlan([(1800, {"b": 1.0})], {"b": 900}, seed=7)
    _, window = plan.locate(np.arange(1800))
    assert sorted(window[:900]) == sorted(window[900:])
    assert (window[:900] != window[900:]).mean() > 0.9


def test_any_place_is_the_same_alone_as_in_a_range() -> None:
    plan = CurriculumPlan([(1500, {"a": 0.9, "b": 0.1}), (1500, {"a": 0.2, "b": 0.8})], SIZES, seed=3)
    together = np.stack(plan.locate(np.arange(3000)))
    for place in (0, 1023, 1024, 1499, 1500, 2523, 2524, 2999):
        assert np.array_equal(np.stack(plan.locate(np.array([place])))[:, 0], together[:, place])


def test_ranks_and_workers_only_slice_the_same_batches() -> None:
    plan = CurriculumPlan([(240, {"a": 0.5, "b": 0.5})], SIZES, seed=1)
    whole = [batch.input_ids for batch in make(plan)]
    assert len(whole) == 10
    with_workers = DataLoader(make(plan), batch_size=None, num_workers=2)
    assert all(torch.equal(a, b.input_ids) for a, b in zip(whole, with_workers, strict=True))
    for world_size in (2, 5):
        ranks = [list(make(plan, rank=rank, world_size=world_size)) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            for rank in range(world_size):
                assert torch.equal(ranks[rank][step].input_ids, batch[rank::world_size])


def test_a_resumed_stream_is_the_rest_of_the_whole() -> None:
    plan = CurriculumPlan([(240, {"a": 0.5, "b": 0.5})], SIZES, seed=1)
    whole, rest = list(make(plan)), list(make(plan, start_step=7))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(whole[7:], rest, strict=True))


def test_labels_follow_the_supervision() -> None:
    windows = Windows(np.arange(8).reshape(2, 4), np.array([[0, 0, 1, 1], [0, 1, 0, 0]], np.uint8))
    plan = CurriculumPlan([(2, {"chat": 1.0})], {"chat": 2}, seed=0)
    (batch,) = StreamingLanguageModelDataset({"chat": [windows]}, plan, 2)
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        expected = {0: [IGNORE_INDEX, IGNORE_INDEX, 2, 3], 4: [IGNORE_INDEX, 5, IGNORE_INDEX, IGNORE_INDEX]}
        assert labels == expected[ids[0]]


def test_an_unknown_source_is_named() -> None:
    with pytest.raises(ConfigError, match="weighs c, but the sources are a, b"):
        CurriculumPlan([(10, {"c": 1.0})], SIZES, seed=0)
