"""Token shards: uncompressed Arrow IPC files with one flat buffer of windows, which a reader maps into memory."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer

from vectorclm.corpus import read_texts
from vectorclm.errors import CorruptArtifactError, DataError
from vectorclm.progress import Progress
from vectorclm.settings import Settings
from vectorclm.train_tokenizer import BOS_ID, EOS_ID

SPLITS = ("train", "validation")


class ShardsConfig(Settings):
    """How documents become training windows."""

    sequence_length: int = Field(ge=8, le=65_536, description="Tokens in a window")
    shard_bytes: int = Field(64 * 1024 * 1024, ge=4096, description="Size of a shard file")


class ShardWriter:
    """Writes windows [n, T] of integer columns to `{prefix}-00000.arrow`, a new file every `shard_bytes`."""

    def __init__(self, prefix: Path, sequence_length: int, shard_bytes: int) -> None:
        self.prefix = prefix
        self.sequence_length = sequence_length
        self.rows_per_shard = max(1, shard_bytes // (2 * sequence_length))
        self.columns: dict[str, list[NDArray[Any]]] = {}
        self.pending = self.windows = self.shards = 0
        prefix.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **columns: NDArray[Any]) -> None:
        """Append windows: each column is [n, T], all with the same n."""
        for name, rows in columns.items():
            self.columns.setdefault(name, []).append(rows)
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
            whole = np.concatenate(parts)
            arrays[name] = pa.array(whole[:rows].reshape(-1))
            self.columns[name] = [whole[rows:]]
        schema = pa.schema([(name, array.type) for name, array in arrays.items()])
        schema = schema.with_metadata({"sequence_length": str(self.sequence_length)})
        batch = pa.record_batch(list(arrays.values()), schema=schema)
        with (
            pa.OSFile(f"{self.prefix}-{self.shards:05d}.arrow", "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            writer.write_batch(batch)
        self.shards += 1
        self.windows += rows
        self.pending -= rows


class Windows(NamedTuple):
    """One shard, mapped into memory."""

    input_ids: NDArray[Any]  # [n, T]
    supervised: NDArray[Any] | None  # [n, T], 1 where a token carries loss; None: all do


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


def write_shards(config: ShardsConfig, sample: Path, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """Tokenize every source of `sample` and write `{label}/{split}-00000.arrow`.

    A document is BOS, its tokens, EOS; documents follow each other and are cut into windows of `sequence_length`.
    The last, partial window of a split is dropped and counted. Returns windows, tokens and documents per source.
    Raises DataError where a source does not fill one window of each split.
    """
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 65_536 else np.uint32
    labels = sorted(path.name for path in sample.iterdir() if path.is_dir())
    size = sum(path.stat().st_size for path in sample.rglob("*.parquet"))
    summary: dict[str, Any] = {}
    with Progress("shards", size, "compressed bytes") as progress:
        for label in labels:
            summary[label] = {}
            for split in SPLITS:
                writer = ShardWriter(out / label / split, config.sequence_length, config.shard_bytes)
                documents, dropped = _write_split(writer, read_texts(sample / label, split), tokenizer, dtype)
                windows = writer.close()
                if windows == 0:
                    raise DataError(
                        f"{label}: the {split} documents ({documents}) do not fill one window of "
                        f"{config.sequence_length} tokens: sample more, or shorten shards.sequence_length"
                    )
                progress.advance(sum(p.stat().st_size for p in (sample / label).glob(f"{split}-*.parquet")))
                summary[label][split] = {
                    "documents": documents,
                    "windows": windows,
                    "tokens": windows * config.sequence_length,
                    "dropped_tokens": dropped,
                }
    return summary


def _write_split(writer: ShardWriter, texts: Iterable[str], tokenizer: Tokenizer, dtype: Any) -> tuple[int, int]:
    """Write all windows of one split; how many documents went in and how many tokens were left over."""
    length = writer.sequence_length
    rest = np.empty(0, dtype)
    documents = 0
    for ids, count in _encoded(texts, tokenizer, dtype):
        documents += count
        rest = np.concatenate([rest, ids])
        whole = len(rest) // length * length
        writer.write(input_ids=rest[:whole].reshape(-1, length))
        rest = rest[whole:]
    return documents, len(rest)


def _encoded(texts: Iterable[str], tokenizer: Tokenizer, dtype: Any) -> Iterator[tuple[NDArray[Any], int]]:
    """The ids of some hundred documents at a time, each between BOS and EOS, and how many documents they are."""
    stream = iter(texts)
    while group := list(islice(stream, 512)):
        encodings = tokenizer.encode_batch_fast(group, add_special_tokens=False)
        ids = [np.array([BOS_ID, *item.ids, EOS_ID], dtype) for item in encodings]
        yield np.concatenate(ids), len(group)
