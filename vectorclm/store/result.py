"""StageSpec (what a stage shall build) and Artifact (the finished result: its files, read and verified)."""

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
from vectorclm.store.durable import temporary_file
from vectorclm.store.hash_memory import HashMemory
from vectorclm.store.manifest import MANIFEST, place_of
from vectorclm.store.storage import TRIES, Storage, StoredFile


@dataclass(frozen=True)
class StageSpec:
    """The specification of one stage, known before anything runs: its settings and its inputs' fingerprints."""

    stage: str
    version: int  # of the stage's output; raise it when new code builds something else from equal settings
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
        """The key of the lease that a builder of this artifact holds."""
        return f"{self.stage}-{self.fingerprint[:16]}"


class ArtifactStorage(Storage, ABC):
    """The part of a store that an artifact uses: artifacts by fingerprint, and files on this machine."""

    @abstractmethod
    def find(self, stage: str, fingerprint: str) -> "Artifact | None":
        """The finished artifact at this address, or None.

        Raises CorruptArtifactError for a broken manifest, and where a file is missing, of another size than the
        manifest says, or known to have another hash. No file is read.
        """

    @abstractmethod
    def look_up(self, stage: str, fingerprint: str) -> "Artifact | None":
        """The artifact at this address as its manifest describes it, without a look at its files; None if absent.

        Raises CorruptArtifactError for a broken manifest.
        """

    @abstractmethod
    def finished(self, stage: str) -> Iterator["Artifact"]:
        """All finished artifacts of a stage, ordered by fingerprint, as their manifests describe them."""

    @abstractmethod
    def download(self, artifact: "Artifact", only: str = "*", *, remembered: bool = False) -> Path:
        """See `Artifact.local`."""

    @abstractmethod
    def fetch(self, artifact: "Artifact", name: str, target: Path) -> None:
        """Copy a file of the artifact to `target`. Raises CorruptArtifactError where it is missing or differs."""


@dataclass(frozen=True)
class Artifact:
    """A finished artifact in a store."""

    store: "ArtifactStorage"
    stage: str
    fingerprint: str
    manifest: Mapping[str, Any]

    @property
    def uri(self) -> str:
        """The path or URI of the artifact."""
        return self.store.uri_of(f"{self.stage}/{self.fingerprint}")

    def key(self, name: str) -> str:
        """The key of a file of the artifact in the store."""
        return f"{self.stage}/{self.fingerprint}/{place_of(self.manifest['files'][name], name)}"

    @property
    def identity(self) -> str:
        """SHA-256 (hex) over the content of all files, independent of where and when they were built."""
        return digest({name: file["sha256"] for name, file in self.manifest["files"].items()})

    @property
    def summary(self) -> dict[str, Any]:
        """The stage's summary of its result: counts, losses, scores."""
        return dict(self.manifest["summary"])

    def local(self, only: str = "*", *, remembered: bool = False) -> Path:
        """A local directory with this artifact's verified files; files of a remote store are cached locally first.

        `only` is a shell pattern for the names of the needed files. With `remembered`, a file that has not changed
        since it was hashed last is not read again. Raises CorruptArtifactError where a file differs from the manifest.
        """
        return self.store.download(self, only, remembered=remembered)

    @contextmanager
    def borrowed(self, name: str, folder: Path) -> Iterator[Path]:
        """One verified file, for reading while the block runs: in place, or as a copy in `folder`.

        Raises CorruptArtifactError where the file differs from the manifest.
        """
        if self.store.is_local:
            yield self.local(name) / name
            return
        with temporary_file(folder / name.rpartition("/")[2]) as copy:
            self.store.fetch(self, name, copy)
            yield copy

    def read(self, name: str) -> bytes:
        """The verified bytes of one file, without a local copy.

        Raises CorruptArtifactError where the file differs from the manifest.
        """
        for _ in range(TRIES):
            if (data := self.store.read(self.key(name))) is None:
                raise corrupt(self, name)
            if (found := hashlib.sha256(data).hexdigest()) == self.manifest["files"][name]["sha256"]:
                return data
        raise corrupt(self, name, found)

    def verify(self, only: str = "*", *, remembered: bool = False) -> None:
        """Compare the files in the store with the manifest. Raises CorruptArtifactError for the first difference.

        A file that the manifest does not list is a difference, because readers of a local store read in place.
        """
        for difference in self.differences(only, remembered=remembered):
            raise CorruptArtifactError(difference)

    def differences(self, only: str = "*", *, remembered: bool = False) -> Iterator[str]:
        """The differences between the files in the store and the manifest, one line each, with what to do.

        With `remembered`, a local file that has not changed since it was hashed last is not read again.
        """
        known, memory = self.manifest["files"], HashMemory(self.uri)
        for name, want in known.items():
            if not fnmatchcase(name, only):
                continue
            path, found = self.store.path(self.key(name)), self._sha256(name, memory if remembered else None)
            if found not in (None, want["sha256"]):  # read once more: the bit may have flipped in transfer
                found = self._sha256(name, None)
            if found is None:
                yield f"{path} is missing: {repair_advice(self)}"
            elif found != want["sha256"]:
                self.note_damage(name, found)
                differs = f"SHA-256 is {found[:12]}…, the manifest says {want['sha256'][:12]}…"
                yield f"{path}: {differs}: {repair_advice(self)}"
        memory.save()
        for name in (key.removeprefix(f"{self._key}/") for key in self.store.files(self._key)):
            hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)  # a writer's temporary files
            if not hidden and name != MANIFEST and name not in known and fnmatchcase(name, only):
                yield f"{self.uri}/{name} is not in the artifact's manifest: move it elsewhere"

    def damage(self, there: Mapping[str, StoredFile] | None = None) -> str | None:
        """The first file that is missing, of another size, or known to have another hash; None where there is none.

        `there` maps places to the stored files; without `there`, the store is listed. No file is read.
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
        """Remember that this file, in its present state, has a wrong hash, so that the artifact is not reused."""
        memory = HashMemory(self.uri)
        for file in self.store.files(self.key(name)).values():
            memory.remember(name, file.state, found)
        memory.save()

    @property
    def _key(self) -> str:
        return f"{self.stage}/{self.fingerprint}"

    def _sha256(self, name: str, memory: HashMemory | None) -> str | None:
        """The hash of a file; `memory` may know that of a local file. None where there is no such file."""
        if memory is None or not self.store.is_local:
            return self.store.sha256(self.key(name))
        with suppress(FileNotFoundError):
            return memory.hash_file(name, Path(self.store.path(self.key(name))))
        return None


def repair_advice(artifact: Artifact) -> str:
    """The advice for files that differ from the manifest: discard the artifact, then run its stage again."""
    place = f"{artifact.stage}/{artifact.fingerprint} --store {artifact.store.uri}"
    return f"run `vectorclm store verify --discard {place}`, then run its stage again"


def corrupt(artifact: Artifact, name: str, found: str | None = None) -> CorruptArtifactError:
    """The error for a file that has the wrong hash `found`, or is missing."""
    if found is not None:
        artifact.note_damage(name, found)
    what = " is missing" if found is None else f": SHA-256 is {found[:12]}…"
    return CorruptArtifactError(f"{artifact.uri}/{name}{what}: {repair_advice(artifact)}")
