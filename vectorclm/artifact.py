"""The store and its artifacts: immutable directories at `{store}/{stage}/{fingerprint}/`.

An artifact is complete when, and only when, its `manifest.json` is there: files go first, the manifest last and
only if absent. So a rerun is a skip, and a killed writer leaves nothing that a reader could mistake for a result.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import psutil

from vectorclm.errors import CorruptArtifactError, InUseError, StoreError
from vectorclm.runtime import environment
from vectorclm.settings import digest

MANIFEST = "manifest.json"
LEASE_SECONDS = 30  # a lease not renewed for this long belongs to a dead process


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
    def summary(self) -> dict[str, Any]:
        """What the stage said about its result: counts, losses, scores."""
        return dict(self.manifest["summary"])

    def local(self) -> Path:
        """A local directory with this artifact's files, verified; a remote store's are copied to the cache first.

        Raises CorruptArtifactError where a file differs from the manifest.
        """
        return self.store.download(self)

    def verify(self) -> None:
        """Compare every file in the store with the manifest. Raises CorruptArtifactError naming the file."""
        for name, want in self.manifest["files"].items():
            path = self.store.path(f"{self.stage}/{self.fingerprint}/{name}")
            try:
                with self.store.fs.open(path, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError:
                raise CorruptArtifactError(f"{path} is missing: {_mend(self)}") from None
            if found != want["sha256"]:
                raise CorruptArtifactError(
                    f"{path}: SHA-256 is {found[:12]}…, the manifest says {want['sha256'][:12]}…: {_mend(self)}"
                )


def _mend(artifact: Artifact) -> str:
    return f"delete {artifact.uri} and run the stage again"


class Store:
    """A root for artifacts: a local folder, or any URI that fsspec opens, such as `s3://bucket/prefix`."""

    def __init__(self, uri: str) -> None:
        self.fs, root = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        self.root = str(root).rstrip("/")
        self.is_local = "file" in ([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol)
        self.uri = self.root if self.is_local else uri.rstrip("/")

    def path(self, key: str) -> str:
        """The path of `key` on this store's file system."""
        return f"{self.root}/{key}"

    def uri_of(self, key: str) -> str:
        """The full address of `key`."""
        return f"{self.uri}/{key}"

    def check_writable(self) -> None:
        """Write and remove a probe. Raises StoreError, with what to change, where that fails."""
        key = f".probe-{secrets.token_hex(4)}"
        try:
            self.write(key, b"probe")
            self.fs.rm(self.path(key))
        except Exception as error:
            raise StoreError(
                f"store {self.uri} is not writable ({error}): choose another with --store or VECTORCLM_STORE"
            ) from error

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        """Write one small object; with `only_if_absent`, False where another writer was first."""
        path = self.path(key)
        self.fs.makedirs(self.fs._parent(path), exist_ok=True)
        if self.is_local:
            return _write_local(Path(path), data, only_if_absent)
        try:
            self.fs.pipe_file(path, data, mode="create" if only_if_absent else "overwrite")
        except (FileExistsError, OSError) as error:
            # Servers differ in how they say "it exists": EINVAL from some, FileExistsError from others.
            if only_if_absent and (isinstance(error, FileExistsError) or error.errno == errno.EINVAL):
                return False
            raise StoreError(f"cannot write {path}: {error}") from error
        return True

    def read(self, key: str) -> bytes | None:
        """The object's bytes, or None where there is none."""
        try:
            return bytes(self.fs.cat_file(self.path(key)))
        except FileNotFoundError:
            return None

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The finished artifact at this address, or None."""
        data = self.read(f"{stage}/{fingerprint}/{MANIFEST}")
        return None if data is None else Artifact(self, stage, fingerprint, json.loads(data))

    def publish(self, plan: Plan, directory: Path, summary: Mapping[str, Any]) -> Artifact:
        """Move the files of `directory` to the plan's address, then write the manifest if there is none yet.

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
        self.publish_directory(f"{plan.stage}/{plan.fingerprint}", directory, head)
        found = self.find(plan.stage, plan.fingerprint)
        if found is None:
            raise StoreError(f"the manifest of {plan.stage}/{plan.fingerprint} was written but cannot be read back")
        return found

    def publish_directory(self, key: str, directory: Path, head: Mapping[str, Any]) -> None:
        """Move the files of `directory` to `key`, then write a manifest of `head` and the files if there is none."""
        files = {}
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            name = path.relative_to(directory).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = {**head, "files": files, "environment": environment(), "created": created}
        with _explained(self.uri_of(key)):
            for name in files:
                self._put(directory / name, f"{key}/{name}")
            data = json.dumps(manifest, indent=2, ensure_ascii=False).encode()
            self.write(f"{key}/{MANIFEST}", data, only_if_absent=True)

    def list(self, key: str) -> list[str]:
        """Names directly below `key`, sorted; empty where there is nothing."""
        try:
            return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in self.fs.ls(self.path(key), detail=False))
        except FileNotFoundError:
            return []

    def remove(self, key: str) -> None:
        """Remove `key` and all below it, if it is there. The manifest goes first, so no reader trusts the rest."""
        for name in (f"{key}/{MANIFEST}", key):
            with suppress(FileNotFoundError):
                self.fs.rm(self.path(name), recursive=name == key)

    def _put(self, source: Path, key: str) -> None:
        target = self.path(key)
        self.fs.makedirs(self.fs._parent(target), exist_ok=True)
        if self.is_local:
            shutil.move(source, target)
        else:
            self.fs.put_file(str(source), target)

    def download(self, artifact: Artifact) -> Path:
        """See `Artifact.local`."""
        if self.is_local:
            artifact.verify()
            return Path(artifact.uri)
        cache = cache_folder() / "artifacts" / artifact.stage / artifact.fingerprint
        for name, want in artifact.manifest["files"].items():
            path = cache / name
            if path.exists() and _sha256(path) == want["sha256"]:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
            self.fs.get_file(self.path(f"{artifact.stage}/{artifact.fingerprint}/{name}"), str(part))
            if (found := _sha256(part)) != want["sha256"]:
                part.unlink()
                raise CorruptArtifactError(f"{artifact.uri}/{name}: SHA-256 is {found[:12]}…: {_mend(artifact)}")
            part.replace(path)
        return cache

    @contextmanager
    def lease(self, key: str) -> Iterator[None]:
        """Be the one writer of `key` while the block runs.

        The lease renews itself and expires when its holder dies. Raises InUseError while another process holds it.
        """
        name = f"leases/{key}.json"
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}

        def renew() -> None:
            self.write(name, json.dumps({**mine, "renewed": time.time()}).encode())

        data = json.dumps({**mine, "renewed": time.time()}).encode()
        if not self.write(name, data, only_if_absent=True):
            holder = json.loads(self.read(name) or b"{}")
            if holder and _is_alive(holder):
                raise InUseError(
                    f"{key} is being built by process {holder['pid']} on {holder['host']}: wait for it, or stop it"
                )
            renew()
        stop = threading.Event()

        def keep() -> None:
            while not stop.wait(LEASE_SECONDS / 3):
                renew()

        threading.Thread(target=keep, daemon=True, name=f"lease {key}").start()
        try:
            yield
        finally:
            stop.set()
            self.fs.rm(self.path(name))

    def work_folder(self, plan: Plan, work_dir: str | None) -> Path:
        """The local folder where this plan's work in progress lies; the same one after a restart."""
        if work_dir is not None:
            base = Path(work_dir)
        else:
            base = Path(self.root) / "work" if self.is_local else cache_folder() / "work"
        folder = base / f"{plan.stage}-{plan.fingerprint[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def build(
    store: Store, plan: Plan, produce: Callable[[Path], Mapping[str, Any]], work_dir: str | None = None
) -> tuple[Artifact, bool]:
    """The artifact of `plan`, and whether it was there already.

    `produce(out)` writes the files into the empty local folder `out` and returns the summary. It runs only where
    the store has no such artifact, by one process at a time.
    """
    if (found := store.find(plan.stage, plan.fingerprint)) is not None:
        return found, True
    with store.lease(f"{plan.stage}-{plan.fingerprint[:16]}"):
        if (found := store.find(plan.stage, plan.fingerprint)) is not None:
            return found, True
        work = store.work_folder(plan, work_dir)
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        with _explained(str(out)):
            out.mkdir()
            summary = produce(out)
            artifact = store.publish(plan, out, summary)
        shutil.rmtree(work)
        return artifact, False


def cache_folder() -> Path:
    """Where copies of remote artifacts lie on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vectorclm"


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"no space left while writing {where}: free some, or choose another store") from error
        raise


def _write_local(path: Path, data: bytes, only_if_absent: bool) -> bool:
    """Write whole or not at all: a temporary file, then a link (which fails if the name exists) or a rename."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not only_if_absent:
            temporary.replace(path)
            return True
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_alive(holder: Mapping[str, Any]) -> bool:
    if holder["host"] == socket.gethostname() and not psutil.pid_exists(holder["pid"]):
        return False
    return bool(time.time() - holder["renewed"] < LEASE_SECONDS)
