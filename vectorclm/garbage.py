"""What a store keeps for nothing: leftovers of processes that were killed, which no manifest reaches.

Nothing with a readable manifest is garbage, except the checkpoints of a training that is finished. Everything else must
be older than a limit, and is removed only while this process itself holds the lease on what it belongs to, so that
nobody can be writing it.
"""

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from vectorclm import s3
from vectorclm.artifact import Store
from vectorclm.errors import ConfigError, InUseError, StoreError
from vectorclm.inventory import BESIDE, Folder, Inventory, read_folder, take_inventory
from vectorclm.storage import PROBE

logger = logging.getLogger(__name__)
OLDER_THAN = "7d"
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
TRAINED = ("pretrain", "finetune")  # the stages that have checkpoints, which do not say of which they are


@dataclass(frozen=True)
class Garbage:
    """Something that can go."""

    what: str  # its key in the store, or its path on this machine
    why: str
    bytes: int
    modified: float  # when it was last written, in seconds since 1970
    leases: Sequence[str]  # to hold while it is removed
    remove: Callable[[], object]

    def as_json(self) -> dict[str, Any]:
        """For `store gc --json`."""
        return {"what": self.what, "why": self.why, "bytes": self.bytes, "modified": round(self.modified)}


def seconds(age: str) -> float:
    """An age such as `7d`, `12h`, `30m` or `0s`. Raises ConfigError for any other text."""
    if (matched := re.fullmatch(r"(\d{1,6})([smhdw])", age.strip())) is None:
        raise ConfigError(f"--older-than {age}: give a number and s, m, h, d or w, such as {OLDER_THAN}")
    return timedelta(**{UNITS[matched[2]]: int(matched[1])}).total_seconds()


def find_garbage(store: Store, older_than: float) -> list[Garbage]:
    """What no manifest reaches, no live process holds, and nobody wrote to in the last `older_than` seconds."""
    inventory, limit = take_inventory(store), time.time() - older_than
    held = {Path(claim.key).stem for claim in inventory.leases if claim.alive}
    found = [*_folders(store, inventory), *_files(store), *_leases(store, inventory), *_work(store), *_uploads(store)]
    return [item for item in found if item.modified <= limit and not held.intersection(item.leases)]


def remove_garbage(store: Store, item: Garbage) -> bool:
    """Remove one item, while holding its leases; False where somebody began to use it since it was found."""
    with ExitStack() as stack:
        try:
            for name in item.leases:
                stack.enter_context(store.lease(name))
            item.remove()
        except InUseError:
            return False
    return True


def _folders(store: Store, inventory: Inventory) -> Iterator[Garbage]:
    finished = {folder.fingerprint for folder in inventory.artifacts if folder.artifact}
    for folder in (*inventory.artifacts, *inventory.checkpoints):
        if folder.state == "unfinished":
            why = "has no manifest"
        elif folder.key.startswith("checkpoints/") and folder.fingerprint in finished:
            why = "checkpoint of a finished training"
        else:
            continue
        remove = partial(_remove_folder, store, folder)
        yield Garbage(folder.key, why, folder.bytes, folder.modified, _owners(folder.key), remove)


def _owners(key: str) -> list[str]:
    """The leases that a writer of this key holds one of."""
    stage, fingerprint, *_ = key.split("/")
    return [f"{each}-{fingerprint[:16]}" for each in (TRAINED if stage == "checkpoints" else [stage])]


def _remove_folder(store: Store, seen: Folder) -> None:
    """Remove a folder that is as it was when it was seen. Raises InUseError where somebody wrote to it since then."""
    below = {key.removeprefix(f"{seen.key}/"): file for key, file in store.files(seen.key).items()}
    if below != seen.files or read_folder(store, seen.key, below).state != seen.state:
        raise InUseError(f"{store.uri_of(seen.key)} was written to")
    store.remove(seen.key)


def _files(store: Store) -> Iterator[Garbage]:
    """Probes, and in a local store the temporary files of writers."""
    for name in store.list(""):
        if name.startswith(PROBE):
            why, leases = "probe of whether the store can be written", False
        elif store.is_local and not name.startswith(".") and name not in BESIDE - {"leases", "checkpoints"}:
            why, leases = "temporary file of a writer", name != "leases"
        else:
            continue
        for key, file in store.files(name).items():
            if key.rpartition("/")[2].startswith("."):
                owners = _owners(key) if leases and key.count("/") > 1 else []
                yield Garbage(key, why, file.bytes, file.modified, owners, partial(store.delete, key))


def _leases(store: Store, inventory: Inventory) -> Iterator[Garbage]:
    for claim in inventory.leases:
        if not claim.alive:
            why, leases = "lease of a process that has ended", [Path(claim.key).stem]
            yield Garbage(claim.key, why, claim.bytes, claim.modified, leases, partial(store.delete, claim.key))


def _work(store: Store) -> Iterator[Garbage]:
    """On this machine: the folders in which killed processes worked."""
    root = store.work_root(None)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []:
        stats = [path.lstat() for path in (folder, *folder.rglob("*"))]
        size, modified = sum(stat.st_size for stat in stats), max(stat.st_mtime for stat in stats)
        why, remove = "work that nobody goes on with", partial(shutil.rmtree, folder)
        yield Garbage(str(folder), why, size, modified, [folder.name], remove)


def _uploads(store: Store) -> Iterator[Garbage]:
    """In S3: uploads in parts that were begun and neither completed nor given up, which no listing shows."""
    if not hasattr(store.fs, "list_multipart_uploads"):
        return
    bucket = store.root.partition("/")[0]
    try:
        with s3.told(f"unfinished uploads to {store.uri} cannot be listed, and stay"):
            listed = store.fs.list_multipart_uploads(bucket)
    except StoreError as error:  # not every server knows them, nor may every key see them
        logger.warning("%s", error)
        return
    for upload in listed:
        path, begun = f"{bucket}/{upload['Key']}", upload["Initiated"].timestamp()
        if path.startswith(f"{store.root}/"):
            key, named = path.removeprefix(f"{store.root}/"), {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            abort = partial(store.fs.call_s3, "abort_multipart_upload", Bucket=bucket, **named)
            yield Garbage(key, "upload never completed", 0, begun, _owners(key) if "/" in key else [], abort)
