"""The artifact store: immutable directories at `{store}/{stage}/{fingerprint}/`, their build and publication.

An artifact is complete exactly when its `manifest.json` exists: the files are written first, the manifest last and only
if absent. A rerun therefore skips finished stages, and a killed writer leaves nothing that looks like a result.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from vectorclm.errors import CorruptArtifactError, StoreError
from vectorclm.runtime.devices import environment
from vectorclm.settings import digest
from vectorclm.store.durable import temporary_file
from vectorclm.store.hash_memory import HashMemory, cache_folder
from vectorclm.store.lease import Lease, check_held, is_alive
from vectorclm.store.manifest import MANIFEST as MANIFEST
from vectorclm.store.manifest import Describe, file_entry, read_manifest, sealed
from vectorclm.store.publication import commit, publish_locally
from vectorclm.store.result import Artifact as Artifact
from vectorclm.store.result import ArtifactStorage, corrupt
from vectorclm.store.result import StageSpec as StageSpec
from vectorclm.store.result import repair_advice as repair_advice
from vectorclm.store.storage import TRIES, explained, sha256_of
from vectorclm.store.work import attempt_folder

logger = logging.getLogger(__name__)


def default_store() -> str:
    """The address of the default store: VECTORCLM_STORE, or `./store`."""
    return os.environ.get("VECTORCLM_STORE") or "./store"


class Store(ArtifactStorage):
    """A store of artifacts: a local folder, or an object store that fsspec opens, such as `s3://bucket/prefix`."""

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The finished artifact at this address, or None.

        Raises CorruptArtifactError for a broken manifest, and where a file is missing, of another size than the
        manifest says, or known to have another hash. No file is read.
        """
        found = self.look_up(stage, fingerprint)
        if found is not None and (damage := found.damage()) is not None:
            raise CorruptArtifactError(f"{damage}: run its stage again")
        return found

    def look_up(self, stage: str, fingerprint: str) -> Artifact | None:
        """The artifact at this address as its manifest describes it, without a look at its files; None if absent.

        Raises CorruptArtifactError for a broken manifest.
        """
        key = f"{stage}/{fingerprint}"
        tries = 0
        while (data := self.read(f"{key}/{MANIFEST}")) is not None:
            if self.is_s3 and not data:  # withdrawn, see `withdraw`
                return None
            try:
                return Artifact(self, stage, fingerprint, read_manifest(data, self.uri_of(key)))
            except CorruptArtifactError:  # damaged in transfer, or in the store
                if (tries := tries + 1) == TRIES:
                    raise
        return None

    def find_whole(self, spec: StageSpec) -> Artifact | None:
        """The finished artifact of a specification; None where it is absent or damaged, so that its stage builds it."""
        try:
            return self.find(spec.stage, spec.fingerprint)
        except CorruptArtifactError:
            return None

    def discard(self, stage: str, fingerprint: str, seen: Mapping[str, Any] | None = None) -> None:
        """Withdraw the manifest of a damaged artifact, so that its stage builds it again. The caller holds its lease.

        An artifact that was rebuilt meanwhile stays. With `seen`, only an artifact with exactly that manifest is
        discarded; without, only a damaged one.
        """
        key = f"{stage}/{fingerprint}/{MANIFEST}"
        data = self.read(key)
        with suppress(CorruptArtifactError):
            found = self.look_up(stage, fingerprint)
            if found is None or (found.damage() is None if seen is None else found.manifest != seen):
                return
        if data is not None:
            self.withdraw(key, data)

    def finished(self, stage: str) -> Iterator["Artifact"]:
        """All finished artifacts of a stage, ordered by fingerprint, as their manifests describe them."""
        for fingerprint in self.list(stage):
            if (found := self.look_up(stage, fingerprint)) is not None:
                yield found

    def publish(
        self,
        spec: StageSpec,
        directory: Path,
        summary: Mapping[str, Any],
        describe: Describe | None = None,
        sent: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> Artifact:
        """Move the files of `directory` to the specification's address, then write the manifest if absent.

        The manifest also lists the files that were `sent` before. Where another process published the same fingerprint
        first, the other artifact stays and is returned.
        """
        return self.publish_first(spec, directory, summary, describe, sent)[0]

    def publish_first(
        self,
        spec: StageSpec,
        directory: Path,
        summary: Mapping[str, Any],
        describe: Describe | None,
        sent: Mapping[str, Mapping[str, Any]],
    ) -> tuple[Artifact, bool]:
        """Like `publish`; also returns whether this process published the artifact."""
        if (done := self.find(spec.stage, spec.fingerprint)) is not None:
            return done, False
        head = {
            "stage": spec.stage,
            "fingerprint": spec.fingerprint,
            "format_version": spec.version,
            "config": spec.config,
            "inputs": dict(spec.inputs),
            "summary": summary,
        }
        first = self.publish_directory(f"{spec.stage}/{spec.fingerprint}", directory, head, describe, sent)
        found = self.find(spec.stage, spec.fingerprint)
        if found is None:
            raise StoreError(f"the manifest of {spec.stage}/{spec.fingerprint} was written but cannot be read back")
        return found, first

    def publish_directory(
        self,
        key: str,
        directory: Path,
        head: Mapping[str, Any],
        describe: Describe | None = None,
        sent: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> bool:
        """Publish the files of `directory` at `key` under a manifest of `head` and all files, if there is none yet.

        Returns False where another process published first; the other publication stays untouched.
        """
        files = {}
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            files[path.relative_to(directory).as_posix()] = file_entry(path, describe)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        with explained(self.uri_of(key)):
            if not self.is_local:
                for name, file in files.items():
                    file |= self.send(directory / name, key, name, str(file["sha256"]))
            every = dict(sorted({**sent, **files}.items()))
            manifest = sealed({**head, "files": every, "environment": environment(), "created": created})
            if self.is_local:
                return publish_locally(self, key, directory, list(files), manifest)
            return commit(self, f"{key}/{MANIFEST}", manifest)

    def send(self, source: Path, key: str, name: str, sha256: str) -> dict[str, str]:
        """Copy a file of the artifact at `key` to a remote store; returns the manifest's entry for its place there."""
        place = self.put(source, key, name, sha256)
        return {} if place == name else {"place": place}

    def download(self, artifact: Artifact, only: str = "*", *, remembered: bool = False) -> Path:
        """See `Artifact.local`."""
        if self.is_local:
            artifact.verify(only, remembered=remembered)
            return Path(artifact.uri)
        cache = cache_folder() / "artifacts" / artifact.stage / artifact.fingerprint
        known, memory = artifact.manifest["files"], HashMemory(str(cache))
        for name, want in known.items():
            path = cache / name
            if not fnmatchcase(name, only):
                continue
            with suppress(FileNotFoundError):
                if (memory.hash_file(name, path) if remembered else sha256_of(path)) == want["sha256"]:
                    continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary_file(path) as part:
                self.fetch(artifact, name, part)
                part.replace(path)
        memory.save()
        for path in cache.rglob("*"):  # another store may have left files here
            if path.is_file() and not path.name.startswith(".") and path.relative_to(cache).as_posix() not in known:
                path.unlink()
        return cache

    def fetch(self, artifact: Artifact, name: str, target: Path) -> None:
        """Copy a file of the artifact to `target`. Raises CorruptArtifactError where it is missing or differs."""
        want = artifact.manifest["files"][name]["sha256"]
        try:
            found = self.get(artifact.key(name), target, want)
        except FileNotFoundError as error:
            raise corrupt(artifact, name) from error
        if found != want:
            raise corrupt(artifact, name, found)

    def remove(self, key: str) -> None:
        """Remove `key` and everything below, the manifest first, so that no reader trusts the rest."""
        self.delete(f"{key}/{MANIFEST}")
        super().remove(key)

    @contextmanager
    def lease(self, key: str, inputs: Iterable[str] | None = None) -> Iterator["Lease"]:
        """Hold the lease on `key` while the block runs: this process is the only writer of `key`.

        `inputs` are the fingerprints of what it reads for that. The lease renews itself and expires when its holder
        dies. Raises InUseError while another process holds the lease, and in place of any error that follows a takeover
        by another process.
        """
        lease = Lease(self, f"leases/{key}.json", None if inputs is None else sorted(inputs))
        lease.acquire()
        try:
            yield lease
        except Exception:
            with suppress(StoreError):
                lease.check()
            raise
        finally:
            lease.release()

    def lease_holder(self, key: str) -> dict[str, Any] | None:
        """The live process that holds the lease on `key` (`host`, `pid`, …); None where there is none."""
        holder = Lease(self, f"leases/{key}.json").holder()
        return holder if holder and is_alive(holder) else None

    def check_lease(self, key: str) -> None:
        """Raise InUseError where this process held the lease on `key`, and another process has taken it over."""
        check_held(self, f"leases/{key}.json")

    def work_folder(self, spec: StageSpec, work_dir: str | None) -> Path:
        """The local folder for work in progress on a specification; each attempt has its own folder inside."""
        folder = self.work_root(work_dir) / f"{spec.stage}-{spec.fingerprint[:16]}"
        with explained(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def work_root(self, work_dir: str | None) -> Path:
        """The local folder that contains the work folders."""
        if work_dir is not None:
            return Path(work_dir)
        if self.is_local:
            return Path(self.root) / "work"
        return cache_folder() / "work" / digest(self.uri)[:12]  # one for each store, as leases are


def rebuilt_because(spec: StageSpec, error: CorruptArtifactError) -> str:
    """The warning that a damaged artifact is built again."""
    return f"{str(error).removesuffix(': run its stage again')}; {spec.stage} is built again now"


class SentFiles(Protocol):
    """Files of an artifact that were sent to the store during its build."""

    files: dict[str, Mapping[str, Any]]  # the manifest's entries by file name

    def clear_markers(self, artifact: Artifact) -> None:
        """Remove the progress markers of a finished artifact."""


def build(
    store: Store,
    spec: StageSpec,
    produce: Callable[[Path], Mapping[str, Any]],
    work_dir: str | None = None,
    describe: Describe | None = None,
    upload: "SentFiles | None" = None,
) -> tuple[Artifact, bool]:
    """Build the artifact of `spec`, or find it in the store; return it and whether it was there already.

    `produce(out)` writes the files into the empty local folder `out` and returns the summary. It runs only where the
    store has no such artifact, in one process at a time. `describe(file)` adds fields to a file's entry in the
    manifest. With `upload`, `produce` may send files to the store early.
    """
    if (found := store.find_whole(spec)) is not None:
        return found, True
    with store.lease(spec.lease, spec.inputs.values()) as lease:
        try:
            if (found := store.find(spec.stage, spec.fingerprint)) is not None:
                return found, True
        except CorruptArtifactError as error:
            logger.warning("%s", rebuilt_because(spec, error))
            lease.check()
            store.discard(spec.stage, spec.fingerprint)
        with attempt_folder(store.work_folder(spec, work_dir)) as work:
            out = work / "out"
            with explained(str(out)):
                out.mkdir()
                summary = produce(out)
                lease.check()
                sent = {} if upload is None else upload.files
                artifact, first = store.publish_first(spec, out, summary, describe, sent)
            if not first:  # another process was faster, while this one was suspended
                lease.check()
            if upload is not None:
                upload.clear_markers(artifact)
        return artifact, not first


def rebuild(
    store: Store,
    artifact: Artifact,
    spec: StageSpec,
    produce: Callable[[Path], Mapping[str, Any]],
    work_dir: str | None,
) -> list[str]:
    """Build a finished artifact again in a work folder, and return the names of the files that differ.

    The artifact stays as it is. In `metrics.jsonl`, neither the speed nor the order of the lines is compared, because
    lines may be written some steps late.
    """
    with (
        store.lease(spec.lease, spec.inputs.values()) as lease,
        attempt_folder(store.work_folder(spec, work_dir)) as work,
    ):
        out = work / "out"
        with explained(str(out)):
            out.mkdir()
            produce(out)
        lease.check()
        built = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
        files = artifact.manifest["files"]
        different = set(built) ^ set(files)
        for name in set(built) & set(files):
            if sha256_of(built[name]) != files[name]["sha256"]:
                has_speed = name == "metrics.jsonl"
                if not has_speed or without_speed(built[name].read_bytes()) != without_speed(artifact.read(name)):
                    different.add(name)
        return sorted(different)


def without_speed(metrics: bytes) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` by their steps, without the speed: what equal trainings have in common."""
    lines = [json.loads(line) for line in metrics.splitlines()]
    plain = [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]
    return sorted(plain, key=lambda line: (line["step"], *line))
