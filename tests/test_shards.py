"""Shards hold every token of the documents, in order, and open as memory maps."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.conftest import write_sample_text
from vectorclm.errors import CorruptArtifactError, DataError
from vectorclm.shards import ShardsConfig, read_windows, write_shards
from vectorclm.train_tokenizer import BOS_ID, EOS_ID, TokenizerConfig, encode, load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def sample(tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_sample_text(folder / "a", tiny_text, "train")
    write_sample_text(folder / "a", tiny_text[:7], "validation")
    return folder


@pytest.fixture(scope="module")
def tokenizer(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TokenizerConfig(vocab_size=310, bytes=20_000), sample, 64, folder)
    return load_tokenizer(folder)


def test_windows_are_the_documents_between_bos_and_eos(
    sample: Path, tokenizer: Tokenizer, tiny_text: list[str], tmp_path: Path
) -> None:
    config = ShardsConfig(sequence_length=32, shard_bytes=4096)
    summary = write_shards(config, sample, tokenizer, tmp_path)
    shards = read_windows(tmp_path / "a", "train")
    assert len(shards) > 1 and all(shard.input_ids.dtype == np.uint16 for shard in shards)
    assert all(shard.input_ids.nbytes <= 4096 for shard in shards)
    stream = np.concatenate([shard.input_ids.reshape(-1) for shard in shards])
    expected = [i for text in tiny_text for i in (BOS_ID, *encode(tokenizer, text), EOS_ID)]
    assert stream.tolist() == expected[: len(stream)]
    counts = summary["a"]["train"]
    assert counts == {
        "documents": len(tiny_text),
        "windows": len(stream) // 32,
        "tokens": len(stream),
        "dropped_tokens": len(expected) - len(stream),
    }
    assert counts["dropped_tokens"] < 32


def test_equal_settings_give_equal_bytes(sample: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_shards(ShardsConfig(sequence_length=32), sample, tokenizer, tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.arrow"))
    assert len(files) == 2
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_too_little_text_for_one_window_is_refused(sample: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a: the validation documents \(7\) do not fill one window of 4096 tokens"):
        write_shards(ShardsConfig(sequence_length=4096), sample, tokenizer, tmp_path)


def test_a_truncated_shard_is_named(sample: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shards(ShardsConfig(sequence_length=32), sample, tokenizer, tmp_path)
    shard = tmp_path / "a" / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CorruptArtifactError, match=r"train-00000\.arrow is not a readable shard"):
        read_windows(tmp_path / "a", "train")
