"""`vectorclm bench data`: tokenizing, packing, training order and reading, against other libraries.

Both sides run in turns, on the same texts, in one process that does nothing else. CPU seconds count all its threads,
without imports and without reading the input that both sides share.
"""

import gc
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vectorclm.bench.reading import reading
from vectorclm.bench.table import Row, bounded, compared, could_not_run
from vectorclm.config import ExperimentConfig, changed, load_experiment
from vectorclm.corpus.sample_reader import read_texts
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.temporary import temporary_folder
from vectorclm.shards.config import MIX_BLOCK
from vectorclm.shards.encoder import Gigatoken
from vectorclm.shards.order import MixturePhase, TrainingOrder, windows_per_block
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store
from vectorclm.tokenizer import SPECIAL_TOKENS, load_tokenizer
from vectorclm.train_tokenizer import learn

TEXT_BYTES = 110_000_000  # of a mirror, in the mix of `small`, or of the generated world
PLANNED_TOKENS = 3_500_000_000
PLANNED_BATCH = 512  # windows located when a training resumes
ENCODE, TRAIN = "encode against encode_batch_fast", "BPE training against tokenizers"
PUBLISH = "source text to published shards against bare encode_batch_fast"


@dataclass(frozen=True)
class Text:
    """The sample of a bench and its tokenizer, in a store of its own."""

    experiment: ExperimentConfig
    data: Path | None
    store: Path
    size: int  # UTF-8 bytes of the documents for training

    @property
    def name(self) -> str:
        """Source and size of the text, for notes."""
        return f"{self.size / 1e6:.1f} MB of {'the generated world' if self.data is None else 'the mirror'}"

    def folder(self, stage: str) -> Path:
        """The folder of a stage's artifact."""
        return self.store / stage / plans(self.experiment)[stage].fingerprint

    def documents(self) -> list[str]:
        """All documents for training."""
        return [text for path in sorted(self.folder("sample").iterdir()) if path.is_dir() for text in _train(path)]


def data_layer(rounds: int, data: Path | None, store: str | None = None, text_bytes: int = TEXT_BYTES) -> Iterator[Row]:
    """Every row, on about `text_bytes` of the mirror `data` or of the generated world. S3 rows use `store`."""
    with (
        temporary_folder("bench-") as folder,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        text = prepare(folder, data, text_bytes)
        yield from _encoding(text, rounds, pool)
        yield _training(text, rounds, pool)
        yield _packing(text)
        yield from reading(folder, rounds, pool, store)
    yield from _planning(rounds)


def prepare(folder: Path, data: Path | None, text_bytes: int) -> Text:
    """Draw about `text_bytes` of text and learn a tokenizer from it, in a store in `folder`."""
    experiment, path = load_experiment("tiny" if data is None else "small")
    held_out = {} if data is None else {"sample.validation_share": 0.05}  # of little text
    experiment = changed(experiment, {"sample.bytes": text_bytes, "shards.packing": "best_fit", **held_out})
    experiment, _ = pin(experiment, folder / path.name, data, resolve=True)
    store = Store(str(folder / "store"))
    sample, _ = run_stage("sample", experiment, store, Runtime(), data)
    run_stage("tokenizer", experiment, store, Runtime(), data)
    return Text(experiment, data, folder / "store", sample.summary["bytes"])


def _encoding(text: Text, rounds: int, pool: Executor) -> Iterator[Row]:
    """Encoding alone, and all work from the source to published shards; both have the same peer."""
    fast: list[float] = []
    whole: list[float] = []
    peer: list[float] = []
    differing, shares = 0, []
    installed = find_spec("gigatoken") is not None
    for _ in range(rounds):
        seconds, expected = pool.submit(_encode, text, "tokenizers").result()
        peer.append(text.size / 1e6 / seconds)
        if installed:
            seconds, found = pool.submit(_encode, text, "gigatoken").result()
            fast.append(text.size / 1e6 / seconds)
            differing = max(differing, sum(a != b for a, b in zip(found, expected, strict=True)))
        drawing, writing = pool.submit(_publish, text).result()
        whole.append(text.size / 1e6 / (drawing + writing))
        shares.append(drawing / (drawing + writing))
    if installed:
        row = compared(ENCODE, fast, peer, "MB/CPU s", ask=40, most=False)
        why = f"{differing} of {len(expected)} documents differ; {text.name}; {row.why}"
        yield replace(row, met=row.met and not differing, why=why)
    else:
        yield could_not_run(ENCODE, "MB/CPU s", 40, "gigatoken is not installed: pip install gigatoken")
    row = compared(PUBLISH, whole, peer, "MB/CPU s", ask=10, most=False)
    bound = f"drawing the sample takes {100 * sum(shares) / rounds:.0f} % of our time, the shards the rest"
    yield replace(row, why=f"{bound}; {text.name}; {row.why}")


def _encode(text: Text, side: str) -> tuple[float, list[int]]:
    """CPU seconds of encoding, and a hash of each document's ids."""
    texts, tokenizer = text.documents(), load_tokenizer(text.folder("tokenizer"))
    if side == "gigatoken":
        encoder = Gigatoken(tokenizer)
        began = time.process_time()
        found: list[Any] = [encoder.encode(one) for one in texts]
        seconds = time.process_time() - began
    else:
        began = time.process_time()
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        seconds = time.process_time() - began
        found = [item.ids for item in encoded]
    return seconds, [xxhash.xxh3_64_intdigest(np.array(ids, np.uint32).tobytes()) for ids in found]


def _publish(text: Text) -> tuple[float, float]:
    """CPU seconds of the stages sample and shards, in a store with only the tokenizer."""
    import datasets  # noqa: F401  imports pandas, which pyarrow would import at its first list

    gc.freeze()  # keeps the imported modules out of collections, as the stage's command does
    with tempfile.TemporaryDirectory(dir=text.store.parent) as folder:
        shutil.copytree(text.store / "tokenizer", Path(folder) / "tokenizer")
        spent = [time.process_time()]
        for stage in ("sample", "shards"):
            run_stage(stage, text.experiment, Store(folder), Runtime(), text.data)
            spent.append(time.process_time())
    return spent[1] - spent[0], spent[2] - spent[1]


def _training(text: Text, rounds: int, pool: Executor) -> Row:
    if find_spec("gigatoken") is None:
        return could_not_run(TRAIN, "MB/CPU s", 5, "gigatoken is not installed: pip install gigatoken")
    ours: list[float] = []
    peer: list[float] = []
    for _ in range(rounds):
        seconds, expected = pool.submit(_learn, text, "tokenizers").result()
        peer.append(text.size / 1e6 / seconds)
        seconds, found = pool.submit(_learn, text, "gigatoken").result()
        ours.append(text.size / 1e6 / seconds)
    row = compared(TRAIN, ours, peer, "MB/CPU s", ask=5, most=False)
    same = sum(a == b for a, b in zip(found, expected, strict=False))
    why = f"{same} of {len(expected)} merges are the same; the stage itself uses tokenizers; {text.name}; {row.why}"
    return replace(row, met=row.met and found == expected, why=why)


def _learn(text: Text, side: str) -> tuple[float, list[tuple[bytes, bytes]]]:
    """CPU seconds of learning the merges, and the merges as pairs of byte strings."""
    texts, vocab_size = text.documents(), text.experiment.tokenizer.vocab_size
    if side == "tokenizers":
        began = time.process_time()
        tokenizer = learn(texts, vocab_size)
        seconds = time.process_time() - began
        return seconds, Gigatoken(tokenizer).merges
    import gigatoken

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it prints its progress
    os.dup2(1, 2)
    began = time.process_time()
    joined = b"\xff".join(one.encode() for one in texts)  # a byte that never occurs in UTF-8
    _, merges = gigatoken.train_bpe(joined, vocab_size, list(SPECIAL_TOKENS), separator=b"\xff")
    return time.process_time() - began, [(left, right) for left, right in merges]


def _packing(text: Text) -> Row:
    """The share of padding in the training windows of the text."""
    shards, _ = run_stage("shards", text.experiment, Store(str(text.store)), Runtime(), text.data)
    counts: Counter[str] = Counter()
    for source in shards.summary.values():
        counts.update(source["train"])
    share = counts["padding_tokens"] / (counts["padding_tokens"] + counts["tokens"])
    split, dropped = counts["documents_split_that_fit"], counts["dropped_tokens"]
    note = (
        f"{split} of {counts['documents']} documents split that fit, {dropped} tokens dropped; "
        f"{counts['windows']} windows of {text.experiment.shards.sequence_length} tokens; {text.name}"
    )
    row = bounded("padding of windows", [share], "share", 0.001, note)
    return replace(row, met=row.met and not split and not dropped)


def _planning(rounds: int) -> Iterator[Row]:
    """The training order of `base`, over sources sized by their weights, some read more than once."""
    experiment, _ = load_experiment("base")
    length, total = experiment.shards.sequence_length, PLANNED_TOKENS // experiment.shards.sequence_length
    weights = {source.label: source.weight for source in experiment.sample.sources}
    sizes = {label: round(total * weight / sum(weights.values())) for label, weight in weights.items()}
    phases = [MixturePhase(phase.tokens // length, phase.weights or weights) for phase in experiment.pretrain.phases]
    per_block = windows_per_block(length, 2)
    for share in (0.01, 0.5, 0.99):
        spent = []
        for _ in range(10 * rounds):
            began = time.perf_counter()
            order = TrainingOrder(phases, sizes, experiment.seed, windows_per_block=per_block)
            step = int(share * order.windows) // PLANNED_BATCH
            order.locate(np.arange(PLANNED_BATCH) + step * PLANNED_BATCH)
            spent.append(1000 * (time.perf_counter() - began))
        note = f"computes the training order and locates the {PLANNED_BATCH} windows of the next step"
        yield bounded(f"resume at {100 * share:.0f} % of {PLANNED_TOKENS / 1e9} billion tokens", spent, "ms", 5, note)
    yield from walked(TrainingOrder(phases, sizes, experiment.seed, windows_per_block=per_block))


def walked(order: TrainingOrder) -> Iterator[Row]:
    """Walk a whole training order: the largest error of the mix at the end of a block, and windows repeated too early.

    Exact shares are those of the phase, or of its segments where an exhausted source's share goes to the others.
    """
    sources, windows = walk(order)
    ends = order.boundaries()
    furthest, since = 0.0, 0.0
    before, wanted = np.zeros(len(order.labels)), np.zeros(len(order.labels))
    read = np.stack([np.cumsum(sources == number)[ends - 1] for number in range(len(order.labels))], axis=1)
    for segment in order.segments:
        here = (segment.first < ends) & (ends <= segment.first + segment.windows)
        exact = np.outer(ends[here] - segment.first, segment.shares)
        furthest = max(furthest, float(np.abs(read[here] - before - exact).max(initial=0.0)))
        since = max(since, float(np.abs(read[here] - wanted - exact).max(initial=0.0)))
        before, wanted = read[here][-1], wanted + exact[-1]
    note = f"within its phase, at all {len(ends):,}, over {order.windows:,} windows; since the beginning {since:.2f}"
    yield bounded("mixture error at any block boundary", [furthest], "windows of a source", 1, note)
    repeats = 0
    for number, size in enumerate(order.sizes):
        seen = windows[sources == number]
        for start in range(0, len(seen), size):
            epoch = seen[start : start + size]
            repeats += len(epoch) - int((np.bincount(epoch) > 0).sum())
    most = max(order.epochs().values())
    yield bounded("repeats before exhaustion", [repeats], "windows", 0, f"sources are read up to {most:.2f} times")


def walk(order: TrainingOrder) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
    """Source and window at every position of a training order, located in batches of 16 mix blocks."""
    sources, windows = np.empty(order.windows, np.int8), np.empty(order.windows, np.int32)
    for start in range(0, order.windows, 16 * MIX_BLOCK):
        here = slice(start, min(start + 16 * MIX_BLOCK, order.windows))
        sources[here], windows[here] = order.locate(np.arange(here.start, here.stop))
    return sources, windows


def _train(folder: Path) -> Iterator[str]:
    return read_texts(folder, "train")
