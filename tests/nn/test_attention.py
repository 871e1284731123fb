"""Packed is the same as alone: positions, labels, and the loss of every token."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from tests.conftest import publish_shards, write_sample_text, write_tokenizer
from tests.test_model import CONFIG
from vectorclm.dataset import Batch, document_labels, position_ids, to_batch
from vectorclm.evaluation.bits_per_byte import token_losses, windows_scores
from vectorclm.model import CausalLM
from vectorclm.nn.attention import Documents, document_attention
from vectorclm.nn.loss import IGNORE_INDEX as NO
from vectorclm.shards.chat_writer import ChatConfig, ChatSource, write_chat_shards
from vectorclm.shards.conversations import Turn, render
from vectorclm.shards.reader import open_shards
from vectorclm.shards.writer import ShardsConfig, Windows, read_windows, write_shards
from vectorclm.tokenizer import BOS_ID, EOS_ID, PAD_ID, load_tokenizer
from vectorclm.train import TrainStep

CPU = torch.device("cpu")
LENGTH = 96


@pytest.fixture(scope="module")
def tokenizer(tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), tiny_text, 307, 20_000, LENGTH))


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(CONFIG.model_copy(update={"vocab_size": 307, "max_position_embeddings": LENGTH}))
    with torch.no_grad():
        for p in model.parameters():
            p *= 4.0  # so that attention is no average
    return model.double()


def test_positions_and_labels_by_hand() -> None:
    a, b, c = 10, 11, 12
    windows = np.array(
        [
            [BOS_ID, a, EOS_ID, BOS_ID, b, EOS_ID, PAD_ID, PAD_ID],
            [BOS_ID, a, b, c, a, b, c, a],  # the beginning of a long document
            [b, c, EOS_ID, c, EOS_ID, BOS_ID, EOS_ID, PAD_ID],  # the rests of two long ones, and an empty one
        ]
    )
    positions = position_ids(windows)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 0, 1, 0]]
    assert document_labels(windows, positions).tolist() == [
        [NO, a, EOS_ID, NO, b, EOS_ID, NO, NO],
        [NO, a, b, c, a, b, c, a],
        [NO, c, EOS_ID, NO, EOS_ID, NO, EOS_ID, NO],
    ]
    assert document_labels(windows, None).tolist() == [
        [BOS_ID, a, EOS_ID, BOS_ID, b, EOS_ID, NO, NO],
        [BOS_ID, a, b, c, a, b, c, a],
        [b, c, EOS_ID, NO, EOS_ID, BOS_ID, EOS_ID, NO],
    ]
    documents = Documents.at(torch.from_numpy(positions), CPU)
    assert documents is not None and documents.cu_seqlens.tolist() == [0, 3, 6, 8, 16, 19, 21, 23, 24]


def test_attention_is_that_of_a_block_diagonal_mask() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 8, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 0]])
    documents = Documents.at(positions, CPU)
    assert documents is not None
    number = (positions == 0).cumsum(1)
    mask = (number[:, :, None] == number[:, None]) & torch.ones(8, 8).tril().bool()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
    found = document_attention(q, k, v, documents, 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(found)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def losses(model: CausalLM, batch: Batch) -> list[float]:
    """The loss of every label, sorted."""
    positions = None if batch.position_ids is None else batch.position_ids[:, :-1]
    targets = batch.labels[:, 1:]
    found = token_losses(model, batch.input_ids[:, :-1], targets, Documents.at(positions, CPU))
    return sorted(found[targets != NO].tolist())


def alone(model: CausalLM, ids: Any, labels: Any) -> list[float]:
    return losses(model, Batch(torch.tensor(ids)[None], torch.tensor(labels)[None]))


def test_a_packed_document_costs_what_it_costs_alone(
    model: CausalLM, tokenizer: Tokenizer, tiny_text: list[str], tmp_path: Path
) -> None:
    texts = [text[: 5 + 7 * i] for i, text in enumerate(tiny_text[:40])]
    for split in ("train", "validation"):
        write_sample_text(tmp_path / "sample" / "a", texts, split)
    write_shards(ShardsConfig(sequence_length=LENGTH), tmp_path / "sample", tokenizer, tmp_path / "out")
    (shard,) = read_windows(tmp_path / "out" / "a", "train")
    expected: list[float] = []
    before = {"window": -1, "end": 0}
    for piece in pq.read_table(tmp_path / "out" / "a" / "train-00000.documents.parquet").to_pylist():
        start = before["end"] if piece["window"] == before["window"] else 0
        ids = shard.input_ids[piece["window"], start : piece["end"]].astype(np.int64)
        expected += alone(model, ids, ids) if len(ids) > 1 else []
        before = piece
    found = losses(model, to_batch(shard, document_mask=True))
    np.testing.assert_allclose(found, sorted(expected), rtol=0, atol=1e-9)
    across = losses(model, to_batch(shard))
    assert len(across) > len(found) and abs(np.mean(across) - np.mean(found)) > 1e-3  # the mask is not for nothing
    again = publish_shards(str(tmp_path / "store"), tmp_path / "work", {"a": {"input_ids": shard.input_ids}}, 4096)
    with open_shards(again, "train") as readers:
        scores = windows_scores(model, readers, [1] * 307, 0, 7, CPU, document_mask=True)
    assert scores["a"]["loss"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_a_packed_conversation_costs_what_it_costs_alone(model: CausalLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        [{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": "So. " * (1 + i % 3)}]
        for i in range(60)
    ]
    source = ChatSource(label="chat", path="json", conversations=100)
    config = ChatConfig(sources=[source], sequence_length=LENGTH, validation_share=0.1)
    summary = write_chat_shards(config, {"chat": rows}, tokenizer, 1, tmp_path)
    expected: list[float] = []
    for row in rows:
        ids, supervised = render(tokenizer, [Turn(turn["role"], turn["content"]) for turn in row])  # type: ignore[arg-type]
        expected += alone(model, ids, [i if s else NO for i, s in zip(ids, supervised, strict=True)])
    found: list[float] = []
    for split in ("train", "validation"):
        for shard in read_windows(tmp_path / "chat", split):
            assert shard.supervised is not None
            found += losses(model, to_batch(shard, document_mask=True))
    assert summary["train"]["windows"] < 0.8 * summary["sources"]["chat"]["train"]  # several stand in one window
    np.testing.assert_allclose(sorted(found), sorted(expected), rtol=0, atol=1e-9)


def test_a_training_step_is_the_same_in_any_micro_batches(model: CausalLM) -> None:
    """In single precision, as training is."""
    windows = np.array([[BOS_ID, *range(5, 20 + i), EOS_ID, BOS_ID, *range(30, 44 - i), EOS_ID] for i in range(4)])
    batch = to_batch(Windows(windows, None), document_mask=True)
    whole, split = (TrainStep(model.float(), [], 1e9, i)(batch)[0].item() for i in (4, 1))
    model.double()
    rows = [alone(model, part, part) for ids in windows for part in np.split(ids, np.flatnonzero(ids == BOS_ID)[1:])]
    assert whole == pytest.approx(split, abs=1e-6)
    assert whole == pytest.approx(np.mean([loss for row in rows for loss in row]), rel=1e-5)
