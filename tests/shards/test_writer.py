"""Shards hold every token of the documents, in order, and open as memory maps."""

import json
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer

from tests.conftest import write_sample_text
from vectorclm.errors import CorruptArtifactError, DataError
from vectorclm.runtime.workers import IN_THIS_PROCESS, ExecutorWorkers, open_workers
from vectorclm.shards import writer
from vectorclm.shards.blocks import ShardDescriber
from vectorclm.shards.config import SPLITS, Packing, ShardsConfig
from vectorclm.shards.encoder import Encoder
from vectorclm.shards.writer import read_windows, write_shards
from vectorclm.store.artifact import MANIFEST, Artifact, StageSpec, Store, build
from vectorclm.store.resumable import ResumableUpload, Slices
from vectorclm.store.uploads import EarlyUpload
from vectorclm.tokenizer import BOS_ID, EOS_ID, PAD_ID, TokenizerConfig, encode, load_tokenizer
from vectorclm.train_tokenizer import train_tokenizer


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


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_windows_are_the_documents_between_bos_and_eos(
    sample: Path, tokenizer: Tokenizer, tiny_text: list[str], tmp_path: Path, packing: Packing
) -> None:
    config = ShardsConfig(sequence_length=32, shard_bytes=4096, packing=packing)
    summary = write_shards(config, sample, tokenizer, tmp_path)
    stored = read_windows(tmp_path / "a", "train")
    assert len(stored) > 1 and all(shard.input_ids.dtype == np.uint16 for shard in stored)
    assert all(shard.input_ids.nbytes <= 4096 for shard in stored)
    expected = [[BOS_ID, *encode(tokenizer, text), EOS_ID] for text in tiny_text]
    found: dict[int, list[list[int]]] = {number: [] for number in range(len(expected))}
    for number, shard in enumerate(stored):
        table = pq.read_table(tmp_path / "a" / f"train-{number:05d}.documents.parquet").to_pylist()
        before = {"window": -1, "end": 0}
        for piece in table:
            start = before["end"] if piece["window"] == before["window"] else 0
            found[piece["document"]].append(shard.input_ids[piece["window"], start : piece["end"]].tolist())
            before = piece
    for number, ids in enumerate(expected):  # the parts of a split document stand in no order
        assert Counter(i for part in found[number] for i in part) == Counter(ids)
        assert sum(part[0] == BOS_ID for part in found[number]) == 1
        assert sum(part[-1] == EOS_ID for part in found[number]) == 1
    counts, tokens = summary["a"]["train"], sum(map(len, expected))
    windows = sum(len(shard.input_ids) for shard in stored)
    everything = np.concatenate([shard.input_ids.reshape(-1) for shard in stored])
    assert packing == "concatenate" or counts["documents_split_that_fit"] == 0
    assert counts == {
        "documents": len(tiny_text),
        "windows": windows,
        "tokens": tokens,
        "padding_tokens": windows * 32 - tokens,
        "dropped_tokens": 0,
        "documents_split": sum(len(parts) > 1 for parts in found.values()),
        "documents_split_that_fit": counts["documents_split_that_fit"],
    }
    assert (everything == PAD_ID).sum() == counts["padding_tokens"]
    assert packing == "best_fit" or counts["padding_tokens"] < 32
    assert summary["a"]["policy"] == {"bos": BOS_ID, "eos": EOS_ID, "padding": PAD_ID, "packing": packing}


def test_more_than_65536_ids_are_32_bits_wide(sample: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    large = Tokenizer.from_str(tokenizer.to_str())
    large.add_tokens([AddedToken(f"@{i}@") for i in range(65_537 - large.get_vocab_size())])
    texts = ["one @65000@ two"] * 20
    for split in SPLITS:
        write_sample_text(tmp_path / "sample" / "a", texts, split)
    write_shards(ShardsConfig(sequence_length=16), tmp_path / "sample", Encoder(large), tmp_path / "out")
    (shard,) = read_windows(tmp_path / "out" / "a", "train")
    expected = large.token_to_id("@65000@")
    assert shard.input_ids.dtype == np.uint32 and expected > 65_000
    assert (shard.input_ids == expected).sum() == 20


def test_equal_settings_give_equal_bytes(sample: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_shards(ShardsConfig(sequence_length=32), sample, tokenizer, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 4  # a shard of each split, and where its documents stand


def test_too_little_text_for_one_window_is_refused(sample: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a: the validation documents \(7\) do not fill one window of 4096 tokens"):
        write_shards(ShardsConfig(sequence_length=4096), sample, tokenizer, tmp_path)


def test_work_goes_on_where_it_was_left(
    tokenizer: Tokenizer, tiny_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the third of four slices: the finished ones stand, a broken one is made again, the bytes are equal."""
    folder, config = tmp_path / "sample" / "a", ShardsConfig(sequence_length=32)
    write_sample_text(folder, tiny_text[:7], "validation")
    for number in range(3):
        write_sample_text(folder, [f"{number} {text}" for text in tiny_text], "train")
        (folder / "train-00000.parquet").rename(folder / f"train-{number + 1:05d}.parquet")
    expected = write_shards(config, tmp_path / "sample", tokenizer, tmp_path / "expected")
    slices, made, write_slice = tmp_path / "slices", [], writer._write_slice

    def counted(*arguments: Any) -> dict[str, Any]:
        made.append(arguments[2])
        if len(made) == 3:
            raise KeyboardInterrupt
        return write_slice(*arguments)

    monkeypatch.setattr(writer, "_write_slice", counted)
    with pytest.raises(KeyboardInterrupt):
        write_shards(config, tmp_path / "sample", tokenizer, tmp_path / "cut", slices=Slices(slices, tmp_path / "cut"))
    assert made == ["a/train-00001.parquet", "a/train-00002.parquet", "a/train-00003.parquet"]
    (broken,) = slices.glob("a/train-00001.*/shard-00000.arrow")
    broken.write_bytes(broken.read_bytes()[:-100] + bytes(100))
    found = write_shards(
        config, tmp_path / "sample", tokenizer, tmp_path / "found", slices=Slices(slices, tmp_path / "found")
    )
    assert made[3:] == ["a/train-00002.parquet", "a/train-00003.parquet", "a/validation-00000.parquet"]
    assert found == expected and contents(tmp_path / "found") == contents(tmp_path / "expected")
    assert len(read_windows(tmp_path / "found" / "a", "train")) == 3


def test_slices_that_were_sent_stand_wherever_the_work_goes_on(
    tokenizer: Tokenizer, tiny_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off in the third of four slices: the finished ones stand, a broken one is made again, no disk holds them."""
    folder, config = tmp_path / "sample" / "a", ShardsConfig(sequence_length=32, shard_bytes=4096)
    for number in range(3):
        write_sample_text(folder, [f"{number} {text}" for text in tiny_text[number:]], "train")
        (folder / "train-00000.parquet").rename(folder / f"train-{number + 1:05d}.parquet")
    write_sample_text(folder, tiny_text[:7], "validation")
    plan, made, write_slice = StageSpec("shards", 1, {}, {}), [], writer._write_slice

    def counted(*arguments: Any) -> dict[str, Any]:
        made.append(arguments[2])
        if len(made) == 7:
            raise KeyboardInterrupt
        return write_slice(*arguments)

    def publish(uri: str, work: str) -> Artifact:
        store = Store(uri)
        sending = EarlyUpload(store, plan, ShardDescriber)

        def produce(out: Path) -> dict[str, Any]:
            slices = Slices(tmp_path / "slices", out) if store.is_local else ResumableUpload(out.parent, sending)
            return write_shards(config, tmp_path / "sample", tokenizer, out, slices=slices)

        return build(store, plan, produce, str(tmp_path / work), ShardDescriber(), sending)[0]

    monkeypatch.setattr(writer, "_write_slice", counted)
    expected, uri = publish(str(tmp_path / "store"), "local"), f"memory://{tmp_path.name}"
    with pytest.raises(KeyboardInterrupt):
        publish(uri, "here")
    cut = Store(uri)
    (second,) = [key for key in cut.files("") if "-train-00001-" in key]
    noted = json.loads(cut.read(second) or b"")
    assert cut.find("shards", plan.fingerprint) is None and len(noted["files"]) > 4
    short = min(noted["files"])
    cut.write(f"shards/{plan.fingerprint}/{short}", b"cut short")
    found = publish(uri, "elsewhere")
    assert made[4:7] == made[:3] and made[7:] == made[1:4]
    place = found.manifest["files"][short].pop("place")  # as nothing is replaced that a writer elsewhere may count on
    assert found.manifest["files"] == expected.manifest["files"] and found.summary == expected.summary
    found = cut.find("shards", plan.fingerprint)
    found.verify()
    names = ({*found.manifest["files"]} - {short}) | {MANIFEST, place}
    assert set(cut.files("")) == {f"shards/{plan.fingerprint}/{name}" for name in names}
    assert [path for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("processes", [2, 4])
def test_workers_write_the_same_bytes_and_go_on_where_a_killed_one_was(
    tokenizer: Tokenizer, tiny_text: list[str], tmp_path: Path, processes: int
) -> None:
    folder, config = tmp_path / "sample" / "a", ShardsConfig(sequence_length=32, shard_bytes=4096)
    for number in range(5):
        write_sample_text(folder, [f"{number} {text}" for text in tiny_text[number:]], "train")
        (folder / "train-00000.parquet").rename(folder / f"train-{number + 1:05d}.parquet")
    write_sample_text(folder, tiny_text[:7], "validation")
    expected = write_shards(config, tmp_path / "sample", tokenizer, tmp_path / "expected")
    slices = Slices(tmp_path / "slices", tmp_path / "cut")
    with pytest.raises(ChildProcessError, match="a worker process ended"), open_workers(processes) as slices.workers:
        finish, done = slices.finish, []

        def finish_one(*arguments: Any) -> dict[str, Any]:
            done.append(finish(*arguments))
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):  # the pool ends the others when it misses one
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.kill()
            return done[-1]

        slices.finish = finish_one  # type: ignore[method-assign]
        write_shards(config, tmp_path / "sample", tokenizer, tmp_path / "cut", slices=slices)
    slices = Slices(tmp_path / "slices", tmp_path / "found")
    with open_workers(processes) as slices.workers:
        found = write_shards(config, tmp_path / "sample", tokenizer, tmp_path / "found", slices=slices)
    assert found == expected and contents(tmp_path / "found") == contents(tmp_path / "expected")


def test_a_worker_encodes_special_tokens_in_a_text_as_text(
    tokenizer: Tokenizer, tiny_text: list[str], tmp_path: Path
) -> None:
    """Also by `tokenizers` alone, whose own pickle and JSON lose this setting."""
    write_sample_text(tmp_path / "sample" / "a", [f"<|im_end|> {text}" for text in tiny_text], "train")
    write_sample_text(tmp_path / "sample" / "a", tiny_text[:7], "validation")
    for name, workers in (("one", IN_THIS_PROCESS), ("threads", ExecutorWorkers(ThreadPoolExecutor(2), 3))):
        slices = Slices(tmp_path / f"{name}-slices", tmp_path / name)
        slices.workers = workers
        config = ShardsConfig(sequence_length=32)
        write_shards(config, tmp_path / "sample", Encoder(tokenizer), tmp_path / name, slices=slices)
    assert contents(tmp_path / "one") == contents(tmp_path / "threads")
    assert pickle.loads(pickle.dumps(tokenizer)).encode("<|im_end|>").ids == tokenizer.encode("<|im_end|>").ids


def test_a_difference_that_a_worker_finds_is_counted_as_in_one_process(
    tokenizer: Tokenizer, tiny_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast encoder is one of another tokenizer, whose text the proof has not seen."""
    write_sample_text(tmp_path / "sample" / "a", tiny_text, "train")
    write_sample_text(tmp_path / "sample" / "a", tiny_text[:7], "validation")
    monkeypatch.setattr(writer, "_opened", lambda text, fast: Encoder(tokenizer, Wrong() if fast else None))  # type: ignore[arg-type]
    summaries = []
    for name, workers in (("one", IN_THIS_PROCESS), ("threads", ExecutorWorkers(ThreadPoolExecutor(2), 3))):
        slices = Slices(tmp_path / f"{name}-slices", tmp_path / name)
        slices.workers = workers
        encoder = Encoder(tokenizer, Wrong())  # type: ignore[arg-type]
        config = ShardsConfig(sequence_length=32)
        summaries.append(write_shards(config, tmp_path / "sample", encoder, tmp_path / name, slices=slices))
    assert summaries[0] == summaries[1]
    assert summaries[0]["a"]["audit"]["train"]["documents_differing"] > 0
    assert contents(tmp_path / "one") == contents(tmp_path / "threads")


class Wrong:
    """A fast encoder that finds the same token everywhere."""

    name = "wrong 1"

    def encode(self, text: str) -> Any:
        return np.full(len(text), 300, np.uint32)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_truncated_shard_is_named(sample: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shards(ShardsConfig(sequence_length=32), sample, tokenizer, tmp_path)
    shard = tmp_path / "a" / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CorruptArtifactError, match=r"train-00000\.arrow is not a readable shard"):
        read_windows(tmp_path / "a", "train")
