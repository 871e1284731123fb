"""Work in slices: what one process finished, no later one does again, however the first one ended."""

import json
import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from vectorclm.store.durable import TEMPORARY, sync_folder, sync_tree, temporary_beside
from vectorclm.store.uploads import Sending

RECORD = "slice.json"


class Slices:
    """Slices of the work on some sources, in their order: each makes `shard-00000.*` and so on of its source.

    They are finished in folders below `folder`, where a later process finds them, and get second names in `out`, in
    which the shards of a source are numbered through: `a/train-00000.*`.
    """

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder = folder
        self.out = out
        self.shards: Counter[str] = Counter()  # so far, by source
        self.placed: list[Path] = []
        self.used = set(_slices(folder))  # that earlier processes left, and those finished here

    def finish(self, source: str, number: int, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """What `make` returned of the source's next slice, now or in an earlier process."""
        folder, result = finish(self.folder / f"{source}-{number:05d}", make, self.out.parent)
        self.used.add(folder)
        for path, name in self._numbered(folder, source):
            place(path, self.out / name)
            self.placed.append(self.out / name)
        return result

    def start_again(self) -> None:
        """Count nothing as finished, and look at no slice that was finished until now."""
        self.folder = self.folder.with_name(f"{self.folder.name}-second")
        self.used |= set(_slices(self.folder))
        for path in self.placed:
            path.unlink()
        self.shards.clear()
        self.placed.clear()

    def clear(self) -> None:
        """Remove the slices that are in the artifact now, and what earlier processes left of them."""
        for folder in self.used:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in sorted({up for folder in self.used for up in folder.parents[:3]}, reverse=True):
            with suppress(OSError):  # another process has something in it
                parent.rmdir()

    def _numbered(self, folder: Path, source: str) -> Iterator[tuple[Path, str]]:
        """The files of a slice, and their names among all of the source."""
        shards = sorted({path.name.partition(".")[0] for path in folder.glob("shard-*")})
        for path in sorted(folder.glob("shard-*")):
            shard, _, suffix = path.name.partition(".")
            yield path, f"{source}-{self.shards[source] + shards.index(shard):05d}.{suffix}"
        self.shards[source] += len(shards)


class ResumableUpload(Slices):
    """Slices whose files go to a remote store, and the note of each: `folder` holds one at a time.

    So a later process goes on wherever it runs.
    """

    def __init__(self, folder: Path, sending: Sending) -> None:
        super().__init__(folder, folder)
        self.sending = sending

    def finish(self, source: str, number: int, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """What `make` returned of the source's next slice, now or in an earlier process."""
        work = f"{source}-{number:05d}"
        done = self.sending.noted(work)
        if done is None:
            with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=self.folder) as part:
                result, names = make(Path(part)), []
                for path, name in list(self._numbered(Path(part), source)):
                    named = Path(part) / name
                    named.parent.mkdir(parents=True, exist_ok=True)
                    self.sending.send(path.rename(named), name)
                    names.append(name)
            done = {"result": result, "shards": self.shards[source]}
            self.sending.note(work, done, names)
        self.shards[source] = done["shards"]
        return dict(done["result"])

    def start_again(self) -> None:
        """Count nothing as finished."""
        self.sending.start_again()
        self.shards.clear()


def finish(folder: Path, make: Callable[[Path], Mapping[str, Any]], work: Path) -> tuple[Path, dict[str, Any]]:
    """Where a slice is and what `make(out)` returns; both as an earlier process left them, where they are whole.

    A slice is made in a folder of its own in `work` and renamed at the end to `folder` with a random part, so that each
    process finds it whole or not at all, and none replaces what another made. One that is not what its record says is
    made again beside it.
    """
    for found in sorted(folder.parent.glob(f"{folder.name}.*")):
        if (result := _read(found)) is not None:
            return found, result
    own = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}")
    part = temporary_beside(work / folder.name)
    part.mkdir(parents=True)
    own.parent.mkdir(parents=True, exist_ok=True)
    try:
        made = make(part)
        files = {path.name: _hash(path) for path in sorted(part.iterdir())}
        (part / RECORD).write_text(json.dumps({"files": files, "result": made}))
        sync_tree(part)  # what one process finished stays finished, also after a power loss
        part.rename(own)
        sync_folder(own.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if (read := _read(own)) is None:
        raise OSError(f"{own} was written, but cannot be read back: check this machine's memory and disk")
    return own, read


def _slices(folder: Path) -> list[Path]:
    """All slices below a folder, whole or not."""
    return [path for path in folder.glob("*/*") if not path.name.startswith(".")]


def place(source: Path, target: Path) -> None:
    """Let `target` be the file `source`, which stays: a second name where the file system can, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text())
        whole = all(_hash(folder / name) == found for name, found in record["files"].items())
        return dict(record["result"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hash(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            found.update(data)
    return found.hexdigest()
