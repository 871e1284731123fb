"""Early uploads: files of an artifact go to a remote store during its build, with notes that let a rerun resume."""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from vectorclm.formats.json_files import parse_json
from vectorclm.formats.limits import MANIFEST_VALUES
from vectorclm.settings import digest
from vectorclm.store.artifact import Artifact, StageSpec, Store
from vectorclm.store.durable import OWN
from vectorclm.store.manifest import SEAL, file_entry, place_of, sealed
from vectorclm.store.storage import ATTEMPT, StoredFile, explained

NOTE = f"{OWN}note-"


class Describer(Protocol):
    """A `Describe` with state over the files, which can also skip files that an earlier process described."""

    def __call__(self, path: Path) -> Mapping[str, Any]:
        """The fields that a file's manifest entry gets besides size and SHA-256."""

    def pass_over(self, name: str, entry: Mapping[str, Any]) -> None:
        """Continue after a file that has this manifest entry already."""


class EarlyUpload:
    """Upload of an artifact's files to a remote store one by one, so that no disk must hold all of them.

    No reader takes the files for the artifact before the manifest exists. Notes beside the files record the progress.
    A note is never changed: each has a name of its own, and of several notes about the same work any valid one counts.
    """

    def __init__(self, store: Store, spec: StageSpec, describer: Callable[[], Describer]) -> None:
        self.store = store
        self.key, self.lease = f"{spec.stage}/{spec.fingerprint}", spec.lease
        self.describer = describer
        self.describe = describer()
        self.files: dict[str, Mapping[str, Any]] = {}  # the manifest's entries by file name
        self.abandoned: set[str] = set()  # keys of files that do not count as sent any more
        self.round = "first"  # of the work; each round has notes of its own

    @cached_property
    def there(self) -> Mapping[str, StoredFile]:
        """The files that earlier processes left at the artifact's address."""
        return self.store.files(self.key)

    def send(self, path: Path, name: str) -> None:
        """Move a finished file to the store. Raises InUseError where another process took the stage over."""
        self.store.check_lease(self.lease)
        entry = file_entry(path, self.describe)
        with explained(self.store.uri_of(f"{self.key}/{name}")):
            entry |= self.store.send(path, self.key, name, entry["sha256"])
        path.unlink(missing_ok=True)
        self.files[name] = entry

    def note(self, work: str, done: Mapping[str, Any], files: Sequence[str]) -> None:
        """Write a note that a piece of `work` is `done`, and which files were sent for it."""
        self.store.check_lease(self.lease)
        noted = {"done": done, "files": {file: self.files[file] for file in files}}
        self.store.write(f"{self._notes(work)}-{secrets.token_hex(8)}.json", sealed(noted), only_if_absent=True)

    def noted(self, work: str) -> dict[str, Any] | None:
        """Read what is done of a piece of work, and count its files as sent; None without a valid note."""
        for key in self.there:
            if key.startswith(f"{self._notes(work)}-") and (found := self._read(key)) is not None:
                for file, entry in found["files"].items():
                    self.describe.pass_over(file, entry)
                self.files |= found["files"]
                return dict(found["done"])
        return None

    def _read(self, key: str) -> dict[str, Any] | None:
        """A note that is intact and whose files are all in the store; None otherwise."""
        try:
            found: dict[str, Any] = parse_json(self.store.read(key) or b"", MANIFEST_VALUES)
            seal = found.pop(SEAL)
        except (ValueError, AttributeError, KeyError):
            return None
        if seal != digest(found):
            return None
        for file, entry in found["files"].items():
            stored = self.there.get(f"{self.key}/{place_of(entry, file)}")
            if stored is None or stored.bytes != entry["bytes"]:
                return None
        return found

    def _notes(self, work: str) -> str:
        """The common prefix of the keys of all notes about a piece of work."""
        where, _, name = work.rpartition("/")
        return f"{self.key}/{where}/{NOTE}{self.round}-{name}"

    def start_again(self) -> None:
        """Count no file as sent, and ignore all notes that were written until now."""
        self.abandoned |= {f"{self.key}/{place_of(entry, name)}" for name, entry in self.files.items()}
        self.files, self.describe, self.round = {}, self.describer(), "second"

    def clear_markers(self, artifact: Artifact) -> None:
        """Remove the notes of a finished artifact, and the files of attempts that its manifest does not name."""
        if artifact.store.is_local:
            return
        used = {artifact.key(name) for name in artifact.manifest["files"]}
        for key in {*superseded(artifact, self.store.files(self.key)), *(self.abandoned - used)}:
            self.store.delete(key)


def superseded(artifact: Artifact, there: Iterable[str]) -> Iterator[str]:
    """The keys at a finished artifact's address of notes and attempts' files that its manifest does not name."""
    names = artifact.manifest["files"]
    used = {artifact.key(name) for name in names}
    for key in there:
        name = key.split("/", 2)[2]
        if key not in used and (name in names or name.startswith(ATTEMPT) or name.rpartition("/")[2].startswith(NOTE)):
            yield key
