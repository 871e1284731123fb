"""Publication of a finished folder in a store: atomic, once, and never over another writer's publication.

A writer may be suspended between its last check and its write, and find a successor's work afterwards. Its write must
not touch the successor's files, so nothing here relies on a check before a write:

- A local store: files and manifest go into a folder with a unique name, which is then renamed. A rename fails where the
  target is a folder that is not empty. A target without a manifest, left by an earlier version or discarded, is moved
  away first, only under the store's lock, so that no finished folder is ever moved.
- A remote store has no rename: each file is created under its name only if the name is absent. Where the name has the
  same bytes already, they are used; where it has other bytes, the file goes to a unique name, and the manifest records
  the place (`place`). No object is replaced, so the bytes behind a manifest never change. The manifest is created only
  if absent, after all files.

The second writer gets False, and the first publication stays. A removal touches only names that no other process can
use: temporary names, a writer's own names, and names of checkpoints, which have random parts.
"""

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

from vectorclm.errors import StoreError
from vectorclm.store.durable import make_folder, move_file, sync_folder, sync_folders, temporary_beside, write_file
from vectorclm.store.manifest import MANIFEST
from vectorclm.store.storage import GARBLED, TRIES, Storage

OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


def publish_locally(store: Storage, key: str, directory: Path, names: Sequence[str], manifest: bytes) -> bool:
    """Publish these files of a directory in a local store, with a manifest, by one rename.

    Returns False where there is a folder with a manifest already.
    """
    final = Path(store.path(key))
    make_folder(final.parent)
    attempt = temporary_beside(final)
    attempt.mkdir(parents=True)
    try:
        targets = [attempt / name for name in names]
        for name, target in zip(names, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            move_file(directory / name, target)
        write_file(attempt / MANIFEST, manifest)
        if (attempt / MANIFEST).read_bytes() != manifest:
            raise StoreError(f"{store.uri_of(key)} {GARBLED}")
        sync_folders([*targets, attempt / MANIFEST], attempt)
        for _ in range(TRIES):
            try:
                attempt.rename(final)
            except OSError as error:
                if error.errno not in OCCUPIED:
                    raise
                if not move_away(store, key):
                    return False
                continue
            sync_folder(final.parent)
            return True
        raise StoreError(
            f"{store.uri_of(key)} is written to by another program again and again: find and stop that program"
        )
    finally:
        shutil.rmtree(attempt, ignore_errors=True)


def move_away(store: Storage, key: str) -> bool:
    """Remove a folder of a local store that has no manifest. With a manifest: False, and nothing changes."""
    folder = Path(store.path(key))
    aside = temporary_beside(folder)
    with store.locked():
        if (folder / MANIFEST).exists():
            return False
        try:
            folder.rename(aside)
        except FileNotFoundError:
            return True
        if (aside / MANIFEST).exists():  # another process published a folder since the check above
            aside.rename(folder)
            return False
    shutil.rmtree(aside)
    return True


def commit(store: Storage, key: str, manifest: bytes) -> bool:
    """Create a manifest in a remote store, and verify its bytes there. False where another manifest exists."""
    for _ in range(TRIES):
        if not store.write(key, manifest, only_if_absent=True) and not store.replace(key, b"", manifest):
            return False  # an empty manifest was withdrawn
        if manifest in (found := (store.read(key), store.read(key))):
            return True
        if found[-1] is not None:
            store.withdraw(key, found[-1])
    raise StoreError(f"{store.uri_of(key)} {GARBLED}")
