"""Writes the documents of a sample as zstd Parquet files, each of which a worker can write by itself."""

import mmap
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vectorclm.corpus.candidates import GROUP_BYTES, Index, texts_at

FILE_BYTES = 256 * 1024 * 1024  # text in one file of the sample
GROUP_DOCUMENTS = 1000
SCHEMA = pa.schema([("text", pa.string()), ("id", pa.string())])


def divided(sizes: Index) -> list[list[slice]]:
    """The row groups of each file for documents of these sizes, in order: a new file after every FILE_BYTES of text."""
    files: list[list[slice]] = []
    first = in_group = in_file = 0
    for end, size in enumerate(sizes.tolist(), 1):
        in_group += size
        if end - first < GROUP_DOCUMENTS and in_group < GROUP_BYTES and end < len(sizes):
            continue
        if not in_file:
            files.append([])
        files[-1].append(slice(first, end))
        in_file = in_file + in_group if in_file + in_group < FILE_BYTES else 0
        first, in_group = end, 0
    return files


def write_file(path: Path, reserve: Path, keys: Index, places: Index, groups: list[slice]) -> None:
    """Write the documents at `places` of a reserve's file to `path`, in these row groups of it."""
    with (
        reserve.open("rb") as file,
        closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as texts,
        pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer,
    ):
        for group in (slice(one.start - groups[0].start, one.stop - groups[0].start) for one in groups):
            names = zip(keys["high"][group].tolist(), keys["low"][group].tolist(), strict=True)
            ids = [f"{high:016x}{low:016x}" for high, low in names]
            writer.write_table(pa.table([texts_at(texts, places[group]), ids], schema=SCHEMA))
