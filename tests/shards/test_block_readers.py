"""Blocks of shards are read whole, right and once, from a local store and from S3, whatever happens on the way."""

import hashlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.conftest import KILLS, PROCESSES, S3, files_below, publish_shards
from tests.services.faulty_proxy import Proxy, faulty_proxy
from vectorclm.comparison.measurement import training_text
from vectorclm.config import changed, load_experiment
from vectorclm.dataset import AHEAD, StreamingLanguageModelDataset
from vectorclm.errors import CorruptArtifactError, CorruptBlockError, StoreError
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.group import Group
from vectorclm.shards import order as plan_module
from vectorclm.shards.block_readers import RetryPolicy
from vectorclm.shards.order import GROUP_BLOCKS, MixturePhase, TrainingOrder
from vectorclm.shards.reader import ShardReader, open_shards
from vectorclm.stages import EVALUATED, TRAININGS, run_stage
from vectorclm.store.artifact import Artifact, Store
from vectorclm.store.layout import STAGES
from vectorclm.tokenizer import load_tokenizer

LENGTH, BATCH = 64, 50
BLOCK_BYTES = 8192  # of 64 windows, so that few bytes make many blocks
WINDOWS = {"a": 100 * 64, "b": 36 * 64 + 13}
SMALLER: dict[str, object] = {  # every file of tokens larger than any file of the model
    "world.documents": 2000,
    "world.conversations": 900,
    "sample.bytes": 2_000_000,
    "sample.validation_share": 0.4,
    "tokenizer.bytes": 200_000,
    "shards.sequence_length": 64,
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 1,
    "model.head_dim": 8,
    "chat.validation_share": 0.4,
    "pretrain.phases": [{"tokens": 16384}],
    "pretrain.validation_windows": 8,
    "finetune.epochs": 0.05,
    "finetune.batch_size": 4,
    "finetune.validation_windows": 8,
    "evaluate.chat_prompts": 2,
    "evaluate.instructions": 2,
    "evaluate.tasks.0.limit": 8,
    "evaluate.tasks.1.limit": 8,
    "evaluate.max_new_tokens": 8,
}
LARGEST = 200_000  # bytes of a file: more than a checkpoint takes, less than a shard or a block of it
# Of ranks, of loader workers in each, and windows of source b; the small matrix is for every day.
FULL = ((1, 2, 3, 4, 8), (0, 1, 4), WINDOWS["b"])
WORLD_SIZES, WORKERS, SOME = FULL if os.environ.get("VECTORCLM_MATRIX") == "full" else ((1, 3, 8), (0, 1), 653)
FAULTS = ["latency", "reset", "cut", "500", "503", "truncate", "short", "stall", "flip", "expired"]


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "BLOCK_BYTES", BLOCK_BYTES)
        yield


def tokens(label: str) -> np.ndarray:
    return np.random.default_rng(len(label) + ord(label)).integers(5, 60_000, (WINDOWS[label], LENGTH), np.uint16)


def publish(uri: str, work: Path) -> Artifact:
    sources = {
        label: {"input_ids": tokens(label), "supervised": (tokens(label) % 3 > 0).astype(np.uint8)} for label in WINDOWS
    }
    return publish_shards(uri, work, sources, 1000 * 2 * LENGTH)  # windows in a shard, no whole number of blocks


def stream(readers: Mapping[str, ShardReader], **options: int) -> StreamingLanguageModelDataset:
    """A bit more than one epoch of both sources."""
    phase = MixturePhase(9000, {"a": 0.7, "b": 0.3})
    order = TrainingOrder([phase], WINDOWS, 1, windows_per_block=readers["a"].block_windows)
    return StreamingLanguageModelDataset(readers, order, BATCH, **options)


def hashes(readers: Mapping[str, ShardReader], **options: int) -> list[str]:
    """A hash of each global batch."""
    return [
        hashlib.sha256(batch.input_ids.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest()
        for batch in stream(readers, **options)
    ]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return publish(str(tmp_path_factory.mktemp("store")), tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def expected(local: Artifact) -> list[str]:
    with open_shards(local, "train") as readers:
        return hashes(readers)


@pytest.fixture(scope="module")
def proxy(s3: S3) -> Iterator[Proxy]:
    with faulty_proxy(s3.endpoint) as made, pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3.environment(), "AWS_ENDPOINT_URL": made.url, "NO_PROXY": "127.0.0.1"}.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module")
def remote(proxy: Proxy, s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return publish(f"s3://{s3.bucket}/blocks", tmp_path_factory.mktemp("work"))


def every(n: int, fault: str) -> Callable[[int], str]:
    return lambda number: fault if number % n == 1 else ""


def test_windows_are_those_that_were_written(local: Artifact) -> None:
    with open_shards(local, "train") as readers:
        for label, reader in readers.items():
            order = np.random.default_rng(0).permutation(WINDOWS[label])
            found = reader.empty(len(order))
            reader.gather(order, found, np.arange(len(order)))
            assert np.array_equal(found.input_ids, tokens(label)[order])
            in_order = [windows.input_ids for windows in reader.in_order(30, 5000)]
            assert np.array_equal(np.concatenate(in_order), tokens(label)[:5000])


def test_the_manifest_tells_where_the_tokens_lie(local: Artifact) -> None:
    said = local.manifest["files"]["b/train-00002.arrow"]
    ids = said["buffers"][0]
    data = (Path(local.uri) / "b/train-00002.arrow").read_bytes()
    assert (said["windows"], said["first_window"], said["block_windows"]) == (317, 2000, 64)
    assert len(ids["xxh3"]) == 6  # the last 48 windows of a block, four blocks, and the 13 that are left
    found = np.frombuffer(data, ids["dtype"], said["windows"] * LENGTH, ids["offset"])
    assert np.array_equal(found.reshape(-1, LENGTH), tokens("b")[2000:])


def test_s3_gives_the_same_batches_and_fetches_what_it_uses_once(
    remote: Artifact, proxy: Proxy, expected: list[str]
) -> None:
    proxy.reset(lambda number: "")
    held = 0
    with open_shards(remote, "train") as readers:
        source = readers["a"].source
        found = []
        for batch in stream(readers):
            found.append(hashlib.sha256(batch.input_ids.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest())
            held = max(held, *(sum(len(blocks) for _, blocks in reader.held) for reader in readers.values()))
        used = sum(batches * BATCH * LENGTH * 3 for batches in [len(found)])  # two bytes of ids, one of supervision
        assert found == expected and source.fetched <= 1.02 * used
    assert held <= (1 + AHEAD) * GROUP_BLOCKS + 6  # those that lie in two of the seven shards are held in two parts
    with open_shards(remote, "train") as readers:
        order = TrainingOrder([MixturePhase(WINDOWS["a"], {"a": 1.0})], {"a": WINDOWS["a"]}, 1, windows_per_block=64)
        for _ in StreamingLanguageModelDataset(readers, order, 64):
            pass
        assert readers["a"].source.fetched == WINDOWS["a"] * LENGTH * 3
    assert [t for t in threading.enumerate() if t.name.startswith("blocks")] == [] or _ends("blocks")


def _ends(name: str) -> bool:
    """Whether all threads of that name end."""
    deadline = time.monotonic() + 20
    while any(t.name.startswith(name) for t in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_ranks_and_loader_workers_only_slice_the_same_batches(local: Artifact, remote: Artifact, proxy: Proxy) -> None:
    """Of a batch of 25, which few of these numbers divide."""
    proxy.reset(lambda number: "")
    order = TrainingOrder([MixturePhase(SOME, {"b": 1.0})], {"b": SOME}, 1, windows_per_block=64)

    def hashes_of(artifact: Artifact, world_size: int, workers: int) -> list[str]:
        whole = torch.zeros((order.windows // 25, 2, 25, LENGTH), dtype=torch.int64)
        with open_shards(artifact, "train") as readers:
            for rank in range(world_size):
                stream = StreamingLanguageModelDataset(readers, order, 25, Group(rank, world_size))
                apart = PROCESSES if workers else None
                loader = DataLoader(stream, batch_size=None, num_workers=workers, multiprocessing_context=apart)
                for step, batch in enumerate(loader):
                    whole[step, 0, rank::world_size], whole[step, 1, rank::world_size] = batch.input_ids, batch.labels
        return [hashlib.sha256(batch.numpy().tobytes()).hexdigest() for batch in whole]

    expected = hashes_of(local, 1, 0)
    assert len(set(expected)) == SOME // 25
    for world_size in WORLD_SIZES:
        for workers in WORKERS:
            assert hashes_of(remote, world_size, workers) == expected, (world_size, workers)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_recovered(remote: Artifact, proxy: Proxy, expected: list[str], fault: str) -> None:
    often = 60 if fault == "stall" else 7
    proxy.reset(every(often, fault))
    with open_shards(remote, "train", patience=RetryPolicy(deadline=2.0, total=60, refetches=9)) as readers:
        assert hashes(readers) == expected
    assert proxy.faults > 4


def test_a_storm_is_sat_out(remote: Artifact, proxy: Proxy, expected: list[str]) -> None:
    began = time.monotonic()
    proxy.reset(lambda number: "503" if time.monotonic() - began < 3 else "")
    with open_shards(remote, "train") as readers:
        assert hashes(readers) == expected
    assert proxy.faults > 16


@pytest.mark.parametrize(
    ("fault", "error", "told"),
    [
        ("reset", StoreError, r"train-0000\d\.arrow, block \d of input_ids cannot be read: \d+ attempts in"),
        ("500", StoreError, "cannot be read.*InternalError|as told"),
        ("503", StoreError, "cannot be read.*as told"),
        ("stall", StoreError, "cannot be read.*Timeout"),
        ("expired", StoreError, "check the credentials, which may have expired"),
        ("short", CorruptBlockError, r"/a/train-0000\d\.arrow, block \d of \w+: \d+ bytes with xxh3"),
        ("flip", CorruptBlockError, r"/a/train-0000\d\.arrow, block \d of \w+: \d+ bytes with xxh3"),
    ],
)
def test_a_fault_that_stays_is_told(
    remote: Artifact, proxy: Proxy, fault: str, error: type[StoreError], told: str
) -> None:
    proxy.reset(lambda number: fault)
    patience = RetryPolicy(deadline=0.7 if fault == "stall" else 20, total=1.0, refused=0.5, refetches=2)
    with open_shards(remote, "train", patience=patience) as readers, pytest.raises(error, match=told) as caught:
        for _ in readers["a"].in_order(64):
            pass
    assert type(caught.value) is error


def test_a_missing_shard_is_named(remote: Artifact, proxy: Proxy, s3: S3, tmp_path: Path) -> None:
    proxy.reset(lambda number: "")
    other = publish(f"s3://{s3.bucket}/missing", tmp_path)
    other.store.fs.rm(other.store.path(f"shards/{other.fingerprint}/a/train-00001.arrow"))
    with (
        open_shards(other, "train") as readers,
        pytest.raises(CorruptArtifactError, match=r"a/train-00001\.arrow is missing"),
    ):
        for _ in readers["a"].in_order(64):
            pass


def test_a_flipped_bit_on_disk_is_named_where_it_is_touched(tmp_path: Path) -> None:
    artifact = publish(str(tmp_path / "store"), tmp_path / "work")
    path = Path(artifact.uri) / "a/train-00001.arrow"
    data = bytearray(path.read_bytes())
    data[
        artifact.manifest["files"]["a/train-00001.arrow"]["buffers"][0]["offset"] + (24 + 4 * 64) * 2 * LENGTH + 17
    ] ^= 4
    path.write_bytes(data)
    with open_shards(artifact, "train") as readers:
        assert sum(len(windows.input_ids) for windows in readers["a"].in_order(64, 20 * 64)) == 20 * 64
        with pytest.raises(CorruptBlockError, match=r"a/train-00001\.arrow, block 5 of input_ids"):
            for _ in readers["a"].in_order(64, 21 * 64):
                pass
    path.write_bytes(data[:1000])
    with (
        open_shards(artifact, "train") as readers,
        pytest.raises(CorruptArtifactError, match=r"a/train-00001\.arrow is missing or truncated"),
    ):
        list(readers["a"].in_order(64))


def test_a_manifest_that_does_not_describe_its_shards_is_refused(local: Artifact) -> None:
    manifest = json.loads(json.dumps(local.manifest))
    manifest["files"]["a/train-00000.arrow"]["buffers"][0]["xxh3"].pop()
    with (
        pytest.raises(CorruptArtifactError, match=r"does not describe a/train-00000\.arrow completely"),
        open_shards(Artifact(local.store, local.stage, local.fingerprint, manifest), "train"),
    ):
        pass


def test_a_cache_is_verified_and_may_be_lost(
    remote: Artifact, proxy: Proxy, expected: list[str], tmp_path: Path
) -> None:
    proxy.reset(lambda number: "")
    cache = tmp_path / "cache"
    with open_shards(remote, "train", cache=str(cache)) as readers:
        assert hashes(readers) == expected and readers["a"].source.fetched > 0
    kept = sorted(path for path in cache.rglob("*") if path.is_file())
    kept[3].write_bytes(kept[4].read_bytes())
    with open_shards(remote, "train", cache=str(cache)) as readers:
        assert hashes(readers) == expected and 0 < readers["a"].source.fetched <= BLOCK_BYTES
    (tmp_path / "file").touch()
    with open_shards(remote, "train", cache=str(tmp_path / "file")) as readers:  # no folder can be made there
        assert hashes(readers) == expected


def test_without_a_cache_no_file_is_written(
    remote: Artifact, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    proxy.reset(lambda number: "")
    with open_shards(remote, "train") as readers:
        assert len(list(islice(stream(readers), 5))) == 5
    assert list(tmp_path.rglob("*")) == []


def test_trainings_from_s3_are_those_from_a_disk_and_put_no_data_on_one(
    proxy: Proxy, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.reset(lambda number: "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 2**20)  # as everywhere but in this module
    experiment = changed(load_experiment("tiny")[0], SMALLER)
    experiment, _ = pin(experiment, tmp_path / "experiment.toml", None, resolve=False)
    files: list[dict[str, str]] = []
    texts: list[list[bytes]] = []
    for uri in (str(tmp_path / "store"), f"s3://{s3.bucket}/{tmp_path.name}"):
        store, made = Store(uri), dict[str, Artifact]()
        for stage in STAGES[: STAGES.index("evaluate") + 1]:
            reads = stage in TRAININGS or stage in EVALUATED
            with files_below(LARGEST) if reads and not store.is_local else nullcontext():
                made[stage], _ = run_stage(stage, experiment, store, Runtime(threads=1), None)
        found = {f"{stage}/{name}": file for stage in made for name, file in made[stage].manifest["files"].items()}
        assert min(file["bytes"] for name, file in found.items() if name.endswith(".arrow")) > LARGEST
        files.append({name: file["sha256"] for name, file in found.items() if "metrics" not in name})  # have speeds
        texts.append(list(training_text(made, load_tokenizer(made["tokenizer"].local()))))
    assert "pretrain/model.safetensors" in files[0]
    assert files[0] == files[1]
    assert texts[0] == texts[1] and len(texts[0]) > 100
    copies = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert "tokenizer.json" in copies
    assert not copies & {"train-00000.arrow", "train-00000.parquet", "validation-00000.parquet", "prompts.jsonl"}


def _read_on(artifact: Artifact, log: Path) -> None:
    done = len(log.read_text().splitlines())
    with open_shards(artifact, "train") as readers, log.open("a") as file:
        for batch in stream(readers, start_step=done):
            both = batch.input_ids.numpy().tobytes() + batch.labels.numpy().tobytes()
            file.write(hashlib.sha256(both).hexdigest() + "\n")
            file.flush()
            time.sleep(0.002)


def test_readers_killed_at_random_go_on_with_the_same_batches(
    remote: Artifact, proxy: Proxy, expected: list[str], tmp_path: Path
) -> None:
    proxy.reset(every(29, "cut"))
    log, chance = tmp_path / "log", random.Random(5)
    log.touch()
    for kill_at in [*sorted(chance.choices(range(1, len(expected) - 20), k=KILLS)), None]:
        reader = PROCESSES.Process(target=_read_on, args=(remote, log))
        reader.start()
        while reader.is_alive() and (kill_at is None or len(log.read_text().splitlines()) < kill_at):
            time.sleep(0.002)
        if kill_at is not None and reader.pid is not None:
            os.kill(reader.pid, signal.SIGKILL)
        reader.join()
    assert log.read_text().split() == expected
