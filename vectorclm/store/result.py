"""What a stage is asked to make, and the finished result in a store with its files, read and verified."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from vectorclm.errors import CorruptArtifactError
from vectorclm.settings import digest
from vectorclm.store.durable import temporary_beside
from vectorclm.store.hash_memory import HashMemory
from vectorclm.store.manifest import MANIFEST, place_of
from vectorclm.store.storage import TRIES, Storage, StoredFile


@dataclass(frozen=True)
class StageSpec:
    """What one stage is asked to make: its settings and the fingerprints of its inputs, before anything runs."""

    stage: str
    version: int  # of the stage's output format and meaning; raise it when code changes what equal settings give
    config: Mapping[str, Any]
    inputs: Mapping[str, str]  # stage name -> fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of stage, version, settings and inputs: the address of the result."""
        return digest(
            {"stage": self.stage, "version": self.version, "config": self.config, "inputs": dict(self.inputs)}
        )

    @property
    def lease(self) -> str:
        """The key that whoever makes this holds."""
        return f"{self.stage}-{self.fingerprint[:16]}"


class ArtifactStorage(Storage, ABC):
    """What an artifact asks of its store: itself and its neighbours by fingerprint, and its files on this machine."""

    @abstractmethod
    def find(self, stage: str, fingerprint: str) -> "Artifact | None":
        """The finished artifact at this address, or None.

        Raises CorruptArtifactError for a broken manifest, and where a file is missing, of another size than the
        manifest says, or known to have another hash. No file is read.
        """

    @abstractmethod
    def look_up(self, stage: str, fingerprint: str) -> "Artifact | None":
        """What a manifest says of the artifact at this address, whatever its files are; None where there is none.

        Raises CorruptArtifactError for a broken manifest.
        """

    @abstractmethod
    def finished(self, stage: str) -> Iterator["Artifact"]:
        """All finished artifacts of a stage, by fingerprint, as their manifests say; their files are not looked at."""

    @abstractmethod
    def download(self, artifact: "Artifact", only: str = "*", *, remembered: bool = False) -> Path:
        """See `Artifact.local`."""

    @abstractmethod
    def fetch(self, artifact: "Artifact", name: str, target: Path) -> None:
        """Copy one of its files from the store to `target`. Raises CorruptArtifactError where it is another one."""


@dataclass(frozen=True)
class Artifact:
    """A finished result in a store."""

    store: "ArtifactStorage"
    stage: str
    fingerprint: str
    manifest: Mapping[str, Any]

    @property
    def uri(self) -> str:
        """Where it is, as a path or URI."""
        return self.store.uri_of(f"{self.stage}/{self.fingerprint}")

    def key(self, name: str) -> str:
        """Where one of its files lies in the store."""
        return f"{self.stage}/{self.fingerprint}/{place_of(self.manifest['files'][name], name)}"

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of what its files hold: the same wherever and whenever they were made."""
        return digest({name: file["sha256"] for name, file in self.manifest["files"].items()})

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage said about its result: counts, losses, scores."""
        return dict(self.manifest["summary"])

    def local(self, only: str = "*", *, remembered: bool = False) -> Path:
        """A local directory with this artifact's files, verified; a remote store's are copied to the cache first.

        `only` is a pattern, as of a shell, for the names of those files that are needed. With `remembered`, a file is
        not read again while it is as it was when it was hashed last. Raises CorruptArtifactError where one of them
        differs from the manifest.
        """
        return self.store.download(self, only, remembered=remembered)

    @contextmanager
    def borrowed(self, name: str, folder: Path) -> Iterator[Path]:
        """One of its files, verified, for reading while the block runs: in place, or as a copy in `folder`.

        Raises CorruptArtifactError where it differs from the manifest.
        """
        if self.store.is_local:
            yield self.local(name) / name
            return
        copy = temporary_beside(folder / name.rpartition("/")[2])
        try:
            self.store.fetch(self, name, copy)
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        """One of its files, verified, in memory alone.

        Raises CorruptArtifactError where it differs from the manifest.
        """
        for _ in range(TRIES):
            if (data := self.store.read(self.key(name))) is None:
                raise corrupt(self, name)
            if (found := hashlib.sha256(data).hexdigest()) == self.manifest["files"][name]["sha256"]:
                return data
        raise corrupt(self, name, found)

    def verify(self, only: str = "*", *, remembered: bool = False) -> None:
        """Compare files in the store with the manifest. Raises CorruptArtifactError naming the first that differs.

        A file that the manifest does not list is one, too, as readers of a local store read in place.
        """
        for difference in self.differences(only, remembered=remembered):
            raise CorruptArtifactError(difference)

    def differences(self, only: str = "*", *, remembered: bool = False) -> Iterator[str]:
        """What differs between the files in the store and the manifest, and what to do, a line each.

        With `remembered`, a local file is not read again while it is as it was when it was hashed last.
        """
        known, memory = self.manifest["files"], HashMemory(self.uri)
        for name, want in known.items():
            if not fnmatchcase(name, only):
                continue
            path, found = self.store.path(self.key(name)), self._sha256(name, memory if remembered else None)
            if found not in (None, want["sha256"]):  # read once more, as the bit may have turned on its way
                found = self._sha256(name, None)
            if found is None:
                yield f"{path} is missing: {mend(self)}"
            elif found != want["sha256"]:
                self.note_damage(name, found)
                yield f"{path}: SHA-256 is {found[:12]}…, the manifest says {want['sha256'][:12]}…: {mend(self)}"
        memory.save()
        for name in (key.removeprefix(f"{self._key}/") for key in self.store.files(self._key)):
            hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)  # as a writer's own files are
            if not hidden and name != MANIFEST and name not in known and fnmatchcase(name, only):
                yield f"{self.uri}/{name} is not in the artifact's manifest: move it elsewhere"

    def damage(self, there: Mapping[str, StoredFile] | None = None) -> str | None:
        """The first file that is missing, of another size, or was found to have another hash; None where none is.

        `there` are the files that lie there, by place; without it they are listed. No file is read.
        """
        memory = HashMemory(self.uri)
        if there is None:
            listed = self.store.files(self._key)
            there = {key.removeprefix(f"{self._key}/"): file for key, file in listed.items()}
        for name, want in self.manifest["files"].items():
            if (file := there.get(place_of(want, name))) is None:
                return f"{self.uri}/{name} is missing"
            if file.bytes != want["bytes"]:
                return f"{self.uri}/{name} has {file.bytes:,} bytes, the manifest says {want['bytes']:,}"
            if (found := memory.known(name, file.state)) not in (None, want["sha256"]):
                return f"{self.uri}/{name}: SHA-256 is {found[:12]}…, the manifest says {want['sha256'][:12]}…"
        return None

    def note_damage(self, name: str, found: str) -> None:
        """Remember that this file, as it is now, has a wrong hash, so that the artifact is not reused."""
        memory = HashMemory(self.uri)
        for file in self.store.files(self.key(name)).values():
            memory.remember(name, file.state, found)
        memory.save()

    @property
    def _key(self) -> str:
        return f"{self.stage}/{self.fingerprint}"

    def _sha256(self, name: str, memory: HashMemory | None) -> str | None:
        """The hash of a file, of a local store by `memory` where it knows it; None where there is no such file."""
        if memory is None or not self.store.is_local:
            return self.store.sha256(self.key(name))
        with suppress(FileNotFoundError):
            return memory.hash_file(name, Path(self.store.path(self.key(name))))
        return None


def mend(artifact: Artifact) -> str:
    """What to do about files that are not what the manifest promises."""
    place = f"{artifact.stage}/{artifact.fingerprint} --store {artifact.store.uri}"
    return f"`vectorclm store verify --discard {place}` gives it up, then run its stage again"


def corrupt(artifact: Artifact, name: str, found: str | None = None) -> CorruptArtifactError:
    """That one of its files has this hash, which is another one, or is not there."""
    if found is not None:
        artifact.note_damage(name, found)
    what = " is missing" if found is None else f": SHA-256 is {found[:12]}…"
    return CorruptArtifactError(f"{artifact.uri}/{name}{what}: {mend(artifact)}")
