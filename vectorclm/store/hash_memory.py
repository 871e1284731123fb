"""A cache of SHA-256 hashes in the user's cache folder: a file is hashed again only after a change.

The cache is optional: where the cache folder cannot be read or written, files are hashed again.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vectorclm.store.durable import temporary_file

UNSETTLED_SECONDS = 2.0  # a younger file may change again within the same time stamp
ENTRIES = 4096  # folders that are remembered; the oldest are removed
State = Sequence[int | float | str]  # changes whenever the file changes: size, times, inode, device, or an ETag


def cache_folder() -> Path:
    """The cache folder of this machine, for copies of remote artifacts and hashes."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vectorclm"


def state_of(stat: os.stat_result) -> State:
    """The state of a local file, which changes whenever the file changes."""
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)


class HashMemory:
    """The remembered hashes of the files of one folder or address, by file name."""

    def __init__(self, uri: str) -> None:
        self.path = cache_folder() / "sha256" / f"{hashlib.sha256(uri.encode()).hexdigest()}.json"
        self._entries: dict[str, list[object]] = {}
        self._changed = False
        with suppress(OSError, ValueError, AttributeError):
            kept = json.loads(self.path.read_text(encoding="utf-8")).items()
            self._entries = {name: entry for name, entry in kept if isinstance(entry, list) and entry}

    def known(self, name: str, state: State) -> str | None:
        """The hash of a file that had this state when it was read, or None."""
        sha256, *seen = self._entries.get(name) or [None]
        return str(sha256) if seen == list(state) else None

    def remember(self, name: str, state: State, sha256: str) -> None:
        """Remember a file's hash in this process; `save` makes it permanent."""
        self._entries[name] = [sha256, *state]
        self._changed = True

    def hash_file(self, name: str, path: Path) -> str:
        """The SHA-256 of a local file, remembered or read now. Raises FileNotFoundError."""
        if (found := self.known(name, before := state_of(path.stat()))) is not None:
            return found
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            with suppress(OSError):  # the hash must be that of the bytes on the disk; not every file system can sync
                os.fsync(file.fileno())
            stat = os.fstat(file.fileno())
        settled = time.time() - max(stat.st_mtime, stat.st_ctime) > UNSETTLED_SECONDS
        if settled and state_of(stat) == before:
            self.remember(name, before, found)
        return found

    def save(self) -> None:
        """Write new hashes to the cache folder, where that is possible."""
        if not self._changed:
            return
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with temporary_file(self.path) as part:
                part.write_text(json.dumps(self._entries), encoding="utf-8")
                part.replace(self.path)
            self._changed = False
            kept = sorted(self.path.parent.iterdir(), key=lambda path: path.stat().st_mtime)
            for old in kept[: max(0, len(kept) - ENTRIES)]:
                old.unlink()
