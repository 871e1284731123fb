"""Identify a process so that a reused pid is not mistaken for it."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil


def process_identity(process: psutil.Process) -> dict[str, Any]:
    """What finds a process again, and no other that gets its number later, however the clock is set meanwhile."""
    return {"pid": process.pid, "started": _started(process), "pids": process_space()}


def find_process(known: Mapping[str, Any]) -> psutil.Process | None:
    """The process with this mark, or None where it is gone, or of another machine or container.

    A zombie is gone: it has ended, and only waits for a parent that may never ask.
    """
    with suppress(psutil.Error, KeyError):
        process = psutil.Process(known["pid"])
        if (known["started"], known["pids"]) == (_started(process), process_space()):
            return None if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else process
    return None


def _started(process: psutil.Process) -> float:
    """Seconds between the start of the machine and that of the process, to its hundredths, which are all there are."""
    while True:
        boot = psutil.boot_time()
        started = psutil.Process(process.pid).create_time()
        if psutil.boot_time() == boot:  # else the clock was set between the two
            return round(started - boot, 2)


def process_space() -> str:
    """What makes process numbers mean the same: the start of the machine, and the container on it."""
    with suppress(OSError):  # not on macOS, where there are no containers of this kind
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""
