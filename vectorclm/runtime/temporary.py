"""Temporary folders of this product, which a later process removes where their owner was killed."""

import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from vectorclm.runtime.processes import has_ended, machine, process_identity

PREFIX = "vectorclm-"
OWNER = "owner.json"  # the identity of the process that uses the folder
FILES = "files"  # what it writes
CREATED = re.compile(rf"{PREFIX}(?:.+-)?[a-z0-9_]{{8}}")  # as `mkdtemp` names a folder
EMPTY_SECONDS = 3600  # after which an empty folder has lost its owner, who writes its identity at once


@contextmanager
def temporary_folder(purpose: str = "", place: Path | None = None) -> Iterator[Path]:
    """A new folder in TMPDIR or `place`, removed after the block; after a SIGKILL, by the next call for this place."""
    remove_abandoned(place)
    # Another process may still write into it, as a rank that ends later does: then the next call removes the rest.
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{purpose}", dir=place, ignore_cleanup_errors=True) as name:
        owner = {**process_identity(psutil.Process()), "machine": machine()}
        Path(name, OWNER).write_text(json.dumps(owner), encoding="utf-8")
        files = Path(name, FILES)
        files.mkdir()
        yield files


def remove_abandoned(place: Path | None = None) -> int:
    """Remove this user's temporary folders whose owner on this machine has ended; returns their number."""
    removed = 0
    for folder in (place or Path(tempfile.gettempdir())).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another process removes it, too
            if _is_abandoned(folder):
                if (folder / OWNER).is_file():
                    shutil.rmtree(folder / FILES, ignore_errors=True)  # before the identity, in case of a kill here
                    shutil.rmtree(folder)
                else:
                    folder.rmdir()  # a file that was written there meanwhile stays
                removed += 1
    return removed


def _is_abandoned(folder: Path) -> bool:
    """Whether a folder is this user's and its owner has ended; False where that is not known. Follows no link."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    if not (owner := folder / OWNER).is_file():  # perhaps a folder that the user created
        private = stat.S_IMODE(found.st_mode) == 0o700 and CREATED.fullmatch(folder.name) is not None
        return private and found.st_mtime < time.time() - EMPTY_SECONDS and not any(folder.iterdir())
    with suppress(ValueError, TypeError, AttributeError):
        return has_ended(json.loads(owner.read_text(encoding="utf-8")))
    return False
