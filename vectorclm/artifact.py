"""The store and its artifacts: immutable directories at `{store}/{stage}/{fingerprint}/`.

An artifact is complete when, and only when, its `manifest.json` is there: files go first, the manifest last and
only if absent. So a rerun is a skip, and a killed writer leaves nothing that a reader could mistake for a result.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vectorclm.errors import CorruptArtifactError, StoreError
from vectorclm.lease import Lease, check_held, is_alive
from vectorclm.runtime import environment
from vectorclm.settings import digest
from vectorclm.storage import GARBLED, TRIES, Storage, explained, sha256_of

if TYPE_CHECKING:
    from vectorclm.sending import Sending

MANIFEST = "manifest.json"
SEAL = "manifest_sha256"  # over all else in it
Describe = Callable[[Path], Mapping[str, Any]]  # what a manifest says of a file beside its size and SHA-256


def default_store() -> str:
    """Where artifacts are kept unless a command is told otherwise."""
    return os.environ.get("VECTORCLM_STORE") or "./store"


@dataclass(frozen=True)
class Plan:
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


@dataclass(frozen=True)
class Artifact:
    """A finished result in a store."""

    store: "Store"
    stage: str
    fingerprint: str
    manifest: Mapping[str, Any]

    @property
    def uri(self) -> str:
        """Where it is, as a path or URI."""
        return self.store.uri_of(f"{self.stage}/{self.fingerprint}")

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of what its files hold: the same wherever and whenever they were made."""
        return digest({name: file["sha256"] for name, file in self.manifest["files"].items()})

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage said about its result: counts, losses, scores."""
        return dict(self.manifest["summary"])

    def local(self, only: str = "*") -> Path:
        """A local directory with this artifact's files, verified; a remote store's are copied to the cache first.

        `only` is a pattern, as of a shell, for the names of those files that are needed. Raises CorruptArtifactError
        where one of them differs from the manifest.
        """
        return self.store.download(self, only)

    @contextmanager
    def borrowed(self, name: str, folder: Path) -> Iterator[Path]:
        """One of its files, verified, for reading while the block runs: in place, or as a copy in `folder`.

        Raises CorruptArtifactError where it differs from the manifest.
        """
        if self.store.is_local:
            yield self.local(name) / name
            return
        copy = folder / f".{secrets.token_hex(4)}-{name.replace('/', '-')}"
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
            if (data := self.store.read(f"{self.stage}/{self.fingerprint}/{name}")) is None:
                raise _corrupt(self, name)
            if (found := hashlib.sha256(data).hexdigest()) == self.manifest["files"][name]["sha256"]:
                return data
        raise _corrupt(self, name, found)

    def verify(self, only: str = "*") -> None:
        """Compare files in the store with the manifest. Raises CorruptArtifactError naming the first that differs.

        A file that the manifest does not list is one, too, as readers of a local store read in place.
        """
        for difference in self.differences(only):
            raise CorruptArtifactError(difference)

    def differences(self, only: str = "*") -> Iterator[str]:
        """What differs between the files in the store and the manifest, and what to do, a line each."""
        known = self.manifest["files"]
        for name, want in known.items():
            if not fnmatchcase(name, only):
                continue
            key = f"{self.stage}/{self.fingerprint}/{name}"
            path, found = self.store.path(key), self.store.sha256(key)
            if found not in (None, want["sha256"]):  # read once more, as the bit may have turned on its way
                found = self.store.sha256(key)
            if found is None:
                yield f"{path} is missing: {mend(self)}"
            elif found != want["sha256"]:
                yield f"{path}: SHA-256 is {found[:12]}…, the manifest says {want['sha256'][:12]}…: {mend(self)}"
        root = f"{self.stage}/{self.fingerprint}/"
        for name in (key.removeprefix(root) for key in self.store.files(root.rstrip("/"))):
            hidden = PurePosixPath(name).name.startswith(".")  # as a writer's temporary files are
            if not hidden and name != MANIFEST and name not in known and fnmatchcase(name, only):
                yield f"{self.uri}/{name} is not in the artifact's manifest: move it elsewhere"


def mend(artifact: Artifact) -> str:
    """What to do about files that are not what the manifest promises."""
    return f"delete {artifact.uri} and run the stage again"


def _corrupt(artifact: Artifact, name: str, found: str | None = None) -> CorruptArtifactError:
    """That one of its files has this hash, which is another one, or is not there."""
    what = " is missing" if found is None else f": SHA-256 is {found[:12]}…"
    return CorruptArtifactError(f"{artifact.uri}/{name}{what}: {mend(artifact)}")


class Store(Storage):
    """A root for artifacts: a local folder, or an object store that fsspec opens, such as `s3://bucket/prefix`."""

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The finished artifact at this address, or None. Raises CorruptArtifactError for a broken manifest."""
        key = f"{stage}/{fingerprint}"
        tries = 0
        while (data := self.read(f"{key}/{MANIFEST}")) is not None:
            try:
                return Artifact(self, stage, fingerprint, _read_manifest(data, self.uri_of(key)))
            except CorruptArtifactError:  # on the way, or in the store
                if (tries := tries + 1) == TRIES:
                    raise
        return None

    def finished(self, stage: str) -> Iterator["Artifact"]:
        """All finished artifacts of a stage, by fingerprint."""
        for fingerprint in self.list(stage):
            if (found := self.find(stage, fingerprint)) is not None:
                yield found

    def publish(
        self,
        plan: Plan,
        directory: Path,
        summary: Mapping[str, Any],
        describe: Describe | None = None,
        sent: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> Artifact:
        """Move the files of `directory` to the plan's address, then write the manifest if there is none yet.

        It also has the files that were `sent` before.

        Where another process published the same fingerprint first, its artifact stands and is returned.
        """
        if (done := self.find(plan.stage, plan.fingerprint)) is not None:
            return done
        head = {
            "stage": plan.stage,
            "fingerprint": plan.fingerprint,
            "format_version": plan.version,
            "config": plan.config,
            "inputs": dict(plan.inputs),
            "summary": summary,
        }
        self.publish_directory(f"{plan.stage}/{plan.fingerprint}", directory, head, describe, sent)
        found = self.find(plan.stage, plan.fingerprint)
        if found is None:
            raise StoreError(f"the manifest of {plan.stage}/{plan.fingerprint} was written but cannot be read back")
        return found

    def publish_directory(
        self,
        key: str,
        directory: Path,
        head: Mapping[str, Any],
        describe: Describe | None = None,
        sent: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> None:
        """Move the files of `directory` to `key`, then write a manifest of `head` and all files if there is none."""
        files = {}
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            files[path.relative_to(directory).as_posix()] = said_of(path, describe)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        every = dict(sorted({**sent, **files}.items()))
        manifest = {**head, "files": every, "environment": environment(), "created": created}
        with explained(self.uri_of(key)):
            for name, file in files.items():
                self.put(directory / name, f"{key}/{name}", str(file["sha256"]))
            self._commit(f"{key}/{MANIFEST}", sealed(manifest))

    def _commit(self, key: str, data: bytes) -> None:
        """Write a manifest if there is none, and see that it arrived as it is."""
        for _ in range(TRIES):
            if not self.write(key, data, only_if_absent=True) or data in (self.read(key), self.read(key)):
                return
            self.delete(key)
        raise StoreError(f"{self.uri_of(key)} {GARBLED}")

    def download(self, artifact: Artifact, only: str = "*") -> Path:
        """See `Artifact.local`."""
        if self.is_local:
            artifact.verify(only)
            return Path(artifact.uri)
        cache = cache_folder() / "artifacts" / artifact.stage / artifact.fingerprint
        known = artifact.manifest["files"]
        for name, want in known.items():
            path = cache / name
            if not fnmatchcase(name, only) or (path.exists() and sha256_of(path) == want["sha256"]):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            try:
                self.fetch(artifact, name, part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        for path in cache.rglob("*"):  # another store may have left its own files here
            if path.is_file() and not path.name.startswith(".") and path.relative_to(cache).as_posix() not in known:
                path.unlink()
        return cache

    def fetch(self, artifact: Artifact, name: str, target: Path) -> None:
        """Copy one of its files from the store to `target`. Raises CorruptArtifactError where it is another one."""
        want = artifact.manifest["files"][name]["sha256"]
        try:
            found = self.get(f"{artifact.stage}/{artifact.fingerprint}/{name}", target, want)
        except FileNotFoundError as error:
            raise _corrupt(artifact, name) from error
        if found != want:
            raise _corrupt(artifact, name, found)

    def remove(self, key: str) -> None:
        """Remove `key` and all below it, if it is there. The manifest goes first, so no reader trusts the rest."""
        self.delete(f"{key}/{MANIFEST}")
        super().remove(key)

    @contextmanager
    def lease(self, key: str) -> Iterator["Lease"]:
        """Be the one writer of `key` while the block runs.

        The lease renews itself and expires when its holder dies. Raises InUseError while another process holds it.
        """
        lease = Lease(self, f"leases/{key}.json")
        lease.take()
        try:
            yield lease
        finally:
            lease.give_back()

    def lease_holder(self, key: str) -> dict[str, Any] | None:
        """Who writes `key` at this moment (`host`, `pid`, …); None where nobody alive does."""
        holder = Lease(self, f"leases/{key}.json").holder()
        return holder if holder and is_alive(holder) else None

    def check_lease(self, key: str) -> None:
        """Raise InUseError where this process was the writer of `key`, and another has taken it over."""
        check_held(self, f"leases/{key}.json")

    def work_folder(self, plan: Plan, work_dir: str | None) -> Path:
        """The local folder where this plan's work in progress lies; the same one after a restart."""
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


def build(
    store: Store,
    plan: Plan,
    produce: Callable[[Path], Mapping[str, Any]],
    work_dir: str | None = None,
    describe: Describe | None = None,
    sending: "Sending | None" = None,
) -> tuple[Artifact, bool]:
    """The artifact of `plan`, and whether it was there already.

    `produce(out)` writes the files into the empty local folder `out` and returns the summary. It runs only where
    the store has no such artifact, by one process at a time. `describe(file)` adds to what the manifest says of each.
    With `sending`, `produce` may have sent some of them already.
    """
    if (found := store.find(plan.stage, plan.fingerprint)) is not None:
        return found, True
    with store.lease(plan.lease):
        if (found := store.find(plan.stage, plan.fingerprint)) is not None:
            return found, True
        work = store.work_folder(plan, work_dir)
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        with explained(str(out)):
            out.mkdir()
            summary = produce(out)
            store.check_lease(plan.lease)
            if sending is not None:
                sending.forget_notes()
            artifact = store.publish(plan, out, summary, describe, {} if sending is None else sending.files)
        shutil.rmtree(work)
        return artifact, False


def rebuild(
    store: Store, artifact: Artifact, plan: Plan, produce: Callable[[Path], Mapping[str, Any]], work_dir: str | None
) -> list[str]:
    """Make a finished artifact again, beside it, and return the files that came out otherwise; the artifact stays.

    Of `metrics.jsonl` neither the speed is compared nor the order of the lines, which may come some steps late.
    """
    with store.lease(plan.lease):
        work = store.work_folder(plan, work_dir)
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        with explained(str(out)):
            out.mkdir()
            produce(out)
        made = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
        files = artifact.manifest["files"]
        different = set(made) ^ set(files)
        for name in set(made) & set(files):
            if sha256_of(made[name]) != files[name]["sha256"]:
                told = name == "metrics.jsonl"
                if not told or _without_speed(made[name].read_bytes()) != _without_speed(artifact.read(name)):
                    different.add(name)
        shutil.rmtree(work)
        return sorted(different)


def said_of(path: Path, describe: Describe | None) -> dict[str, Any]:
    """What a manifest says of a file."""
    more = {} if describe is None else describe(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path), **more}


def _without_speed(metrics: bytes) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in metrics.splitlines()]
    plain = [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]
    return sorted(plain, key=lambda line: (line["step"], *line))


def cache_folder() -> Path:
    """Where copies of remote artifacts lie on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vectorclm"


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as JSON, with a hash over all of it, so that a wrong bit in it is seen as well."""
    plain = json.loads(json.dumps(manifest))  # as it will be read
    return json.dumps({**plain, SEAL: digest(plain)}, indent=2, ensure_ascii=False).encode()


def _read_manifest(data: bytes, uri: str) -> dict[str, Any]:
    """A manifest whose files all lie below its artifact and have size and SHA-256.

    Raises CorruptArtifactError for any other.
    """
    try:
        manifest: dict[str, Any] = json.loads(data)
        if SEAL in manifest and manifest[SEAL] != digest({k: v for k, v in manifest.items() if k != SEAL}):
            raise ValueError("its bytes are not those that were written")
        for name, file in manifest["files"].items():
            path = PurePosixPath(name)
            if not isinstance(file["sha256"], str) or not isinstance(file["bytes"], int):
                raise ValueError(f"of the file {name!r} it tells no size and SHA-256")
            if path.is_absolute() or ".." in path.parts or "\\" in name:
                raise ValueError(f"it names the file {name!r}, which is not below it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifactError(
            f"{uri}/{MANIFEST} is no manifest: {error!r}; delete {uri} to make it anew"
        ) from error
    return manifest
