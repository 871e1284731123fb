"""Work folders on this machine: one for each attempt at a stage, inside the folder of the stage's specification.

A process that was suspended and continues writes into its own folder, never into its successor's. The next attempt
removes the folders of dead attempts. Finished slices, which all attempts share, lie beside the attempts' folders.
"""

import json
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from vectorclm.runtime.processes import find_process, process_identity
from vectorclm.store.durable import temporary_beside
from vectorclm.store.lease import is_here, read_claim
from vectorclm.store.storage import explained

HOLDER = "holder.json"  # identifies the process of the attempt, until the attempt ends
ATTEMPT = re.compile(r"[0-9a-f]{16}")


@contextmanager
def attempt_folder(stage_folder: Path) -> Iterator[Path]:
    """A folder for one attempt, removed at its end; after a failure, the next attempt removes the folder."""
    if stage_folder.is_dir():
        for left in list(stage_folder.iterdir()):
            if ATTEMPT.fullmatch(left.name) and is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
    folder = stage_folder / secrets.token_hex(8)
    part = temporary_beside(folder)
    with explained(str(folder)):
        part.mkdir(parents=True)
        (part / HOLDER).write_text(
            json.dumps({"host": socket.gethostname(), **process_identity(psutil.Process())}), encoding="utf-8"
        )
        part.rename(folder)
    try:
        yield folder
    except BaseException:
        (folder / HOLDER).unlink(missing_ok=True)
        raise
    shutil.rmtree(folder)
    with suppress(OSError):  # other attempts work in the folder, or slices lie there
        stage_folder.rmdir()


def is_abandoned(folder: Path) -> bool:
    """Whether the attempt of this folder, or its process on this machine, has ended; False for other machines."""
    try:
        holder = read_claim((folder / HOLDER).read_bytes())
    except FileNotFoundError:
        return True
    return is_here(holder) and find_process(holder) is None


def is_in_use(stage_folder: Path) -> bool:
    """Whether a live process of this machine has an attempt in the folder, even a process that lost its lease."""
    try:
        attempts = [path for path in stage_folder.iterdir() if ATTEMPT.fullmatch(path.name)]
    except FileNotFoundError:  # its writer has just removed the folder
        return True
    holders = []
    for path in attempts:
        with suppress(FileNotFoundError):
            holders.append(read_claim((path / HOLDER).read_bytes()))
    return any(is_here(holder) and find_process(holder) is not None for holder in holders)
