"""Reads the documents of a finished sample, for tokenizer training and the shards."""

from collections.abc import Iterator
from pathlib import Path

from vectorclm.corpus.file_formats import read_parquet
from vectorclm.errors import DataError
from vectorclm.store.artifact import Artifact


class SampleFiles:
    """The Parquet files of a sample, in a folder or an artifact, by name.

    A file of a remote store is read into memory, one at a time, and is never written to the local disk.
    """

    def __init__(self, sample: Path | Artifact) -> None:
        self.sample = sample
        if isinstance(sample, Artifact):
            sizes = {name: int(entry["bytes"]) for name, entry in sample.manifest["files"].items()}
        else:
            sizes = {path.relative_to(sample).as_posix(): path.stat().st_size for path in sample.rglob("*.parquet")}
        self.bytes = {name: size for name, size in sorted(sizes.items()) if name.endswith(".parquet")}
        self.labels = sorted({name.partition("/")[0] for name in self.bytes})

    def names(self, label: str, split: str) -> list[str]:
        """The files of a split (`train`, `validation`) of a source, in order. Raises DataError where there are none."""
        names = [name for name in self.bytes if name.startswith(f"{label}/{split}-")]
        if not names:
            where = self.sample.uri if isinstance(self.sample, Artifact) else self.sample
            raise DataError(f"{where}/{label} has no {split}-*.parquet: it is not a source of a sample")
        return names

    def read(self, name: str) -> Iterator[str]:
        """The documents of one file, in order. The bytes of an artifact's file are verified."""
        file: Path | bytes
        if not isinstance(self.sample, Artifact):
            file = self.sample / name
        elif self.sample.store.is_local:
            file = self.sample.local(name) / name
        else:
            file = self.sample.read(name)
        where = self.sample.uri if isinstance(self.sample, Artifact) else self.sample
        for row in read_parquet(file, ("text",), f"{where}/{name}"):
            yield row["text"]

    def texts(self, label: str, split: str) -> Iterator[str]:
        """The documents of one split of one source, in order."""
        for name in self.names(label, split):
            yield from self.read(name)


def read_texts(directory: Path, split: str) -> Iterator[str]:
    """The documents of one split in a source's folder of a sample, in order."""
    return SampleFiles(directory.parent).texts(directory.name, split)
