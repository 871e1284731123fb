"""The batches of a training order are the same for every reader, from any step on."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.conftest import PROCESSES, publish_shards
from vectorclm.dataset import StreamingLanguageModelDataset, document_labels, position_ids
from vectorclm.nn.loss import IGNORE_INDEX
from vectorclm.runtime.group import Group
from vectorclm.shards.order import MixturePhase, TrainingOrder
from vectorclm.shards.reader import ShardReader, open_shards
from vectorclm.tokenizer import BOS_ID, EOS_ID

SIZES = {"a": 3000, "b": 900}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ShardReader]]:
    """Windows that hold their own number (and a million for source b), a thousand in a shard."""
    folder, sources = tmp_path_factory.mktemp("store"), {}
    for label, size in SIZES.items():
        numbers = np.arange(size)[:, None] + np.zeros((1, 4), np.uint32) + (1_000_000 if label == "b" else 0)
        sources[label] = {"input_ids": numbers.astype(np.uint32)}
    with open_shards(publish_shards(str(folder), folder / "work", sources, 8000), "train") as opened:
        yield opened


ORDER = TrainingOrder([MixturePhase(300, {"a": 0.5, "b": 0.5})], SIZES, seed=1, windows_per_block=8)


def hashes(readers: dict[str, ShardReader], world_size: int, workers: int) -> list[str]:
    """SHA-256 of each global batch, put together from what the ranks' loaders give."""
    loaders = [
        DataLoader(
            StreamingLanguageModelDataset(readers, ORDER, 25, Group(rank, world_size)),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=PROCESSES if workers else None,
        )
        for rank in range(world_size)
    ]
    found = []
    for parts in zip(*loaders, strict=True):
        whole = torch.empty(25, 4, dtype=torch.int64)
        for rank, part in enumerate(parts):
            whole[rank::world_size] = part.input_ids
        found.append(hashlib.sha256(whole.numpy().tobytes()).hexdigest())
    return found


def test_ranks_and_workers_only_slice_the_same_batches(readers: dict[str, ShardReader]) -> None:
    expected = hashes(readers, 1, 0)
    assert len(set(expected)) == 12
    for world_size in (1, 3, 8):  # of which the last two do not divide a batch of 25
        for workers in (0, 1):
            assert hashes(readers, world_size, workers) == expected, (world_size, workers)
    assert hashes(readers, 1, 2) == expected


def test_more_ranks_than_rows_get_empty_batches(readers: dict[str, ShardReader]) -> None:
    batches = list(StreamingLanguageModelDataset(readers, ORDER, 2, Group(2, 3)))
    assert len(batches) == 150 and all(batch.input_ids.shape == (0, 4) for batch in batches)


def test_a_resumed_stream_is_the_rest_of_the_whole(readers: dict[str, ShardReader]) -> None:
    whole = list(StreamingLanguageModelDataset(readers, ORDER, 24))
    rest = list(StreamingLanguageModelDataset(readers, ORDER, 24, start_step=7))
    assert len(whole) == 12 and len(rest) == 5
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(whole[7:], rest, strict=True))
    assert list(StreamingLanguageModelDataset(readers, ORDER, 24, start_step=12)) == []


def test_the_windows_of_a_step_are_named_by_shard(readers: dict[str, ShardReader]) -> None:
    dataset = StreamingLanguageModelDataset(readers, ORDER, 25)
    found = []
    for part in dataset.describe(3).split("; "):
        shard, _, windows = part.partition(" ")
        label, number = shard[0], int(shard.removesuffix(".arrow")[-1])
        found += [number * 1000 + int(window) + (1_000_000 if label == "b" else 0) for window in windows.split(", ")]
    assert sorted(found) == sorted(list(dataset)[3].input_ids[:, 0].tolist())


def test_labels_follow_the_supervision(tmp_path: Path) -> None:
    supervised = np.array([[0, 0, 1, 1], [0, 1, 0, 0]], np.uint8)
    sources = {"chat": {"input_ids": np.arange(8, dtype=np.uint16).reshape(2, 4), "supervised": supervised}}
    artifact = publish_shards(str(tmp_path / "store"), tmp_path / "work", sources, 4096)
    order = TrainingOrder([MixturePhase(2, {"chat": 1.0})], {"chat": 2}, seed=0, windows_per_block=1)
    with open_shards(artifact, "train") as readers:
        (batch,) = StreamingLanguageModelDataset(readers, order, 2)
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        expected = {0: [IGNORE_INDEX, IGNORE_INDEX, 2, 3], 4: [IGNORE_INDEX, 5, IGNORE_INDEX, IGNORE_INDEX]}
        assert labels == expected[ids[0]]


@pytest.mark.parametrize("apart", [True, False])
def test_text_beside_conversations_has_the_labels_of_pretraining(tmp_path: Path, apart: bool) -> None:
    bos, eos = BOS_ID, EOS_ID
    text = np.array([[bos, 9, eos, bos, 8, 7], [bos, 9, 8, eos, 6, 5]], np.uint16)
    talk = np.array([[bos, 1, 20, 21, 22, 1], [bos, 1, 30, 31, 32, 33], [bos, 1, 40, 41, 42, 43]], np.uint16)
    marked = np.array([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]], np.uint8)
    one = publish_shards(str(tmp_path / "a"), tmp_path / "work", {"a": {"input_ids": text}}, 4096)
    columns = {"chat": {"input_ids": talk, "supervised": marked}}
    two = publish_shards(str(tmp_path / "b"), tmp_path / "work", columns, 4096)
    order = TrainingOrder([MixturePhase(10, {"a": 0.4, "chat": 0.6})], {"a": 2, "chat": 3}, seed=0, windows_per_block=1)
    with open_shards(one, "train") as texts, open_shards(two, "train") as talks:
        (batch,) = StreamingLanguageModelDataset({**texts, **talks}, order, 10, document_mask=apart)
    expected = document_labels(text.astype(np.int64), position_ids(text.astype(np.int64)) if apart else None)
    wanted = {tuple(ids): labels for ids, labels in zip(text.tolist(), expected.tolist(), strict=True)}
    wanted |= {
        tuple(ids): np.where(mask, ids, IGNORE_INDEX).tolist()
        for ids, mask in zip(talk.tolist(), marked.tolist(), strict=True)
    }
    ids = [tuple(row) for row in batch.input_ids.tolist()]
    assert sorted(ids.count(row) for row in wanted) == [2] * 5
    assert batch.labels.tolist() == [wanted[row] for row in ids]
