"""Resumable work in slices: a slice that one process finished is never computed again by a later process."""

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

from vectorclm.formats.json_files import parse_json
from vectorclm.runtime.workers import IN_THIS_PROCESS, Workers
from vectorclm.store.durable import TEMPORARY, sync_folder, sync_tree, temporary_beside
from vectorclm.store.uploads import EarlyUpload

RECORD = "slice.json"


class Slices:
    """Slices of the work on some sources, in order; each slice writes `shard-00000.*` and so on of its source.

    Finished slices lie in folders below `folder`, where a later process finds them. Their files get second names in
    `out`, where the shards of a source are numbered consecutively: `a/train-00000.*`.
    """

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder = folder
        self.out = out
        self.shards: Counter[str] = Counter()  # number of shards so far, by source
        self.placed: list[Path] = []
        self.workers: Workers = IN_THIS_PROCESS  # who builds slices
        self.used = set(_slices(folder))  # slices of earlier processes, and those finished here

    def finish(self, source: str, number: int, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """What `make` returned of the source's next slice, now or in an earlier process."""
        folder, result = finish(self.folder / f"{source}-{number:05d}", make, self.out.parent)
        self.used.add(folder)
        for path, name in self._numbered(folder, source):
            place(path, self.out / name)
            self.placed.append(self.out / name)
        return result

    def has(self, source: str, number: int) -> bool:
        """Whether an earlier process has finished a slice; the slice may be damaged, which `finish` finds."""
        folder = self.folder / f"{source}-{number:05d}"
        return any(folder.parent.glob(f"{folder.name}.*"))

    def start_again(self) -> None:
        """Count no slice as finished, and ignore all slices that were finished until now."""
        self.folder = self.folder.with_name(f"{self.folder.name}-second")
        self.used |= set(_slices(self.folder))
        for path in self.placed:
            path.unlink()
        self.shards.clear()
        self.placed.clear()

    def clear(self) -> None:
        """Remove the slices that the artifact now contains, and the leftovers of earlier processes."""
        for folder in self.used:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in sorted({up for folder in self.used for up in folder.parents[:3]}, reverse=True):
            with suppress(OSError):  # another process has files there
                parent.rmdir()

    def _numbered(self, folder: Path, source: str) -> Iterator[tuple[Path, str]]:
        """The files of a slice, and their names in the numbering of the whole source."""
        shards = sorted({path.name.partition(".")[0] for path in folder.glob("shard-*")})
        for path in sorted(folder.glob("shard-*")):
            shard, _, suffix = path.name.partition(".")
            yield path, f"{source}-{self.shards[source] + shards.index(shard):05d}.{suffix}"
        self.shards[source] += len(shards)


class ResumableUpload(Slices):
    """Slices whose files go to a remote store, with a note for each slice; `folder` holds one slice at a time.

    A later process can therefore resume on any machine.
    """

    def __init__(self, folder: Path, upload: EarlyUpload) -> None:
        super().__init__(folder, folder)
        self.upload = upload

    def finish(self, source: str, number: int, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """What `make` returned of the source's next slice, now or in an earlier process."""
        work = f"{source}-{number:05d}"
        done = self.upload.noted(work)
        if done is None:
            with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=self.folder) as part:
                result, names = make(Path(part)), []
                for path, name in list(self._numbered(Path(part), source)):
                    named = Path(part) / name
                    named.parent.mkdir(parents=True, exist_ok=True)
                    self.upload.send(path.rename(named), name)
                    names.append(name)
            done = {"result": result, "shards": self.shards[source]}
            self.upload.note(work, done, names)
        self.shards[source] = done["shards"]
        return dict(done["result"])

    def has(self, source: str, number: int) -> bool:
        """Whether an earlier process has finished a slice."""
        return self.upload.noted(f"{source}-{number:05d}") is not None

    def start_again(self) -> None:
        """Count no slice as finished."""
        self.upload.start_again()
        self.shards.clear()


def finish(folder: Path, make: Callable[[Path], Mapping[str, Any]], work: Path) -> tuple[Path, dict[str, Any]]:
    """Compute a slice, or reuse an intact one of an earlier process; return its folder and the result of `make(out)`.

    A slice is built in a folder of its own in `work`, and renamed at the end to `folder` with a random suffix. A
    process therefore finds a slice complete or not at all, and replaces no other slice. A slice that differs from its
    record is built again beside the damaged one.
    """
    for found in sorted(folder.parent.glob(f"{folder.name}.*")):
        if (result := _read(found)) is not None:
            return found, result
    own = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}")
    part = temporary_beside(work / folder.name)
    part.mkdir(parents=True)
    own.parent.mkdir(parents=True, exist_ok=True)
    try:
        produced = make(part)
        files = {path.name: _hash(path) for path in sorted(part.iterdir())}
        (part / RECORD).write_text(json.dumps({"files": files, "result": produced}))
        sync_tree(part)  # a finished slice survives a power loss
        part.rename(own)
        sync_folder(own.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if (read := _read(own)) is None:
        raise OSError(f"{own} was written, but cannot be read back: check this machine's memory and disk")
    return own, read


def _slices(folder: Path) -> list[Path]:
    """All slices below a folder, intact or damaged."""
    return [path for path in folder.glob("*/*") if not path.name.startswith(".")]


def place(source: Path, target: Path) -> None:
    """Link `target` to the file `source` where the file system can, else copy it; `source` stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        record = parse_json((folder / RECORD).read_bytes())
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
