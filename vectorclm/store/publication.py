"""How a finished folder becomes visible in a store: whole, once, and never over what another writer published.

A writer that stood still between its last look and its write finds that its work has a successor. Whatever it does
then must not touch what the successor made, so nothing here relies on a look:

- A local store: files and manifest are brought into a folder of a name of their own, which is then renamed. A rename
  fails where the name has a folder with anything in it. What lies there without a manifest, left by an earlier version
  or given up, is moved away before, and only under the store's lock, so that no finished folder is ever moved.
- A remote store, which has no rename: each file is created under its name only if that is absent. Where the name has
  the same bytes already, they are taken; where it has others, the file goes to a name of its own, and the manifest says
  where (`place`). No object is replaced, so the bytes behind a manifest stay what they were. The manifest is created
  only if absent, after all files.

Whoever comes second gets False, and what was there stands. A removal touches only names that nobody else can have
got meanwhile: temporary ones, a writer's own, and those of checkpoints, which have random parts.
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
    """Move these files of a directory into a local store, with a manifest, by one rename.

    False where there is a folder with a manifest already.
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
        raise StoreError(f"{store.uri_of(key)} is written to by something else again and again: find out what it is")
    finally:
        shutil.rmtree(attempt, ignore_errors=True)


def move_away(store: Storage, key: str) -> bool:
    """Remove a folder of a local store that has no manifest. False, and nothing is changed, where it has one."""
    folder = Path(store.path(key))
    aside = temporary_beside(folder)
    with store.locked():
        if (folder / MANIFEST).exists():
            return False
        try:
            folder.rename(aside)
        except FileNotFoundError:
            return True
        if (aside / MANIFEST).exists():  # it was removed, and another published, since the line before
            aside.rename(folder)
            return False
    shutil.rmtree(aside)
    return True


def commit(store: Storage, key: str, manifest: bytes) -> bool:
    """Create a manifest in a remote store, and see that it arrived as it is. False where there is another one."""
    for _ in range(TRIES):
        if not store.write(key, manifest, only_if_absent=True) and not store.replace(key, b"", manifest):
            return False  # an empty one is one that was given up
        if manifest in (found := (store.read(key), store.read(key))):
            return True
        if found[-1] is not None:
            store.withdraw(key, found[-1])
    raise StoreError(f"{store.uri_of(key)} {GARBLED}")
