"""Work folders on this machine: one of each attempt at a stage, below the folder of the stage's plan.

A process that stood still and continues writes into its own, never into its successor's. Those of dead attempts are
removed by the next one; what they finished for all, as slices, lies beside them.
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

HOLDER = "holder.json"  # whose attempt it is, until it ends
ATTEMPT = re.compile(r"[0-9a-f]{16}")


@contextmanager
def attempt_folder(plan_folder: Path) -> Iterator[Path]:
    """A folder for one attempt, removed at its end; where the attempt fails, the next one removes it."""
    if plan_folder.is_dir():
        for left in list(plan_folder.iterdir()):
            if ATTEMPT.fullmatch(left.name) and is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
    folder = plan_folder / secrets.token_hex(8)
    part = temporary_beside(folder)
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
    with suppress(OSError):  # others work in it, or left something
        plan_folder.rmdir()


def is_abandoned(folder: Path) -> bool:
    """Whether the attempt of this folder has ended, or its process on this machine has; elsewhere, who knows."""
    try:
        holder = read_claim((folder / HOLDER).read_bytes())
    except FileNotFoundError:
        return True
    return is_here(holder) and find_process(holder) is None


def is_in_use(plan_folder: Path) -> bool:
    """Whether a live process of this machine has an attempt in a plan's folder, even one that lost its lease."""
    attempts = [path for path in plan_folder.iterdir() if ATTEMPT.fullmatch(path.name)]
    holders = [read_claim((path / HOLDER).read_bytes()) for path in attempts if (path / HOLDER).is_file()]
    return any(is_here(holder) and find_process(holder) is not None for holder in holders)
