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

from vectorclm.sending import Sending

RECORD = "slice.json"
PART = ".slice-"  # the beginning of the name of a folder in which one is made


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

    def finish(self, source: str, number: int, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """What `make` returned of the source's next slice, now or in an earlier process."""
        folder = self.folder / f"{source}-{number:05d}"
        result = finish(folder, make)
        for path, name in self._numbered(folder, source):
            place(path, self.out / name)
            self.placed.append(self.out / name)
        return result

    def start_again(self) -> None:
        """Forget all that is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.placed:
            path.unlink()
        self.shards.clear()
        self.placed.clear()

    def _numbered(self, folder: Path, source: str) -> Iterator[tuple[Path, str]]:
        """The files of a slice, and their names among all of the source."""
        shards = sorted({path.name.partition(".")[0] for path in folder.glob("shard-*")})
        for path in sorted(folder.glob("shard-*")):
            shard, _, suffix = path.name.partition(".")
            yield path, f"{source}-{self.shards[source] + shards.index(shard):05d}.{suffix}"
        self.shards[source] += len(shards)


class SentSlices(Slices):
    """Slices whose files go to a remote store, and the note of each: `folder` holds one at a time.

    So a later process goes on wherever it runs.
    """

    def __init__(self, folder: Path, sending: Sending) -> None:
        super().__init__(folder, folder)
        self.sending = sending
        for left in folder.glob(f"{PART}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)

    def finish(self, source: str, number: int, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """What `make` returned of the source's next slice, now or in an earlier process."""
        where, _, split = source.rpartition("/")
        note = f"{where}/.{split}-{number:05d}.json"
        done = self.sending.noted(note)
        if done is None:
            with tempfile.TemporaryDirectory(prefix=PART, dir=self.folder) as work:
                result, names = make(Path(work)), []
                for path, name in list(self._numbered(Path(work), source)):
                    named = Path(work) / name
                    named.parent.mkdir(parents=True, exist_ok=True)
                    self.sending.send(path.rename(named), name)
                    names.append(name)
            done = {"result": result, "shards": self.shards[source]}
            self.sending.note(note, done, names)
        self.shards[source] = done["shards"]
        return dict(done["result"])

    def start_again(self) -> None:
        """Forget all that is finished."""
        self.sending.start_again()
        self.shards.clear()


def finish(folder: Path, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """What `make(out)` returns, its files in `folder`; or both as they were left there, where they are whole.

    A slice is made in a folder of its own and renamed at the end, so that of two processes one after the other or at
    one time, each finds it whole or not at all. A file that is not what its record says is made again.
    """
    found = _read(folder)
    if found is not None:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    part.mkdir(parents=True)
    try:
        result = make(part)
        files = {path.name: _hash(path) for path in sorted(part.iterdir())}
        (part / RECORD).write_text(json.dumps({"files": files, "result": result}))
        with suppress(OSError):  # another process was first, with the same bytes
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    found = _read(folder)
    if found is None:
        raise OSError(f"{folder} was written, but cannot be read back: check this machine's memory and disk")
    return found


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
