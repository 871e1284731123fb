"""Token shards: uncompressed Arrow IPC files with one flat buffer of windows, which a reader maps into memory."""

import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer

from vectorclm.corpus.sample_reader import SampleFiles
from vectorclm.corpus.source_reader import in_groups
from vectorclm.errors import CorruptArtifactError, DataError
from vectorclm.runtime.library_calls import interruptibly
from vectorclm.runtime.progress import Progress
from vectorclm.settings import Settings
from vectorclm.shards.audit import audit, check_round_trip, split_documents
from vectorclm.shards.encoder import JUDGE_EVERY, Encoder, EncoderMismatch, open_encoder
from vectorclm.shards.packing import Packing, pack
from vectorclm.store.artifact import Artifact
from vectorclm.store.durable import TEMPORARY
from vectorclm.store.resumable import Slices
from vectorclm.tokenizer import BOS_ID, EOS_ID, PAD_ID

SPLITS = ("train", "validation")
GROUP_DOCUMENTS = 512  # encoded at a time, or as many as have
GROUP_CHARACTERS = 4_000_000
PIECES = "documents.parquet"  # beside each shard: which document stands where


class ShardsConfig(Settings):
    """How documents become training windows."""

    sequence_length: int = Field(ge=8, le=65_536, description="Tokens in a window")
    shard_bytes: int = Field(64 * 1024 * 1024, ge=4096, description="Size of a shard file")
    packing: Packing = Field(
        "best_fit", description="Documents that fit stay whole, or follow each other and are cut where a window ends"
    )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The integers in which shards hold token ids."""
    return np.dtype(np.uint16 if vocab_size <= 65_536 else np.uint32)


class ShardWriter:
    """Writes windows [n, T] of integer columns to `{prefix}-00000.arrow`, a new file every `shard_bytes`.

    Beside it lies `{prefix}-00000.documents.parquet` with the pieces of documents in the windows, in their order:
    the number of the document, the window in this shard, and one past its last token in the window.
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
        """Append windows: each column is [n, T], all with the same n; `pieces` [P, 3] number these from 0."""
        for name, rows in columns.items():
            self.columns.setdefault(name, []).append(rows)
        if pieces is not None:
            self.pieces = np.concatenate([self.pieces, np.add(pieces, [[0, self.pending, 0]])])
        self.pending += len(next(iter(columns.values())))
        while self.pending >= self.rows_per_shard:
            self._flush(self.rows_per_shard)

    def close(self) -> int:
        """Write what is left; the number of windows in all."""
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
    """Windows, as of one shard or one block; a column that it does not have is None."""

    input_ids: NDArray[Any]  # [n, T]
    supervised: NDArray[Any] | None = None  # [n, T], 1 where a token carries loss; None: all do

    def rows(self, here: slice) -> "Windows":
        """Some of them."""
        return Windows(self.input_ids[here], None if self.supervised is None else self.supervised[here])


def read_windows(directory: Path, split: str) -> list[Windows]:
    """The shards of a split, in order; nothing is read yet but the headers.

    Raises CorruptArtifactError for a file that is no shard.
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
    """Tokenize every source of `sample` and write `{label}/{split}-00000.arrow`, and which documents stand where.

    A document is BOS, its tokens, EOS; `vectorclm.shards.packing` puts them into windows of `sequence_length`, padded
    where nothing stands. Each file of the sample is a slice of the work, packed for itself. `slices` says where a later
    call finds those that are finished, and whether their files come to `out`: give some of these settings and this
    sample alone.
    `encoder` is, where none is given, the fastest that proves identical to `tokenizer`; where it is disproved on the
    way, everything is written again without it, so the files are the same by whichever encoder.

    Returns the counts of each source and split, and beside them its `audit` by split: the encoder, documents judged
    and differing, documents decoded again, and what `vectorclm.shards.audit` counts in the files. Raises DataError
    where a source does not fill one window of each split or a document does not decode to itself, and
    CorruptArtifactError where the files do not hold the documents.
    """
    encoder = encoder if isinstance(encoder, Encoder) else open_encoder(encoder)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=out.parent) as folder:
        slices = slices or Slices(Path(folder, "slices"), out)
        files = SampleFiles(sample)
        try:
            return _write_sources(config, files, encoder, seed, slices)
        except EncoderMismatch as difference:
            encoder.fall_back(difference)
        slices.start_again()
        return _write_sources(config, files, encoder, seed, slices)


def _write_sources(
    config: ShardsConfig, sample: SampleFiles, encoder: Encoder, seed: int, slices: Slices
) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    with Progress("shards", sum(sample.bytes.values()), "compressed bytes") as progress:
        for label in sample.labels:
            policy = {"bos": BOS_ID, "eos": EOS_ID, "padding": PAD_ID, "packing": config.packing}
            summary[label] = {"policy": policy, "audit": {}}
            for split in SPLITS:
                counts: Counter[str] = Counter()
                ids = np.zeros(len(encoder.token_lengths), np.int64)
                for number, name in enumerate(sample.names(label, split)):
                    write = partial(_write_slice, config, sample, name, encoder, seed << 32 | number)
                    done = slices.finish(f"{label}/{split}", number, write)
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


def _write_slice(
    config: ShardsConfig, sample: SampleFiles, name: str, encoder: Encoder, seed: int, out: Path
) -> dict[str, Any]:
    """Write the windows of one file of the sample as `shard-00000.arrow`. Returns its counts, `ids` among them."""
    length, where = config.sequence_length, name.rpartition("-")[0]
    judged_before, found = encoder.judged, _Found()
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
class _Found:
    """What the documents of a slice amount to."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    round_trips: int = 0


def _encoded(
    encoder: Encoder, group: Sequence[str], where: str, left: threading.Event
) -> tuple[list[NDArray[np.uint32]], int]:
    """The ids of some documents, and how many of these were decoded again; seconds for one of some megabytes."""
    encoded = encoder.encode(group)
    if left.is_set():
        return [], 0
    return encoded, check_round_trip(encoder.reference, group[::JUDGE_EVERY], encoded[::JUDGE_EVERY], where)


def _documents(texts: Iterable[str], encoder: Encoder, found: _Found, where: str) -> Iterator[NDArray[Any]]:
    """The ids [1, n] of each document with its BOS and EOS."""
    vocab_size = encoder.reference.get_vocab_size()
    dtype = token_dtype(vocab_size)
    bos, eos = np.array([BOS_ID], np.uint32), np.array([EOS_ID], np.uint32)
    for group in in_groups(texts, GROUP_CHARACTERS, GROUP_DOCUMENTS):
        encoded, round_trips = interruptibly(partial(_encoded, encoder, group, where))
        found.round_trips += round_trips
        ids = np.concatenate([part for item in encoded for part in (bos, item, eos)])
        if ids.max() >= vocab_size:  # in fewer bits it would become another token
            raise CorruptArtifactError(f"{where}: {encoder.name} gave the id {ids.max()}, none of {vocab_size} tokens")
        found.documents += len(group)
        found.bytes += sum(len(text.encode()) for text in group)
        found.tokens += len(ids)
        ids, start = ids.astype(dtype)[None], 0
        for item in encoded:
            yield ids[:, start : start + len(item) + 2]
            start += len(item) + 2
