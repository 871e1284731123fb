"""Files of an artifact that leave for a remote store while it is made, and notes of how far that is."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vectorclm.artifact import SEAL, Plan, Store, said_of, sealed
from vectorclm.settings import digest
from vectorclm.storage import explained


class Describer(Protocol):
    """A `Describe` that is also told of files which it does not see, as they were described before."""

    def __call__(self, path: Path) -> Mapping[str, Any]:
        """What there is to say of a file."""

    def pass_over(self, name: str, said: Mapping[str, Any]) -> None:
        """Go on after a file of which this was said."""


class Sending:
    """Files of an artifact that go to a remote store one by one as they are finished, so that no disk must hold all.

    Nobody takes them for the artifact before its manifest is there. What is noted beside them is how far the work is.
    """

    def __init__(self, store: Store, plan: Plan, describer: Callable[[], Describer]) -> None:
        self.store = store
        self.key, self.lease = f"{plan.stage}/{plan.fingerprint}", plan.lease
        self.describer = describer
        self.describe = describer()
        self.files: dict[str, Mapping[str, Any]] = {}  # as the manifest has them
        self.notes: list[str] = []

    def send(self, path: Path, name: str) -> None:
        """Move a finished file to the store. Raises InUseError where another process took the stage over."""
        self.store.check_lease(self.lease)
        said = said_of(path, self.describe)
        with explained(self.store.uri_of(f"{self.key}/{name}")):
            self.store.put(path, f"{self.key}/{name}", said["sha256"])
        path.unlink(missing_ok=True)
        self.files[name] = said

    def note(self, name: str, done: Mapping[str, Any], files: Sequence[str]) -> None:
        """Note that these files were sent, and what is `done` with them."""
        self.notes.append(name)
        noted = {"done": done, "files": {file: self.files[file] for file in files}}
        self.store.write(f"{self.key}/{name}", sealed(noted))

    def noted(self, name: str) -> dict[str, Any] | None:
        """What is done by that note, whose files are counted as sent; None where there is none, or it does not hold."""
        try:
            found = json.loads(self.store.read(f"{self.key}/{name}") or b"")
            seal = found.pop(SEAL)
        except (ValueError, AttributeError, KeyError):
            return None
        if seal != digest(found):
            return None
        there = self.store.files(f"{self.key}/{name}".rpartition("/")[0])
        for file, said in found["files"].items():
            if (stored := there.get(f"{self.key}/{file}")) is None or stored.bytes != said["bytes"]:
                return None
        for file, said in found["files"].items():
            self.describe.pass_over(file, said)
        self.files |= found["files"]
        self.notes.append(name)
        return dict(found["done"])

    def start_again(self) -> None:
        """Remove what was sent and noted."""
        self.store.remove(self.key)
        self.files, self.notes, self.describe = {}, [], self.describer()

    def forget_notes(self) -> None:
        """Remove the notes, as with the manifest all is said."""
        for name in self.notes:
            self.store.delete(f"{self.key}/{name}")
