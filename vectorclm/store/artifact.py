"""The store and its artifacts: immutable directories at `{store}/{stage}/{fingerprint}/`.

An artifact is complete when, and only when, its `manifest.json` is there: files go first, the manifest last and
only if absent. So a rerun is a skip, and a killed writer leaves nothing that a reader could mistake for a result.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from vectorclm.errors import CorruptArtifactError, StoreError
from vectorclm.runtime.devices import environment
from vectorclm.settings import digest
from vectorclm.store.durable import temporary_beside
from vectorclm.store.hash_memory import HashMemory, cache_folder
from vectorclm.store.lease import Lease, check_held, is_alive
from vectorclm.store.manifest import MANIFEST as MANIFEST
from vectorclm.store.manifest import Describe, file_entry, read_manifest, sealed
from vectorclm.store.publication import commit, publish_locally
from vectorclm.store.result import Artifact as Artifact
from vectorclm.store.result import ArtifactStorage, corrupt
from vectorclm.store.result import StageSpec as StageSpec
from vectorclm.store.result import mend as mend
from vectorclm.store.storage import TRIES, explained, sha256_of
from vectorclm.store.work import attempt_folder

logger = logging.getLogger(__name__)


def default_store() -> str:
    """Where artifacts are kept unless a command is told otherwise."""
    return os.environ.get("VECTORCLM_STORE") or "./store"


class Store(ArtifactStorage):
    """A root for artifacts: a local folder, or an object store that fsspec opens, such as `s3://bucket/prefix`."""

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
        """What a manifest says of the artifact at this address, whatever its files are; None where there is none.

        Raises CorruptArtifactError for a broken manifest.
        """
        key = f"{stage}/{fingerprint}"
        tries = 0
        while (data := self.read(f"{key}/{MANIFEST}")) is not None:
            if self.is_s3 and not data:  # given up, see `withdraw`
                return None
            try:
                return Artifact(self, stage, fingerprint, read_manifest(data, self.uri_of(key)))
            except CorruptArtifactError:  # on the way, or in the store
                if (tries := tries + 1) == TRIES:
                    raise
        return None

    def find_whole(self, plan: StageSpec) -> Artifact | None:
        """The finished artifact of a plan, or None, also where it is damaged, so that its stage makes it again."""
        try:
            return self.find(plan.stage, plan.fingerprint)
        except CorruptArtifactError:
            return None

    def discard(self, stage: str, fingerprint: str, seen: Mapping[str, Any] | None = None) -> None:
        """Take the manifest from a damaged artifact, so that its stage makes it again. The caller holds its lease.

        One that was made again meanwhile stays: with `seen`, any but that manifest, else any that is not damaged.
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
        """All finished artifacts of a stage, by fingerprint, as their manifests say; their files are not looked at."""
        for fingerprint in self.list(stage):
            if (found := self.look_up(stage, fingerprint)) is not None:
                yield found

    def publish(
        self,
        plan: StageSpec,
        directory: Path,
        summary: Mapping[str, Any],
        describe: Describe | None = None,
        sent: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> Artifact:
        """Move the files of `directory` to the plan's address, then write the manifest if there is none yet.

        It also has the files that were `sent` before.

        Where another process published the same fingerprint first, its artifact stands and is returned.
        """
        return self.publish_first(plan, directory, summary, describe, sent)[0]

    def publish_first(
        self,
        plan: StageSpec,
        directory: Path,
        summary: Mapping[str, Any],
        describe: Describe | None,
        sent: Mapping[str, Mapping[str, Any]],
    ) -> tuple[Artifact, bool]:
        """See `publish`; and whether this process published it."""
        if (done := self.find(plan.stage, plan.fingerprint)) is not None:
            return done, False
        head = {
            "stage": plan.stage,
            "fingerprint": plan.fingerprint,
            "format_version": plan.version,
            "config": plan.config,
            "inputs": dict(plan.inputs),
            "summary": summary,
        }
        first = self.publish_directory(f"{plan.stage}/{plan.fingerprint}", directory, head, describe, sent)
        found = self.find(plan.stage, plan.fingerprint)
        if found is None:
            raise StoreError(f"the manifest of {plan.stage}/{plan.fingerprint} was written but cannot be read back")
        return found, first

    def publish_directory(
        self,
        key: str,
        directory: Path,
        head: Mapping[str, Any],
        describe: Describe | None = None,
        sent: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> bool:
        """Publish the files of `directory` at `key` with a manifest of `head` and all of them, if there is none yet.

        False where another process published first; what it published is untouched.
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
        """Copy a file of the artifact at `key` to a remote store; what its manifest says of where it lies there."""
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
            part = temporary_beside(path)
            try:
                self.fetch(artifact, name, part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        memory.save()
        for path in cache.rglob("*"):  # another store may have left its own files here
            if path.is_file() and not path.name.startswith(".") and path.relative_to(cache).as_posix() not in known:
                path.unlink()
        return cache

    def fetch(self, artifact: Artifact, name: str, target: Path) -> None:
        """Copy one of its files from the store to `target`. Raises CorruptArtifactError where it is another one."""
        want = artifact.manifest["files"][name]["sha256"]
        try:
            found = self.get(artifact.key(name), target, want)
        except FileNotFoundError as error:
            raise corrupt(artifact, name) from error
        if found != want:
            raise corrupt(artifact, name, found)

    def remove(self, key: str) -> None:
        """Remove `key` and all below it, if it is there. The manifest goes first, so no reader trusts the rest."""
        self.delete(f"{key}/{MANIFEST}")
        super().remove(key)

    @contextmanager
    def lease(self, key: str) -> Iterator["Lease"]:
        """Be the one writer of `key` while the block runs.

        The lease renews itself and expires when its holder dies. Raises InUseError while another process holds it, and
        for whatever goes wrong after another process has taken it over.
        """
        lease = Lease(self, f"leases/{key}.json")
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
        """Who writes `key` at this moment (`host`, `pid`, …); None where nobody alive does."""
        holder = Lease(self, f"leases/{key}.json").holder()
        return holder if holder and is_alive(holder) else None

    def check_lease(self, key: str) -> None:
        """Raise InUseError where this process was the writer of `key`, and another has taken it over."""
        check_held(self, f"leases/{key}.json")

    def work_folder(self, plan: StageSpec, work_dir: str | None) -> Path:
        """The local folder of this plan's work in progress, in which each attempt at it has a folder of its own."""
        folder = self.work_root(work_dir) / f"{plan.stage}-{plan.fingerprint[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def work_root(self, work_dir: str | None) -> Path:
        """Where the work folders lie."""
        if work_dir is not None:
            return Path(work_dir)
        if self.is_local:
            return Path(self.root) / "work"
        return cache_folder() / "work" / digest(self.uri)[:12]  # each store its own, as their leases are apart, too


def rebuilt_because(plan: StageSpec, error: CorruptArtifactError) -> str:
    """The warning that an artifact which `find` refuses is built again."""
    return f"{str(error).removesuffix(': run its stage again')}; {plan.stage} is built again now"


class SentFiles(Protocol):
    """Files of an artifact that went to the store while it was built."""

    files: dict[str, Mapping[str, Any]]  # as the manifest has them

    def clear_markers(self, artifact: Artifact) -> None:
        """Remove what says how far the work was: the manifest is there."""


def build(
    store: Store,
    plan: StageSpec,
    produce: Callable[[Path], Mapping[str, Any]],
    work_dir: str | None = None,
    describe: Describe | None = None,
    sending: "SentFiles | None" = None,
) -> tuple[Artifact, bool]:
    """The artifact of `plan`, and whether it was there already.

    `produce(out)` writes the files into the empty local folder `out` and returns the summary. It runs only where
    the store has no such artifact, by one process at a time. `describe(file)` adds to what the manifest says of each.
    With `sending`, `produce` may have sent some of them already.
    """
    if (found := store.find_whole(plan)) is not None:
        return found, True
    with store.lease(plan.lease) as lease:
        try:
            if (found := store.find(plan.stage, plan.fingerprint)) is not None:
                return found, True
        except CorruptArtifactError as error:
            logger.warning("%s", rebuilt_because(plan, error))
            lease.check()
            store.discard(plan.stage, plan.fingerprint)
        with attempt_folder(store.work_folder(plan, work_dir)) as work:
            out = work / "out"
            with explained(str(out)):
                out.mkdir()
                summary = produce(out)
                lease.check()
                sent = {} if sending is None else sending.files
                artifact, first = store.publish_first(plan, out, summary, describe, sent)
            if not first:  # another was faster, as this process stood still
                lease.check()
            if sending is not None:
                sending.clear_markers(artifact)
        return artifact, not first


def rebuild(
    store: Store,
    artifact: Artifact,
    plan: StageSpec,
    produce: Callable[[Path], Mapping[str, Any]],
    work_dir: str | None,
) -> list[str]:
    """Make a finished artifact again, beside it, and return the files that came out otherwise; the artifact stays.

    Of `metrics.jsonl` neither the speed is compared nor the order of the lines, which may come some steps late.
    """
    with store.lease(plan.lease) as lease, attempt_folder(store.work_folder(plan, work_dir)) as work:
        out = work / "out"
        with explained(str(out)):
            out.mkdir()
            produce(out)
        lease.check()
        made = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
        files = artifact.manifest["files"]
        different = set(made) ^ set(files)
        for name in set(made) & set(files):
            if sha256_of(made[name]) != files[name]["sha256"]:
                told = name == "metrics.jsonl"
                if not told or _without_speed(made[name].read_bytes()) != _without_speed(artifact.read(name)):
                    different.add(name)
        return sorted(different)


def _without_speed(metrics: bytes) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in metrics.splitlines()]
    plain = [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]
    return sorted(plain, key=lambda line: (line["step"], *line))
