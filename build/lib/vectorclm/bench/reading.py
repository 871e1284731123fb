"""The rows of `vectorclm bench data` on reading: verified batches against raw reads of the same bytes."""

import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from vectorclm.bench.table import Row, bounded, compared, could_not_run
from vectorclm.dataset import StreamingLanguageModelDataset
from vectorclm.shards.block_readers import RemoteBlockReader, RetryPolicy, open_client
from vectorclm.shards.blocks import ShardDescriber
from vectorclm.shards.order import MixturePhase, TrainingOrder
from vectorclm.shards.reader import ShardReader, open_shards
from vectorclm.shards.writer import ShardWriter
from vectorclm.store.artifact import Artifact, StageSpec, Store, build

BATCH, LENGTH = 12, 1024  # windows and tokens, nanoGPT's batch
WINDOWS = 16_384  # of LENGTH tokens
REMOTE_WINDOWS = 131_072
MANY_TOKENS = 10**9
WARM_TOKENS = 10**8
FAULTY = 0.01  # share of requests
LOCAL, REMOTE = "verified local batches, nanoGPT's get_batch", "verified S3 batches against raw GETs"
FAULTS, FETCHED = "verified S3 batches, 1 % of requests faulty", "bytes fetched over bytes used"
LITDATA = "local batches against litdata"
GROWTH = "memory growth per 10^9 tokens"


def reading(folder: Path, rounds: int, pool: Executor, store: str | None) -> Iterator[Row]:
    """Every row. S3 rows use `store` and leave nothing in it."""
    artifact = _publish(str(folder / "reading"), WINDOWS, folder)
    (folder / "tokens.bin").write_bytes(_tokens(WINDOWS).tobytes())
    ours: list[float] = []
    peer: list[float] = []
    for _ in range(rounds):
        peer.append(pool.submit(_random_windows, folder / "tokens.bin").result())
        ours.append(pool.submit(_local_batches, artifact).result())
    row = compared(LOCAL, ours, peer, "tokens/CPU s", ask=2, most=False)
    yield replace(row, why=f"an epoch of {WINDOWS * LENGTH:,} tokens, each block verified; {row.why}")
    yield _litdata(folder, ours, pool)
    grown = pool.submit(_growth, artifact).result()
    note = f"resident memory from {WARM_TOKENS:,} tokens on, over {MANY_TOKENS:,}; all files are links to one file"
    yield bounded(GROWTH, [grown], "MB", 1, note)
    if store is None:
        for name, unit, ask in ((REMOTE, "MB/s", 0.85), (FAULTS, "MB/s", 0.9), (FETCHED, "bytes", 1.02)):
            yield could_not_run(name, unit, ask, "no S3 store: name one with --store s3://bucket/prefix")
        return
    yield from _remote(folder, rounds, pool, store)


def _litdata(folder: Path, ours: Sequence[float], pool: Executor) -> Row:
    if find_spec("litdata") is None:
        return could_not_run(LITDATA, "tokens/CPU s", 5, "litdata is not installed: pip install litdata")
    pool.submit(_write_litdata, folder / "tokens.bin", folder / "litdata").result()
    peer = [pool.submit(_litdata_batches, folder / "litdata").result() for _ in ours]
    row = compared(LITDATA, ours, peer, "tokens/CPU s", ask=5, most=False)
    return replace(row, why=f"an epoch of {WINDOWS * LENGTH:,} tokens, shuffled; {row.why}")


def _remote(folder: Path, rounds: int, pool: Executor, store: str) -> Iterator[Row]:
    artifact = _publish(store, REMOTE_WINDOWS, folder)
    try:
        raw: list[float] = []
        ours: list[float] = []
        faulty: list[float] = []
        shares = []
        for _ in range(rounds):
            raw.append(pool.submit(_raw_gets, artifact).result())
            for rates, share in ((ours, 0.0), (faulty, FAULTY)):
                rate, fetched = pool.submit(_remote_batches, artifact, share).result()
                rates.append(rate)
                shares.append(fetched)
    finally:
        Store(store).remove(f"{artifact.stage}/{artifact.fingerprint}")
    what = f"an epoch of {REMOTE_WINDOWS * LENGTH:,} tokens, {RetryPolicy().requests} requests in flight, wall time"
    row = compared(REMOTE, ours, raw, "MB/s", ask=0.85, most=False)
    yield replace(row, why=f"{what}; the peer has the same client and ranges, in order; {row.why}")
    row = compared(FAULTS, faulty, ours, "MB/s", ask=0.9, most=False)
    how = "in the client, half of them an error, half a flipped bit; the peer is the same without"
    yield replace(row, why=f"{what}; {how}; {row.why}")
    yield bounded(FETCHED, [max(shares[::2])], "bytes for a byte of the epoch", 1.02)


def _tokens(windows: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.random.default_rng(0).integers(5, 16_384, (windows, LENGTH), np.uint16)


def _publish(store: str, windows: int, folder: Path) -> Artifact:
    def produce(out: Path) -> Mapping[str, Any]:
        writer = ShardWriter(out / "a" / "train", LENGTH, 64 * 1024 * 1024)
        writer.write(input_ids=_tokens(windows))
        return {"windows": writer.close()}

    spec = StageSpec("shards", 1, {"bench": windows}, {})
    return build(Store(store), spec, produce, str(folder / "work"), ShardDescriber())[0]


def _epoch(readers: Mapping[str, ShardReader]) -> StreamingLanguageModelDataset:
    """A dataset that reads every window once."""
    sizes = {label: len(reader) for label, reader in readers.items()}
    phase = MixturePhase(sum(sizes.values()), {label: float(size) for label, size in sizes.items()})
    return StreamingLanguageModelDataset(
        readers, TrainingOrder([phase], sizes, 1, windows_per_block=readers["a"].block_windows), BATCH
    )


def _local_batches(artifact: Artifact) -> float:
    """Tokens in a CPU second."""
    torch.set_num_threads(1)
    began = time.process_time()
    with open_shards(artifact, "train") as readers:
        tokens = sum(batch.input_ids.numel() for batch in _epoch(readers))
    return tokens / (time.process_time() - began)


def _random_windows(path: Path) -> float:
    """Tokens in a CPU second with nanoGPT's get_batch: windows at random positions of a memory map.

    nanoGPT opens the map anew for each batch, against a memory leak. Targets are the inputs shifted by one.
    """
    torch.set_num_threads(1)
    torch.manual_seed(1)
    began = time.process_time()
    tokens = 0
    for _ in range(WINDOWS // BATCH):
        data = np.memmap(path, dtype=np.uint16, mode="r")
        places = torch.randint(len(data) - LENGTH, (BATCH,))
        x = torch.stack([torch.from_numpy(data[i : i + LENGTH].astype(np.int64)) for i in places])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + LENGTH].astype(np.int64)) for i in places])
        assert x.shape == y.shape
        tokens += x.numel()
    return tokens / (time.process_time() - began)


def _write_litdata(source: Path, target: Path) -> None:
    """Write the same windows in litdata's format for tokens."""
    import litdata
    from litdata.streaming.item_loader import TokensLoader

    parts, options = list(range(16)), {"chunk_bytes": "64MB", "num_workers": 1, "start_method": "spawn"}
    litdata.optimize(partial(_part, source), parts, str(target), item_loader=TokensLoader(), verbose=False, **options)


def _part(source: Path, number: int) -> Iterator[torch.Tensor]:
    size = WINDOWS // 16
    for row in np.memmap(source, np.uint16, "r").reshape(-1, LENGTH)[number * size : (number + 1) * size]:
        yield torch.from_numpy(row.astype(np.int32))  # litdata has no unsigned 16-bit type


def _litdata_batches(folder: Path) -> float:
    """Tokens in a CPU second."""
    import litdata
    from litdata.streaming.item_loader import TokensLoader

    torch.set_num_threads(1)
    began = time.process_time()
    dataset = litdata.StreamingDataset(str(folder), item_loader=TokensLoader(block_size=LENGTH), shuffle=True, seed=1)
    tokens = sum(batch.numel() for batch in litdata.StreamingDataLoader(dataset, batch_size=BATCH))
    return float(tokens / (time.process_time() - began))


def _growth(artifact: Artifact) -> float:
    """Growth of a process's memory over MANY_TOKENS, after WARM_TOKENS, in megabytes per 10^9 tokens."""
    with tempfile.TemporaryDirectory(dir=Path(artifact.uri).parent) as folder:
        name = "a/train-00000.arrow"
        files = {}
        (Path(folder) / "shards" / "many" / "a").mkdir(parents=True)
        for number in range(-(-(MANY_TOKENS + WARM_TOKENS) // (WINDOWS * LENGTH))):
            link = f"a/train-{number:05d}.arrow"
            (Path(folder) / "shards" / "many" / link).hardlink_to(Path(artifact.uri) / name)
            files[link] = artifact.manifest["files"][name]
        many = Artifact(Store(folder), "shards", "many", {**artifact.manifest, "files": files})
        process, tokens, warm = psutil.Process(), 0, 0
        with open_shards(many, "train") as readers:
            for batch in _epoch(readers):
                tokens += batch.input_ids.numel()
                if not warm and tokens >= WARM_TOKENS:
                    warm = process.memory_info().rss
            return (process.memory_info().rss - warm) / 1e6 / ((tokens - WARM_TOKENS) / 1e9)


def _raw_gets(artifact: Artifact) -> float:
    """Megabytes a second of raw GETs: same ranges, same client, same number in flight, no other work."""
    limits = RetryPolicy()
    with open_shards(artifact, "train") as readers:
        shards = readers["a"].shards
    ranges = [(shard.path, *shard.span(shard.columns[0], block)) for shard in shards for block in range(shard.blocks)]
    began = time.perf_counter()
    client = open_client(artifact.store.fs, limits)
    with ThreadPoolExecutor(limits.requests) as threads:
        size = sum(threads.map(lambda one: len(client.cat_file(one[0], start=one[1], end=one[2])), ranges))
    return size / 1e6 / (time.perf_counter() - began)


class _Faulty(RemoteBlockReader):
    """A block reader whose requests fail or return a flipped bit, at a given rate."""

    share = FAULTY

    def _request(self, client: Any, path: str, first: int, last: int) -> bytes:
        data = super()._request(client, path, first, last)
        chance = random.random()
        if chance < self.share / 2:
            raise ConnectionResetError("by the bench")
        return data[:-1] + bytes([data[-1] ^ 1]) if chance < self.share else data


def _remote_batches(artifact: Artifact, share: float) -> tuple[float, float]:
    """Megabytes a second of verified batches, and bytes fetched over bytes used."""
    torch.set_num_threads(1)
    random.seed(1)
    began = time.perf_counter()
    with open_shards(artifact, "train") as readers:
        if share:
            readers = {label: ShardReader(reader.shards, _Faulty(artifact.store)) for label, reader in readers.items()}
        tokens = sum(batch.input_ids.numel() for batch in _epoch(readers))
        source = readers["a"].source
    assert isinstance(source, RemoteBlockReader)
    seconds = time.perf_counter() - began
    return 2 * tokens / 1e6 / seconds, source.fetched / (2 * len(readers["a"]) * LENGTH)
