"""Files of an artifact that leave for a remote store while it is made, and notes of how far that is."""

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from vectorclm.settings import digest
from vectorclm.store.artifact import Artifact, StageSpec, Store
from vectorclm.store.durable import OWN
from vectorclm.store.manifest import SEAL, file_entry, place_of, sealed
from vectorclm.store.storage import ATTEMPT, StoredFile, explained

NOTE = f"{OWN}note-"


class Describer(Protocol):
    """A `Describe` that is also told of files which it does not see, as they were described before."""

    def __call__(self, path: Path) -> Mapping[str, Any]:
        """What there is to say of a file."""

    def pass_over(self, name: str, said: Mapping[str, Any]) -> None:
        """Go on after a file of which this was said."""


class Sending:
    """Files of an artifact that go to a remote store one by one as they are finished, so that no disk must hold all.

    Nobody takes them for the artifact before its manifest is there. What is noted beside them is how far the work is.
    A note is never changed: each has a name of its own, and of several about the same work any that holds is right.
    """

    def __init__(self, store: Store, plan: StageSpec, describer: Callable[[], Describer]) -> None:
        self.store = store
        self.key, self.lease = f"{plan.stage}/{plan.fingerprint}", plan.lease
        self.describer = describer
        self.describe = describer()
        self.files: dict[str, Mapping[str, Any]] = {}  # as the manifest has them
        self.abandoned: set[str] = set()  # keys of what is not counted as sent any more
        self.round = "first"  # of the work, whose notes are no other's

    @cached_property
    def there(self) -> Mapping[str, StoredFile]:
        """What earlier processes left at the artifact's address."""
        return self.store.files(self.key)

    def send(self, path: Path, name: str) -> None:
        """Move a finished file to the store. Raises InUseError where another process took the stage over."""
        self.store.check_lease(self.lease)
        said = file_entry(path, self.describe)
        with explained(self.store.uri_of(f"{self.key}/{name}")):
            said |= self.store.send(path, self.key, name, said["sha256"])
        path.unlink(missing_ok=True)
        self.files[name] = said

    def note(self, work: str, done: Mapping[str, Any], files: Sequence[str]) -> None:
        """Note that these files were sent, and what is `done` with them, under the name of a piece of work."""
        self.store.check_lease(self.lease)
        noted = {"done": done, "files": {file: self.files[file] for file in files}}
        self.store.write(f"{self._notes(work)}-{secrets.token_hex(8)}.json", sealed(noted), only_if_absent=True)

    def noted(self, work: str) -> dict[str, Any] | None:
        """What is done of that work, whose files are counted as sent; None where no note says so and holds."""
        for key in self.there:
            if key.startswith(f"{self._notes(work)}-") and (found := self._read(key)) is not None:
                for file, said in found["files"].items():
                    self.describe.pass_over(file, said)
                self.files |= found["files"]
                return dict(found["done"])
        return None

    def _read(self, key: str) -> dict[str, Any] | None:
        """A note, where it is whole, and all its files are there."""
        try:
            found: dict[str, Any] = json.loads(self.store.read(key) or b"")
            seal = found.pop(SEAL)
        except (ValueError, AttributeError, KeyError):
            return None
        if seal != digest(found):
            return None
        for file, said in found["files"].items():
            stored = self.there.get(f"{self.key}/{place_of(said, file)}")
            if stored is None or stored.bytes != said["bytes"]:
                return None
        return found

    def _notes(self, work: str) -> str:
        """What the keys of all notes of that work begin with."""
        where, _, name = work.rpartition("/")
        return f"{self.key}/{where}/{NOTE}{self.round}-{name}"

    def start_again(self) -> None:
        """Count nothing as sent, and look at no note that was written until now."""
        self.abandoned |= {f"{self.key}/{place_of(said, name)}" for name, said in self.files.items()}
        self.files, self.describe, self.round = {}, self.describer(), "second"

    def clear_markers(self, artifact: Artifact) -> None:
        """Remove the notes, as with the manifest all is said, and the files of attempts that it does not name."""
        if artifact.store.is_local:
            return
        used = {artifact.key(name) for name in artifact.manifest["files"]}
        for key in {*superseded(artifact, self.store.files(self.key)), *(self.abandoned - used)}:
            self.store.delete(key)


def superseded(artifact: Artifact, there: Iterable[str]) -> Iterator[str]:
    """Of the keys at a finished artifact's address, notes and attempts' files that its manifest does not name."""
    names = artifact.manifest["files"]
    used = {artifact.key(name) for name in names}
    for key in there:
        name = key.split("/", 2)[2]
        if key not in used and (name in names or name.startswith(ATTEMPT) or name.rpartition("/")[2].startswith(NOTE)):
            yield key
