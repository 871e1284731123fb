"""Writes token shards: documents encoded and packed into windows, in uncompressed Arrow files for memory mapping."""

import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vectorclm.corpus.sample_reader import SampleFiles
from vectorclm.corpus.source_reader import in_groups
from vectorclm.errors import CorruptArtifactError, DataError
from vectorclm.runtime.library_calls import interruptibly
from vectorclm.runtime.progress import Progress
from vectorclm.shards.audit import audit, check_round_trip, split_documents
from vectorclm.shards.config import SPLITS, ShardsConfig
from vectorclm.shards.encoder import JUDGE_EVERY, Encoder, EncoderMismatch, Gigatoken, open_encoder
from vectorclm.shards.packing import pack
from vectorclm.store.artifact import Artifact, Store
from vectorclm.store.durable import TEMPORARY
from vectorclm.store.resumable import Slices
from vectorclm.tokenizer import BOS_ID, EOS_ID, PAD_ID, read_tokenizer

GROUP_DOCUMENTS = 512  # documents encoded at a time, at most
GROUP_CHARACTERS = 4_000_000  # characters, after which a group of documents ends
PIECES = "documents.parquet"  # suffix of the file beside each shard with the places of its documents


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The integer type of token ids in shards."""
    return np.dtype(np.uint16 if vocab_size <= 65_536 else np.uint32)


class ShardWriter:
    """Writes windows [n, T] of integer columns to `{prefix}-00000.arrow`, a new file every `shard_bytes`.

    A file `{prefix}-00000.documents.parquet` beside each shard lists the pieces of documents in its windows, in order:
    the document's number, the window in this shard, and the end (one past the last token in the window).
    """

    def __init__(self, prefix: Path, sequence_length: int, shard_bytes: int) -> None:
        self.prefix = prefix
        self.sequence_length = sequence_length
        self.rows_per_shard = max(1, shard_bytes // (2 * sequence_length))
        self.columns: dict[str, list[NDArray[Any]]] = {}
        self.pieces: NDArray[np.int64] = np.empty((0, 3), np.int64)
        self.pending = self.windows = self.shards = 0
        prefix.parent.mkdir(parents=True, exist_ok=True)

    def write(self, pieces: NDArray[np.int64] | None = None, **columns: NDArray[Any]) -> None:
        """Append windows: each column is [n, T] with the same n; `pieces` [P, 3] count these windows from 0."""
        for name, rows in columns.items():
            self.columns.setdefault(name, []).append(rows)
        if pieces is not None:
            self.pieces = np.concatenate([self.pieces, np.add(pieces, [[0, self.pending, 0]])])
        self.pending += len(next(iter(columns.values())))
        while self.pending >= self.rows_per_shard:
            self._flush(self.rows_per_shard)

    def close(self) -> int:
        """Write the remaining windows. Returns the total number of windows."""
        if self.pending:
            self._flush(self.pending)
        return self.windows

    def _flush(self, rows: int) -> None:
        arrays = {}
        for name, parts in self.columns.items():
            whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
            arrays[name] = pa.array(whole[:rows].reshape(-1))
            self.columns[name] = [whole[rows:]]
        schema = pa.schema([(name, array.type) for name, array in arrays.items()])
        schema = schema.with_metadata({"sequence_length": str(self.sequence_length)})
        batch = pa.record_batch(list(arrays.values()), schema=schema)
        path = f"{self.prefix}-{self.shards:05d}"
        with pa.OSFile(f"{path}.arrow", "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)
        if len(self.pieces):
            cut = int(np.searchsorted(self.pieces[:, 1], rows))
            document, window, end = self.pieces[:cut].T
            table = {"document": document, "window": window.astype(np.int32), "end": end.astype(np.int32)}
            pq.write_table(pa.table(table), f"{path}.{PIECES}", compression="zstd")
            self.pieces = np.subtract(self.pieces[cut:], [[0, rows, 0]])
        self.shards += 1
        self.windows += rows
        self.pending -= rows


class Windows(NamedTuple):
    """Windows of a shard or block."""

    input_ids: NDArray[Any]  # [n, T]
    supervised: NDArray[Any] | None = None  # [n, T], 1 where a token carries loss; None = all tokens do

    def rows(self, here: slice) -> "Windows":
        """A slice of the windows."""
        return Windows(self.input_ids[here], None if self.supervised is None else self.supervised[here])


def read_windows(directory: Path, split: str) -> list[Windows]:
    """Open the shards of a split by memory mapping, in order; only the headers are read at once.

    Raises CorruptArtifactError for a file that is not a shard.
    """
    shards = []
    for path in sorted(directory.glob(f"{split}-*.arrow")):
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            length = int(reader.schema.metadata[b"sequence_length"])
            batch = reader.get_batch(0)
            columns = [c.to_numpy(zero_copy_only=True).reshape(-1, length) for c in batch.columns]
        except (pa.ArrowInvalid, OSError, TypeError, KeyError, ValueError) as error:
            raise CorruptArtifactError(f"{path} is not a readable shard: {error}") from error
        shards.append(Windows(columns[0], columns[1] if len(columns) > 1 else None))
    return shards


def write_shards(
    config: ShardsConfig,
    sample: Path | Artifact,
    encoder: Encoder | Tokenizer,
    out: Path,
    *,
    seed: int = 0,
    slices: Slices | None = None,
) -> dict[str, Any]:
    """Tokenize and pack every source of `sample` into `{label}/{split}-00000.arrow`, with a list of document places.

    A document is BOS, its tokens, EOS; `vectorclm.shards.packing` packs documents into padded windows of
    `sequence_length`. Each file of the sample is a slice, packed on its own. `slices` keeps finished slices for a later
    call, and must belong to these settings and this sample only; its workers build slices beside each other.
    For a `Tokenizer`, `encoder` becomes the fastest encoder that agrees with it. If the encoder differs from the
    reference later, everything is written again without it, so the files never depend on the encoder.

    Returns the counts of each source and split, and an `audit` by split: the encoder, documents compared and differing,
    documents decoded again, and the counts of `vectorclm.shards.audit`. Raises DataError where a source does not fill
    one window of each split or a document does not decode to itself, and CorruptArtifactError where the files do not
    hold the documents.
    """
    encoder = encoder if isinstance(encoder, Encoder) else open_encoder(encoder)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=out.parent) as folder:
        slices = slices or Slices(Path(folder, "slices"), out)
        files = SampleFiles(sample)
        try:
            return _write_sources(_SliceQueue(config, files, encoder, seed, slices, Path(folder, "first")))
        except EncoderMismatch as difference:
            encoder.fall_back(difference)
        slices.start_again()
        return _write_sources(_SliceQueue(config, files, encoder, seed, slices, Path(folder, "second")))


def _write_sources(queue: "_SliceQueue") -> dict[str, Any]:
    summary: dict[str, Any] = {}
    config, sample, encoder = queue.config, queue.sample, queue.encoder
    with Progress("shards", sum(sample.bytes.values()), "compressed bytes") as progress:
        for label in sample.labels:
            policy = {"bos": BOS_ID, "eos": EOS_ID, "padding": PAD_ID, "packing": config.packing}
            summary[label] = {"policy": policy, "audit": {}}
            for split in SPLITS:
                counts: Counter[str] = Counter()
                ids = np.zeros(len(encoder.token_lengths), np.int64)
                for number, name in enumerate(sample.names(label, split)):
                    done = queue.finish(f"{label}/{split}", number, name)
                    ids += np.array(done.pop("ids"))
                    counts.update(done)
                    progress.advance(sample.bytes[name])
                if counts["tokens"] < config.sequence_length:
                    raise DataError(
                        f"{label}: the {split} documents ({counts['documents']}) do not fill one window of "
                        f"{config.sequence_length} tokens: sample more, or shorten shards.sequence_length"
                    )
                judged = {key: counts.pop(key) for key in ("documents_judged", "round_trips")}
                summary[label][split] = dict(counts)
                summary[label]["audit"][split] = {
                    "encoder": encoder.name,
                    **({} if encoder.rejected is None else {"rejected": encoder.rejected}),
                    **judged,
                    "documents_differing": encoder.differed,
                    "bos": int(ids[BOS_ID]),
                    "eos": int(ids[EOS_ID]),
                    "distinct_ids": int(np.count_nonzero(ids)) - int(ids[PAD_ID] > 0),
                }
    return summary


@dataclass
class _SliceQueue:
    """The slices of a sample in order; workers build them ahead, unless an earlier process has finished them."""

    config: ShardsConfig
    sample: SampleFiles
    encoder: Encoder
    seed: int
    slices: Slices
    folder: Path  # of slices that workers have built

    def __post_init__(self) -> None:
        sources = [(label, split) for label in self.sample.labels for split in SPLITS]
        named = [(f"{label}/{split}", enumerate(self.sample.names(label, split))) for label, split in sources]
        self._next = deque((where, *item) for where, items in named for item in items)
        self._built: dict[str, tuple[Path, Callable[[], Any]]] = {}

    def finish(self, source: str, number: int, name: str) -> dict[str, Any]:
        """The counts of the next slice in order."""
        while self._next and len(self._built) < self.slices.workers.ahead:
            where, place, ahead = self._next.popleft()
            if not self.slices.has(where, place):
                out = self.folder / ahead
                out.mkdir(parents=True)
                job = (self.config, self._sample(), ahead, *self._encoder(), self.seed << 32 | place)
                self._built[ahead] = out, self.slices.workers.submit(_write_slice_elsewhere, out, *job)
        return self.slices.finish(source, number, partial(self._make, name, number))

    def _make(self, name: str, number: int, out: Path) -> dict[str, Any]:
        if name not in self._built:
            return _write_slice(self.config, self.sample, name, self.encoder, self.seed << 32 | number, out)
        folder, result = self._built.pop(name)
        counts: dict[str, Any] = result()
        for path in folder.iterdir():
            path.rename(out / path.name)
        return counts

    def _sample(self) -> tuple[str, ...]:
        """The address of the sample, which can be pickled."""
        found = self.sample.sample
        return (found.store.uri, found.stage, found.fingerprint) if isinstance(found, Artifact) else (str(found),)

    def _encoder(self) -> tuple[str, bool]:
        """The tokenizer, and whether gigatoken encodes, which this process has proved."""
        return self.encoder.reference.to_str(), self.encoder.fast is not None


def _write_slice_elsewhere(
    out: Path, config: ShardsConfig, sample: tuple[str, ...], name: str, *rest: Any
) -> dict[str, Any]:
    """Write a slice in a worker; `rest` is the tokenizer, whether gigatoken encodes, and the seed."""
    tokenizer, fast, seed = rest
    found = Store(sample[0]).find(sample[1], sample[2]) if len(sample) > 1 else Path(sample[0])
    if found is None:
        raise CorruptArtifactError(f"the sample {'/'.join(sample)} is gone")
    return _write_slice(config, SampleFiles(found), name, _opened(tokenizer, fast), seed, out)


@lru_cache(maxsize=1)
def _opened(tokenizer: str, fast: bool) -> Encoder:
    """The encoder of a worker, for all its slices."""
    reference = read_tokenizer(tokenizer)
    return Encoder(reference, Gigatoken(reference) if fast else None)


def _write_slice(
    config: ShardsConfig, sample: SampleFiles, name: str, encoder: Encoder, seed: int, out: Path
) -> dict[str, Any]:
    """Write the windows of one sample file to `shard-00000.arrow`. Returns its counts, with `ids` per token."""
    length, where = config.sequence_length, name.rpartition("-")[0]
    judged_before, found = encoder.judged, _DocumentCounts()
    writer = ShardWriter(out / "shard", length, config.shard_bytes)
    tables = []
    documents = _documents(sample.read(name), encoder, found, where)
    for packed in pack(documents, length, (PAD_ID,), config.packing, seed):
        first = writer.windows + writer.pending
        tables.append(np.add(packed.pieces, [[0, first, 0]]))
        writer.write(packed.pieces, input_ids=packed.columns[0])
    windows = writer.close()
    stored = [shard.input_ids for shard in read_windows(out, "shard")]
    ids = audit(stored, found.documents, found.bytes, encoder.token_lengths, where)
    padding = int(ids[PAD_ID])
    split, split_though_fit = split_documents(np.concatenate(tables), length) if tables else (0, 0)
    return {
        "ids": ids.tolist(),
        "documents": found.documents,
        "windows": windows,
        "tokens": windows * length - padding,
        "padding_tokens": padding,
        "dropped_tokens": found.tokens + padding - windows * length,
        "documents_split": split,
        "documents_split_that_fit": split_though_fit,
        "documents_judged": encoder.judged - judged_before,
        "round_trips": found.round_trips,
    }


@dataclass
class _DocumentCounts:
    """Counts of a slice's documents."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    round_trips: int = 0


def _encoded(
    encoder: Encoder, group: Sequence[str], where: str, left: threading.Event
) -> tuple[list[NDArray[np.uint32]], int]:
    """Encode a group of documents. Returns the ids, and the number of documents decoded again as a check."""
    encoded = encoder.encode(group)
    if left.is_set():
        return [], 0
    return encoded, check_round_trip(encoder.reference, group[::JUDGE_EVERY], encoded[::JUDGE_EVERY], where)


def _documents(texts: Iterable[str], encoder: Encoder, found: _DocumentCounts, where: str) -> Iterator[NDArray[Any]]:
    """The ids [1, n] of each document, with BOS and EOS."""
    vocab_size = encoder.reference.get_vocab_size()
    dtype = token_dtype(vocab_size)
    bos, eos = np.array([BOS_ID], np.uint32), np.array([EOS_ID], np.uint32)
    for group in in_groups(texts, GROUP_CHARACTERS, GROUP_DOCUMENTS):
        encoded, round_trips = interruptibly(partial(_encoded, encoder, group, where))
        found.round_trips += round_trips
        ids = np.concatenate([part for item in encoded for part in (bos, item, eos)])
        if ids.max() >= vocab_size:  # conversion to fewer bits would change the token
            raise CorruptArtifactError(
                f"{where}: {encoder.name} returned the id {ids.max()}, outside the vocabulary of {vocab_size} tokens"
            )
        found.documents += len(group)
        found.bytes += sum(len(text.encode()) for text in group)
        found.tokens += len(ids)
        ids, start = ids.astype(dtype)[None], 0
        for item in encoded:
            yield ids[:, start : start + len(item) + 2]
            start += len(item) + 2
