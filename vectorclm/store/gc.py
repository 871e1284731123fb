"""Garbage collection of a store: leftovers of killed processes, which no manifest references.

An artifact with a readable manifest is never garbage; checkpoints of a finished training are. Garbage must be older
than a limit, and is removed only while this process holds the lease on the artifact, so that no other process can be
writing it. On a full disk, which takes no lease, the lock of a local store stands in. Only the store's own folders are
searched, only names that this product creates are removed, and no link is followed: foreign files in the store's
folder stay.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from vectorclm.errors import ConfigError, DiskFullError, InUseError, StoreError
from vectorclm.store import s3
from vectorclm.store.artifact import Artifact, Store
from vectorclm.store.durable import OWN, is_temporary
from vectorclm.store.layout import CURVES, TRAINED
from vectorclm.store.lease import LEASE_SECONDS, read_claim, watched
from vectorclm.store.listing import (
    FINGERPRINT,
    LEASE,
    STAGE_FOLDERS,
    Claim,
    Folder,
    Inventory,
    read_folder,
    take_inventory,
)
from vectorclm.store.storage import StoredFile
from vectorclm.store.uploads import superseded
from vectorclm.store.work import is_in_use

logger = logging.getLogger(__name__)
OLDER_THAN = "7d"
YOUNG_SECONDS = LEASE_SECONDS  # a younger file may belong to a writer without a lease yet: it always stays
CLOCK_SECONDS = 2.0  # a file system may keep whole seconds
GIVEN_BACK_SECONDS = 86_400  # younger empty leases stay: a process may acquire them again
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
WRITTEN = (*STAGE_FOLDERS, "checkpoints", "leases", "reports", CURVES)  # folders that this product writes to
OWNED = re.compile(rf"({'|'.join(STAGE_FOLDERS)}|checkpoints)/{FINGERPRINT.pattern}/")  # keys that a lease protects
WORK = re.compile(rf"({'|'.join(STAGE_FOLDERS)})-[0-9a-f]{{16}}")
EARLIER = re.compile(r"\..+\.[0-9a-f]{8}")  # temporary files of earlier versions
EARLIER_PROBE = re.compile(r"\.probe-[0-9a-f]{8}")
EARLIER_NOTE = re.compile(r"\..+-[0-9]{5}\.json")  # notes of early uploads by earlier versions


@dataclass(frozen=True)
class Garbage:
    """A leftover that can be removed."""

    what: str  # the key in the store, or the path on this machine
    why: str
    bytes: int
    modified: float  # time of the last write, in seconds since 1970
    leases: Sequence[str]  # leases to hold during the removal
    remove: Callable[[], object]

    def as_json(self) -> dict[str, Any]:
        """The item as `store gc --json` prints it."""
        return {"what": self.what, "why": self.why, "bytes": self.bytes, "modified": round(self.modified)}


def seconds(age: str) -> float:
    """Parse an age such as `7d`, `12h`, `30m` or `0s` into seconds. Raises ConfigError for any other text."""
    if (matched := re.fullmatch(r"(\d{1,6})([smhdw])", age.strip())) is None:
        raise ConfigError(f"--older-than {age}: give a number and s, m, h, d or w, such as {OLDER_THAN}")
    return timedelta(**{UNITS[matched[2]]: int(matched[1])}).total_seconds()


def find_garbage(store: Store, older_than: float) -> list[Garbage]:
    """Leftovers without a manifest or a live holder, and not written to in the last `older_than` seconds."""
    ahead = _clock_difference(store)
    inventory, limit = take_inventory(store, sure=True), time.time() - max(older_than, YOUNG_SECONDS)
    held = {Path(claim.key).stem for claim in inventory.leases if claim.alive}
    stored = [*_folders(store, inventory), *_files(store, held), *_uploads(store)]
    leases = _leases(store, inventory, time.time() + ahead)
    found = [
        *(replace(item, modified=item.modified - ahead) for item in stored),
        *_work(store),  # by this machine's clock
        # Last: on a full disk, a lease can be written once the others are gone.
        *(replace(item, modified=item.modified - ahead) for item in leases),
    ]
    return [item for item in found if item.modified <= limit and not held.intersection(item.leases)]


def _clock_difference(store: Store) -> float:
    """By how many seconds the store's clock is ahead of this machine's; 0 where they agree but for CLOCK_SECONDS.

    The times of stored files are the store's. Where nothing can be written, as on a full disk, the clocks count as
    equal.
    """
    try:
        key = store.write_probe()
        (file,) = store.files(key).values()
        store.delete(key)
    except (OSError, StoreError, ValueError):
        return 0.0
    ahead = file.modified - time.time()
    return ahead if abs(ahead) > CLOCK_SECONDS else 0.0


def remove_garbage(store: Store, item: Garbage) -> bool:
    """Remove one item while holding its leases; False where another process has begun to use it."""
    try:
        with _claimed(store, item):
            item.remove()
    except (InUseError, FileNotFoundError):  # the latter where another process removed it
        return False
    except OSError as error:
        raise StoreError(f"{item.what} cannot be removed: {error.strerror or error}") from error
    return True


@contextmanager
def _claimed(store: Store, item: Garbage) -> Iterator[None]:
    """Hold the leases of an item while the block runs; on a full disk, the lock of a local store instead.

    A writer needs a lease of its own before it writes, which the full disk refuses as well, and the removal checks that
    nothing has changed. Raises InUseError where another process holds a lease.
    """
    with ExitStack() as stack:
        try:
            for key in item.leases:
                stack.enter_context(store.lease(key))
        except DiskFullError:
            if not store.is_local:
                raise
            stack.close()
            stack.enter_context(store.locked())
            if watched(store, [f"leases/{key}.json" for key in item.leases]):
                raise InUseError(f"{item.what} is in use") from None
            logger.warning("the disk takes no lease, so %s is removed under the lock of the store", item.what)
        yield


def discard_folder(store: Store, folder: Folder) -> bool:
    """Withdraw the manifest of a damaged artifact or checkpoint under its leases; False where it is in use."""
    with ExitStack() as stack:
        try:
            for key in owners(folder.key):
                stack.enter_context(store.lease(key))
        except InUseError:
            return False
        stage, fingerprint = folder.key.rsplit("/", 1)
        store.discard(stage, fingerprint, folder.artifact.manifest if folder.artifact else None)
    return True


def _folders(store: Store, inventory: Inventory) -> Iterator[Garbage]:
    finished = {folder.fingerprint for folder in inventory.artifacts if folder.state == "finished"}
    for folder in (*inventory.artifacts, *inventory.checkpoints):
        if folder.artifact is not None:
            yield from _superseded(store, folder.artifact, folder)
        if folder.state == "unfinished":
            why = "has no manifest"
        elif folder.key.startswith("checkpoints/") and folder.fingerprint in finished:
            why = "checkpoint of a finished training"
        else:
            continue
        if is_linked(store, folder.key) or _holds_foreign(folder):
            continue
        remove = partial(_remove_folder, store, folder)
        yield Garbage(folder.key, why, folder.bytes, folder.modified, owners(folder.key), remove)


def _superseded(store: Store, artifact: Artifact, folder: Folder) -> Iterator[Garbage]:
    """Files of attempts at an artifact's address that its manifest does not name; remote stores only."""
    if not store.is_local:
        files = {f"{folder.key}/{name}": file for name, file in folder.files.items()}
        for key in superseded(artifact, files):
            why, file = "file of an attempt that another replaced", files[key]
            yield Garbage(key, why, file.bytes, file.modified, owners(key), partial(store.delete, key))


def owners(key: str) -> list[str]:
    """The leases of this key; a writer holds one of them."""
    stage, fingerprint, *_ = key.split("/")
    return [f"{each}-{fingerprint[:16]}" for each in (TRAINED if stage == "checkpoints" else [stage])]


def _remove_folder(store: Store, seen: Folder) -> None:
    """Remove a folder that has not changed since the inventory. Raises InUseError where it has."""
    below = {key.removeprefix(f"{seen.key}/"): file for key, file in store.files(seen.key).items()}
    if is_linked(store, seen.key) or below != seen.files or read_folder(store, seen.key, below).state != seen.state:
        raise InUseError(f"{store.uri_of(seen.key)} was written to")
    store.remove(seen.key)


def is_linked(store: Store, key: str) -> bool:
    """Whether the path to `key` in a local store contains a link, which may lead out of the store."""
    parts = PurePosixPath(key).parts
    places = [Path(store.root, *parts[: count + 1]) for count in range(len(parts))]
    return store.is_local and any(place.is_symlink() for place in places)


def _holds_foreign(folder: Folder) -> bool:
    """Whether the folder contains hidden files of other programs, such as `.git` or `.env`."""
    hidden = {part for name in folder.files for part in name.split("/") if part.startswith(".")}
    return not all(name.startswith(OWN) or EARLIER.fullmatch(name) or EARLIER_NOTE.fullmatch(name) for name in hidden)


def _files(store: Store, held: Collection[str]) -> Iterator[Garbage]:
    """Probes of the store, and temporary files of writers in a local store."""
    found: dict[str, dict[str, StoredFile]] = {}
    for name in store.list(""):
        if is_temporary(name) or EARLIER_PROBE.fullmatch(name):
            found[name] = store.files(name)
        elif store.is_local and name in WRITTEN and not is_linked(store, name):
            for key, file in store.files(name).items():
                if (temporary := _temporary(key)) is not None:
                    found.setdefault(temporary, {})[key] = file
    for key, files in found.items():
        why = "temporary file of a writer" if "/" in key else "probe of whether the store can be written"
        if any(name.startswith(f"{key.partition('/')[0]}-") for name in held):
            continue  # an artifact of this stage is being published
        size = sum(file.bytes for file in files.values())
        modified = max((file.modified for file in files.values()), default=time.time())
        if store.is_local and key not in files:  # a file that was moved into the folder may be old
            with suppress(FileNotFoundError):
                modified = max(modified, Path(store.path(key)).lstat().st_mtime)
        remove = partial(store.delete if key in files else store.remove, key)
        yield Garbage(key, why, size, modified, owners(key) if OWNED.match(key) else [], remove)


def _temporary(key: str) -> str | None:
    """The key of the temporary file or folder that contains `key`; None where there is none."""
    parts = PurePosixPath(key).parts
    for count, name in enumerate(parts, 1):
        earlier = EARLIER.fullmatch(name) and count == len(parts) and (OWNED.match(key) or parts[0] == "leases")
        if count > 1 and (is_temporary(name) or earlier):
            return "/".join(parts[:count])
    return None


def _leases(store: Store, inventory: Inventory, now: float) -> Iterator[Garbage]:
    for claim in inventory.leases:
        if not claim.alive:  # acquiring and releasing the lease removes it
            why, leases = "lease of a process that has ended", [Path(claim.key).stem]
            remove = partial(_remove_claim, store, claim)
            yield Garbage(claim.key, why, claim.bytes, claim.modified, leases, remove)
    for key, file in store.files("leases").items() if store.is_s3 else ():
        if LEASE.fullmatch(key) and not file.bytes and file.modified < now - GIVEN_BACK_SECONDS:
            yield Garbage(key, "lease that was given back", 0, file.modified, [], partial(_remove_empty, store, key))


def _remove_claim(store: Store, seen: Claim) -> None:
    """Remove a lease that is still the one seen: only without a lease of one's own, which has replaced it."""
    if read_claim(store.read(seen.key) or b"") == seen.holder:
        store.delete(seen.key)


def _remove_empty(store: Store, key: str) -> None:
    """Remove an empty object. Raises InUseError where it is not empty."""
    if store.read(key):
        raise InUseError(f"{store.uri_of(key)} was written to")
    store.delete(key)


def _work(store: Store) -> Iterator[Garbage]:
    """Work folders of killed processes on this machine."""
    root = store.work_root(None)
    for folder in sorted(root.iterdir()) if root.is_dir() and not root.is_symlink() else []:
        if WORK.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink() and not is_in_use(folder):
            size, modified = 0, 0.0
            for place, _, names in os.walk(folder):
                for path in (Path(place), *(Path(place, name) for name in names)):
                    with suppress(FileNotFoundError):  # another process works there
                        size, modified = size + path.lstat().st_size, max(modified, path.lstat().st_mtime)
            remove = partial(_remove_work, folder)
            yield Garbage(str(folder), "work that nobody goes on with", size, modified, [folder.name], remove)


def _remove_work(folder: Path) -> None:
    """Remove a work folder. Raises InUseError where a process of this machine works there."""
    if is_in_use(folder):
        raise InUseError(f"{folder} is in use")
    shutil.rmtree(folder)


def _uploads(store: Store) -> Iterator[Garbage]:
    """Multipart uploads in S3 that were neither completed nor aborted, and that no listing shows."""
    if not hasattr(store.fs, "list_multipart_uploads"):
        return
    bucket = store.root.partition("/")[0]
    try:
        with s3.translate_errors(f"unfinished uploads to {store.uri} cannot be listed, so they stay"):
            listed = store.fs.list_multipart_uploads(bucket)
    except StoreError as error:  # some servers lack this request, some keys lack the right
        logger.warning("%s", error)
        return
    for upload in listed:
        path, begun = f"{bucket}/{upload['Key']}", upload["Initiated"].timestamp()
        key, named = path.removeprefix(f"{store.root}/"), {"Key": upload["Key"], "UploadId": upload["UploadId"]}
        if path.startswith(f"{store.root}/") and key.partition("/")[0] in WRITTEN:
            abort = partial(store.fs.call_s3, "abort_multipart_upload", Bucket=bucket, **named)
            yield Garbage(key, "upload never completed", 0, begun, owners(key) if OWNED.match(key) else [], abort)
