"""Atomic and durable files: temporary names, fsync of files and folders, write by rename or by exclusive link.

After a power loss a file system may keep a name without its bytes, or the bytes without the name. A file is
therefore synced before it gets its final name, and its folder afterwards.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vectorclm.errors import StoreError

OWN = ".vectorclm-"  # the beginning of the name of every hidden file and folder of this product
TEMPORARY = f"{OWN}tmp-"  # of the temporary ones
LOCK_SECONDS = 10.0  # to wait for a lock that is held for milliseconds
TEMPORARY_NAME = re.compile(rf"{re.escape(TEMPORARY)}[0-9a-z_]{{8,16}}")  # `tempfile` uses its own alphabet
UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)  # errors of file systems that cannot sync a folder


def temporary_beside(path: Path) -> Path:
    """A new temporary name in the folder of `path`, which `is_temporary` recognises."""
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A new temporary name in the folder of `path`, removed after the block.

    Where the disk fails, the error of the block is raised, not that of the removal.
    """
    part = temporary_beside(path)
    try:
        yield part
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether this is the name of a temporary file or folder of this product."""
    return TEMPORARY_NAME.fullmatch(name) is not None


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk (fsync), where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise
    finally:
        os.close(descriptor)


def sync_folders(paths: Iterable[Path], root: Path) -> None:
    """Flush the folders of these files, and their parents up to `root`, to the disk, the deepest first."""
    folders = {folder for path in paths for folder in path.parents if folder.is_relative_to(root)}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        sync_folder(folder)


def sync_tree(root: Path) -> None:
    """Flush all files and folders at and below `root` to the disk."""
    for place, _, names in os.walk(root, topdown=False):
        for name in names:
            sync_file(Path(place, name))
        sync_folder(Path(place))


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, durably (fsync)."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def move_file(source: Path, target: Path) -> None:
    """Rename or copy a file to `target`, after an fsync of its bytes. The caller syncs the folder.

    A caller that moves many files can thus sync their folders once.
    """
    sync_file(source)
    try:
        source.replace(target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    with temporary_file(target) as part:
        shutil.copyfile(source, part)
        sync_file(part)
        part.replace(target)
    source.unlink()


def write_file(path: Path, data: bytes, *, only_if_absent: bool = False) -> bool:
    """Write a file atomically and durably: a temporary file, fsync, then a rename.

    With `only_if_absent`, an exclusive link replaces the rename; returns False where the name exists.
    """
    try:
        with temporary_file(path) as part:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                _sync(file.fileno())
            if only_if_absent:
                os.link(part, path)
            else:
                part.replace(path)
    except FileExistsError:
        return False
    sync_folder(path.parent)
    return True


@contextmanager
def exclusive(file: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold a lock on a file (flock); the system releases the lock when its holder ends. NFS has its own locking.

    Raises StoreError where another process holds the lock for longer than `seconds`: a suspended process.
    """
    make_folder(file.parent)
    with file.open("ab") as opened:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"a suspended process holds the lock {file}: resume that process, or end it"
                    ) from None
                time.sleep(0.01)
        yield


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":  # fsync leaves the bytes in the drive's cache there
        with suppress(OSError):  # not every file system can
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
