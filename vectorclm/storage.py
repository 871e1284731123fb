"""Where bytes lie: a local folder, or an object store that fsspec opens. They go there whole and verified.

A file that went to a remote store is read back, and one that came from it is hashed, because no client notices a
flipped bit or an answer that is too short: s3fs and botocore repeat what fails, not what is wrong.
"""

import errno
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from safetensors import SafetensorError

from vectorclm import s3
from vectorclm.durable import TEMPORARY, make_folder, move_file, sync_folders, temporary_beside, write_file
from vectorclm.errors import StoreError
from vectorclm.hash_memory import State, state_of

PROTOCOLS = ("file", "local", "s3", "s3a", "gs", "gcs", "az", "abfs", "memory")  # what keeps a store
RACERS = 8  # that try to create one object at once, to find a store that only says it lets one
TRIES = 4  # to move a file whole: what arrives otherwise is sent or fetched again
READ_BYTES = 8 * 2**20  # fetched at once where a remote file is only hashed
GARBLED = "arrived otherwise than it was sent, again and again: see to the network, or to the server's disk and memory"


@dataclass(frozen=True)
class StoredFile:
    """A file as a listing tells it."""

    bytes: int
    modified: float  # seconds since 1970, by the store's clock
    state: State = ()  # what changes whenever the file does


class Storage:
    """A root URI, and how to write, read and list below it; a key is a path below the root."""

    def __init__(self, uri: str) -> None:
        if "@" in urlsplit(uri).netloc:
            where = uri.partition("://")[0] + "://…" + uri.rpartition("@")[2]
            raise StoreError(f"store {where}: put credentials into the environment, not into the address")
        # An address may be a stranger's: no web pages of this network, no archives that name further files.
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
        self._in_parts = {"chunksize": s3.PART_BYTES, "max_concurrency": s3.PARTS} if is_s3 else {}
        self._in_one = {"max_concurrency": 1} if is_s3 else {}

    def path(self, key: str) -> str:
        """The path of `key` on this store's file system."""
        return f"{self.root}/{key}"

    def uri_of(self, key: str) -> str:
        """The full address of `key`."""
        return f"{self.uri}/{key}"

    def check_reachable(self) -> None:
        """Ask a remote store for an object. Raises StoreError, with what to change, without much waiting."""
        if self.is_local:
            return
        with suppress(FileNotFoundError), self._told(f"store {self.uri}"):
            quick, _ = fsspec.core.url_to_fs(self.uri, use_listings_cache=False, **s3.options(self._protocol, s3.QUICK))
            quick.retries = 1  # s3fs repeats what botocore has already repeated
            quick.cat_file(self.path(f"{TEMPORARY}none"), **self._in_one)

    def check_writable(self) -> None:
        """Write and remove a probe. Raises StoreError, with what to change, where that fails or several writers win."""
        self.check_reachable()
        key = temporary_beside(Path("probe")).name

        def first(number: int) -> bool:
            return self.write(key, b"probe %d" % number, only_if_absent=True)  # what leases and manifests need

        try:
            with ThreadPoolExecutor(RACERS) as racers:
                won = sum(racers.map(first, range(RACERS)))
            late = first(RACERS)
            self.delete(key)
        except Exception as error:
            raise StoreError(
                f"store {self.uri} is not writable ({error}): choose another with --store or VECTORCLM_STORE"
            ) from error
        if late or won != 1:
            found = "overwrites an object" if late else f"let {won} of {RACERS} writers create one object"
            raise StoreError(
                f"store {self.uri} {found} that was to be created only if absent (If-None-Match: *), so two runs could "
                "write the same artifact: choose a store that honours it, with --store or VECTORCLM_STORE"
            )

    def create(self) -> None:
        """Make the bucket, or the folder, if it is not there. Raises StoreError where that fails."""
        if self.is_local:
            Path(self.root).mkdir(parents=True, exist_ok=True)
        else:
            with self._told(f"store {self.uri}"):
                self.fs.makedirs(self.root.lstrip("/").partition("/")[0], exist_ok=True)

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        """Write one small object; with `only_if_absent`, False where another writer wrote other bytes first."""
        path = self.path(key)
        if self.is_local:
            make_folder(Path(path).parent)
            return write_file(Path(path), data, only_if_absent=only_if_absent)
        with self._told(f"cannot write {self.uri_of(key)}"):
            try:
                self.fs.pipe_file(path, data, mode="create" if only_if_absent else "overwrite")
            except OSError as error:
                if not (only_if_absent and s3.refused_by_condition(error)):
                    raise
                # Where an answer was lost on its way, the request was repeated and found what it had written itself.
                return self.read(key) == data
        return True

    def read(self, key: str) -> bytes | None:
        """The object's bytes, or None where there is none."""
        try:
            with self._told(f"cannot read {self.uri_of(key)}"):  # in one request, without asking for the size first
                return bytes(self.fs.cat_file(self.path(key), **self._in_one))
        except FileNotFoundError:
            return None

    def list(self, key: str) -> list[str]:
        """Names directly below `key`, sorted; empty where there is nothing."""
        try:
            with self._told(f"cannot list {self.uri_of(key)}"):
                names = self.fs.ls(self.path(key).rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in names)

    def files(self, key: str) -> dict[str, StoredFile]:
        """All files at and below `key`, by their own keys; empty where there is nothing.

        Links to folders are not followed: each is listed like a file. `key` itself may be one.
        """
        if self.is_local:
            found = dict(_local_files(Path(self.path(key))))
        else:
            with self._told(f"cannot list {self.uri_of(key)}"):
                listed = self.fs.find(self.path(key).rstrip("/"), detail=True)
            found = {path: _stored(info) for path, info in listed.items()}
        return {path.removeprefix(f"{self.root}/"): found[path] for path in sorted(found)}

    def sha256(self, key: str) -> str | None:
        """The hash of a file's bytes as they are read from the store, or None where there is no such file."""
        try:
            with self._told(f"cannot read {self.uri_of(key)}"), self.fs.open(self.path(key), "rb", READ_BYTES) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    def delete(self, key: str) -> None:
        """Remove one object, if it is there."""
        with suppress(FileNotFoundError), self._told(f"cannot remove {self.uri_of(key)}"):
            self.fs.rm_file(self.path(key))

    def remove(self, key: str) -> None:
        """Remove `key` and all below it, if it is there."""
        with suppress(FileNotFoundError), self._told(f"cannot remove {self.uri_of(key)}"):
            self.fs.rm(self.path(key), recursive=True)
        # Of many objects at once, s3fs does not say which it could not remove.
        if not self.is_local and self.files(key):
            raise StoreError(f"{self.uri_of(key)} was removed, but some of it is still there: see who may delete in it")

    def _told(self, where: str) -> AbstractContextManager[None]:
        """Have the block's errors say what to change, where they are those of a remote store's client."""
        return nullcontext() if self.is_local else s3.told(where)

    def put(self, source: Path, key: str, sha256: str) -> None:
        """Move a file into the store, whole; to a remote one it goes until what is read back has this hash.

        In a local store its bytes are on the disk; its name is after `sync`.
        """
        target = self.path(key)
        if self.is_local:
            make_folder(Path(target).parent)
            move_file(source, Path(target))
            return
        for _ in range(TRIES):
            with self._told(f"cannot write {self.uri_of(key)}"):
                self.fs.put_file(str(source), target, **self._in_parts)
            if self.sha256(key) == sha256:
                return
        raise StoreError(f"{self.uri_of(key)} {GARBLED}")

    def sync(self, keys: Iterable[str]) -> None:
        """Flush the names of these files to the disk of a local store; a remote one has done so by itself."""
        if self.is_local:
            sync_folders((Path(self.path(key)) for key in keys), Path(self.root))

    def get(self, key: str, target: Path, sha256: str) -> str:
        """Fetch a file until it has this hash; returns the hash that it has. Raises FileNotFoundError."""
        for _ in range(TRIES):
            with self._told(f"cannot read {self.uri_of(key)}"), explained(str(target)):
                self.fs.get_file(self.path(key), str(target), **self._in_parts)
            if (found := sha256_of(target)) == sha256:
                break
        return found


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Say what to do where the block fails for lack of space."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, or a limit of the process
        if getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full):
            raise StoreError(f"no space left while writing {where}: free some, or choose another store") from error
        raise


def _local_files(root: Path) -> Iterator[tuple[str, StoredFile]]:
    """The files at and below a path, and the links to folders below it; what vanishes meanwhile is left out."""
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
    """A file as a remote store's listing tells it."""
    modified = _modified(info)
    return StoredFile(info["size"], modified, (info["size"], modified, str(info.get("ETag", ""))))


def _modified(info: Mapping[str, Any]) -> float:
    """When a listed object was written; file systems name it in their own ways."""
    known = (info.get(name) for name in ("LastModified", "mtime", "last_modified", "updated", "created"))
    when = next((value for value in known if value is not None), None)
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    return when.timestamp() if isinstance(when, datetime) else float(when if when is not None else time.time())


def sha256_of(path: Path) -> str:
    """The hash of a file on this machine."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
