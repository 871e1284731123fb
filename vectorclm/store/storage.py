"""Verified storage of bytes in a local folder, or in an object store that fsspec opens.

A file that was sent to a remote store is read back, and a file that was fetched is hashed, because no client notices a
flipped bit or a truncated answer: s3fs and botocore retry failures, not wrong bytes.
"""

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from safetensors import SafetensorError

from vectorclm.errors import DiskFullError, StoreError, disk_error
from vectorclm.store import s3
from vectorclm.store.address import PROTOCOLS, normalized
from vectorclm.store.durable import (
    OWN,
    TEMPORARY,
    exclusive,
    make_folder,
    sync_folder,
    temporary_beside,
    temporary_file,
    write_file,
)
from vectorclm.store.hash_memory import State, state_of
from vectorclm.store.s3 import GARBLED as GARBLED
from vectorclm.store.s3 import TRIES as TRIES

logger = logging.getLogger(__name__)
LOCK = f"{OWN}lock"  # lock file of a local store, for compare-and-swap
ATTEMPT = f"{OWN}file-"  # in a remote store, prefix of the folder of a file whose name was taken
RACERS = 8  # threads that create one object at once, to detect a store that lets several succeed
RIGHTS = "check the folder, its owner and rights, or name the right store with --store or VECTORCLM_STORE"
READ_BYTES = 8 * 2**20  # block size where a remote file is only hashed


@dataclass(frozen=True)
class StoredFile:
    """A file in a listing of the store."""

    bytes: int
    modified: float  # seconds since 1970, by the store's clock
    state: State = ()  # changes whenever the file changes


class Storage:
    """Read, write and list below a root URI; a key is a path below the root."""

    is_away = False  # whether its server did not answer last, where `patience` asks it again

    def __init__(self, uri: str) -> None:
        if "@" in urlsplit(uri).netloc:
            where = uri.partition("://")[0] + "://…" + uri.rpartition("@")[2]
            raise StoreError(f"store {where}: put credentials into the environment, not into the address")
        uri = normalized(uri)
        # An address may come from a stranger: refuse web pages of this network, and archives that name other files.
        protocol = fsspec.core.split_protocol(uri)[0] or "file"
        if "::" in uri or protocol not in PROTOCOLS:
            shown = uri.partition("::")[0] + "::…" if "::" in uri else uri
            known = ", ".join(f"{name}://" for name in PROTOCOLS)
            raise StoreError(f"store {shown} cannot be opened: a store is a local folder, or one of {known}")
        try:
            self.fs, root = fsspec.core.url_to_fs(uri, use_listings_cache=False, **s3.options(protocol, s3.PATIENT))
        except (ValueError, ImportError) as error:
            raise StoreError(f"store {uri} cannot be opened: {error}") from error
        self.root = str(root).rstrip("/")
        self.is_local = "file" in ([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol)
        self.uri = self.root if self.is_local else uri.rstrip("/")
        self._protocol = protocol
        is_s3 = protocol in s3.PROTOCOLS
        self.is_s3 = is_s3
        self._in_parts = {"chunksize": s3.PART_BYTES, "max_concurrency": s3.PARTS} if is_s3 else {}
        self._in_one = {"max_concurrency": 1} if is_s3 else {}

    def path(self, key: str) -> str:
        """The path of `key` on this store's file system."""
        return f"{self.root}/{key}"

    def uri_of(self, key: str) -> str:
        """The full address of `key`."""
        return f"{self.uri}/{key}"

    def check_reachable(self) -> None:
        """Ask a remote store for an object, with few retries. Raises StoreError with what to change."""
        if self.is_local:
            return
        with suppress(FileNotFoundError), self._translate_errors(f"store {self.uri}"):
            self._impatient().cat_file(self.path(f"{TEMPORARY}none"), **self._in_one)

    def _impatient(self) -> Any:
        """The remote file system with few retries, for what comes before the work."""
        quick, _ = fsspec.core.url_to_fs(self.uri, use_listings_cache=False, **s3.options(self._protocol, s3.QUICK))
        quick.retries = 1  # s3fs repeats what botocore has already repeated
        return quick

    def write_probe(self) -> str:
        """Write a small file under a new key, which another machine then reads; return the key."""
        key = temporary_beside(Path("probe")).name
        self.write(key, b"probe", only_if_absent=True)
        return key

    def check_writable(self) -> None:
        """Write and remove a probe. Raises StoreError where that fails, or where a store lets several writers win."""
        self.check_reachable()
        key = temporary_beside(Path("probe")).name

        def first(number: int) -> bool:
            return self.write(
                key, b"probe %d" % number, only_if_absent=True
            )  # the operation that leases and manifests need

        try:
            with ThreadPoolExecutor(RACERS) as racers:
                won = sum(racers.map(first, range(RACERS)))
            late = first(RACERS)
            replaces = self._replaces_only_what_was_read(key)
            self.delete(key)
        except DiskFullError:
            raise
        except Exception as error:
            raise StoreError(f"store {self.uri} is not writable ({error}): {RIGHTS}") from error
        if late or won != 1:
            found = "overwrites an object" if late else f"let {won} of {RACERS} writers create one object"
            raise StoreError(
                f"store {self.uri} {found} despite If-None-Match: *, so two runs could write the same artifact: choose "
                "a store that honours it, with --store or VECTORCLM_STORE"
            )
        if not replaces:
            logger.warning(
                "store %s does not honour If-Match: finished artifacts are safe, but two processes that take over a "
                "dead process's work at the same moment may both do the work",
                self.uri,
            )

    def _replaces_only_what_was_read(self, key: str) -> bool:
        """Whether the store honours If-Match: refuses a wrong ETag, and accepts the right one."""
        if not self.is_s3:
            return True  # a local store uses its lock; other stores have no such request
        bucket, _, name = self.path(key).partition("/")
        tag = s3.tag_of(self.fs.call_s3("head_object", Bucket=bucket, Key=name))
        return not self._put_matching(key, b"probe", "0" * 32) and self._put_matching(key, b"probe", tag)

    def create(self) -> None:
        """Create the bucket or the folder if absent. Raises StoreError where that fails."""
        if self.is_local:
            try:
                with explained(self.uri):
                    Path(self.root).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"store {self.uri} cannot be created ({error.strerror}): {RIGHTS}") from error
        else:
            with self._translate_errors(f"store {self.uri}"):
                self._impatient().makedirs(self.root.lstrip("/").partition("/")[0], exist_ok=True)

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        """Write one small object; with `only_if_absent`, return False where another writer wrote other bytes first."""
        path = self.path(key)
        if self.is_local:
            with explained(self.uri_of(key)):
                make_folder(Path(path).parent)
                return write_file(Path(path), data, only_if_absent=only_if_absent)
        with self._translate_errors(f"cannot write {self.uri_of(key)}"):
            try:
                self.fs.pipe_file(path, data, mode="create" if only_if_absent else "overwrite")
            except OSError as error:
                if not (only_if_absent and s3.refused_by_condition(error)):
                    raise
                # After a lost answer, the repeated request finds the bytes that the first request wrote.
                return self.read(key) == data
        return True

    def replace(self, key: str, before: bytes, after: bytes) -> bool:
        """Compare-and-swap: replace an object whose bytes are still `before`; False where they differ, or are gone.

        A local store compares under a file lock, S3 by `If-Match`. Other stores have no such operation: there, a writer
        that is suspended between comparison and write may replace bytes that it did not read.
        """
        if self.is_local:
            path = Path(self.path(key))
            with temporary_file(path) as part:
                with explained(self.uri_of(key)):
                    write_file(part, after)
                with self.locked():
                    if self.read(key) != before:
                        return False
                    part.replace(path)
            sync_folder(path.parent)
            return True
        if not self.is_s3:
            return self.read(key) == before and self.write(key, after)
        with self._translate_errors(f"cannot write {self.uri_of(key)}"):
            found, tag = s3.read_tagged(self.fs, self.path(key))
            if found != before:
                return False
            # After a lost answer, the repeated request finds the bytes that the first request wrote.
            return self._put_matching(key, after, tag) or self.read(key) == after

    def withdraw(self, key: str, before: bytes) -> bool:
        """Remove an object whose bytes are still `before`; False where they differ, or are gone.

        S3 has no conditional removal: there the object becomes empty, which counts as absent.
        """
        if self.is_s3:
            return self.replace(key, before, b"")
        with self.locked() if self.is_local else nullcontext():
            if self.read(key) != before:
                return False
            self.delete(key)
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of this local store, for replacing or moving files, while the block runs.

        Raises StoreError where a suspended process holds the lock.
        """
        with explained(self.uri_of(LOCK)), exclusive(Path(self.root) / LOCK):
            yield

    def _put_matching(self, key: str, data: bytes, tag: str) -> bool:
        bucket, _, name = self.path(key).partition("/")
        try:
            self.fs.call_s3("put_object", Bucket=bucket, Key=name, Body=data, IfMatch=tag)
        except OSError as error:
            if s3.code(error) in s3.NO_CONDITIONS:
                return self.write(key, data)
            if s3.refused_by_condition(error) or isinstance(error, FileNotFoundError):
                return False
            raise
        return True

    def read(self, key: str) -> bytes | None:
        """The object's bytes, or None where there is none."""
        try:
            with self._translate_errors(
                f"cannot read {self.uri_of(key)}"
            ):  # in one request, without asking for the size first
                return bytes(self.fs.cat_file(self.path(key), **self._in_one))
        except FileNotFoundError:
            return None

    def list(self, key: str) -> list[str]:
        """Names directly below `key`, sorted; empty where there is nothing."""
        try:
            with self._translate_errors(f"cannot list {self.uri_of(key)}"):
                names = self.fs.ls(self.path(key).rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in names)

    def files(self, key: str) -> dict[str, StoredFile]:
        """All files at and below `key`, by their own keys; empty where there is nothing.

        Links to folders are not followed: each is listed like a file. `key` itself may be a link.
        """
        if self.is_local:
            found = dict(_local_files(Path(self.path(key))))
        else:
            with self._translate_errors(f"cannot list {self.uri_of(key)}"):
                listed = self.fs.find(self.path(key).rstrip("/"), detail=True)
            found = {path: _stored(info) for path, info in listed.items()}
        return {path.removeprefix(f"{self.root}/"): found[path] for path in sorted(found)}

    def sha256(self, key: str) -> str | None:
        """The SHA-256 of a file's bytes as read from the store, or None where there is no such file."""
        try:
            with (
                self._translate_errors(f"cannot read {self.uri_of(key)}"),
                self.fs.open(self.path(key), "rb", READ_BYTES) as file,
            ):
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    def delete(self, key: str) -> None:
        """Remove one object, if present."""
        with suppress(FileNotFoundError), self._translate_errors(f"cannot remove {self.uri_of(key)}"):
            self.fs.rm_file(self.path(key))

    def remove(self, key: str) -> None:
        """Remove `key` and everything below, if present."""
        with suppress(FileNotFoundError), self._translate_errors(f"cannot remove {self.uri_of(key)}"):
            self.fs.rm(self.path(key), recursive=True)
        # s3fs does not report which of many objects it could not remove.
        if not self.is_local and self.files(key):
            raise StoreError(f"{self.uri_of(key)} was removed only in part: check the rights to delete objects there")

    def _translate_errors(self, where: str) -> AbstractContextManager[None]:
        """Translate errors of a remote store's client in the block into StoreError with advice."""
        return nullcontext() if self.is_local else s3.translate_errors(where)

    def put(self, source: Path, folder: str, name: str, sha256: str) -> str:
        """Copy a file into a folder of a remote store, until the bytes read back have this hash; returns its name.

        No object is replaced. Where the name has other bytes already, for example of a writer that was killed or
        suspended, the file goes to a unique name.
        """
        place = name
        for _ in range(TRIES):
            key = f"{folder}/{place}"
            with self._translate_errors(f"cannot write {self.uri_of(key)}"):
                if self.is_s3 and source.stat().st_size > s3.LARGEST_PUT and place == name:
                    place = _own(name)  # multipart uploads replace an existing object on many servers
                    continue
                self._create(source, self.path(key))
            found = self.sha256(key)
            if found not in (None, sha256):  # read once more: the bit may have flipped in transfer
                found = self.sha256(key)
            if found == sha256:
                return place
            if found is not None:
                place = _own(name)
        raise StoreError(f"{self.uri_of(f'{folder}/{name}')} {GARBLED}")

    def _create(self, source: Path, path: str) -> None:
        """Send a file to a path; an object that exists there stays."""
        with suppress(FileExistsError):
            if not self.is_s3:
                self.fs.put_file(str(source), path, mode="create")
            elif source.stat().st_size > s3.LARGEST_PUT:
                self.fs.put_file(str(source), path, mode="create", **self._in_parts)
            else:
                s3.create(self.fs, source, path)

    def get(self, key: str, target: Path, sha256: str) -> str:
        """Fetch a file until it has this hash; returns the hash of the last copy. Raises FileNotFoundError."""
        for _ in range(TRIES):
            with self._translate_errors(f"cannot read {self.uri_of(key)}"), explained(str(target)):
                self.fs.get_file(self.path(key), str(target), **self._in_parts)
            if (found := sha256_of(target)) == sha256:
                break
        return found


def _own(name: str) -> str:
    """A unique name in the same folder, which no other writer uses."""
    return f"{ATTEMPT}{secrets.token_hex(8)}/{name}"


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Raise StoreError with advice where the block fails because a disk is full or fails."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if (found := disk_error(error, where)) is not None:
            raise found from error
        raise


def _local_files(root: Path) -> Iterator[tuple[str, StoredFile]]:
    """The files at and below a path, and the links to folders below; files that vanish meanwhile are left out."""
    upward = root.is_symlink() and root.parent.resolve().is_relative_to(root.resolve())
    places = [root] if root.is_file() or upward else []
    for place, folders, names in os.walk(root) if not upward else ():
        places += [Path(place, name) for name in names]
        places += [Path(place, name) for name in folders if Path(place, name).is_symlink()]
    for path in places:
        with suppress(FileNotFoundError):
            stat = path.lstat() if path.is_dir() or not path.exists() else path.stat()
            yield path.as_posix(), StoredFile(stat.st_size, stat.st_mtime, state_of(stat))


def _stored(info: Mapping[str, Any]) -> StoredFile:
    """A file in a remote store's listing."""
    modified = _modified(info)
    return StoredFile(info["size"], modified, (info["size"], modified, str(info.get("ETag", ""))))


def _modified(info: Mapping[str, Any]) -> float:
    """The time of a listed object's last write; each file system has its own name for the field."""
    known = (info.get(name) for name in ("LastModified", "mtime", "last_modified", "updated", "created"))
    when = next((value for value in known if value is not None), None)
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    return when.timestamp() if isinstance(when, datetime) else float(when if when is not None else time.time())


def sha256_of(path: Path) -> str:
    """The SHA-256 (hex) of a file on this machine."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
