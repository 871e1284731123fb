"""Process identity that survives pid reuse (pid, start time, machine, container), and processes that end together."""

import platform
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

# The same as `setpriv --pdeathsig TERM`, for systems without it: SIGTERM when the parent dies (prctl 1).
PDEATHSIG = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"


def process_identity(process: psutil.Process) -> dict[str, Any]:
    """The identity of a process, which no later process with the same pid has, however the clock is set."""
    return {"pid": process.pid, "started": _started(process), "pids": process_space()}


def find_process(known: Mapping[str, Any]) -> psutil.Process | None:
    """The live process with this identity; None where it has ended, or belongs to another machine or container.

    A zombie has ended, and only waits for a parent that may never collect its exit code.
    """
    with suppress(psutil.Error, KeyError):
        process = psutil.Process(known["pid"])
        if (known["started"], known["pids"]) == (_started(process), process_space()):
            return None if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else process
    return None


def has_ended(known: Mapping[str, Any]) -> bool:
    """Whether a process of this machine has ended, also by a restart; False where that is not known.

    `known` is its identity, with the `machine` on which it ran.
    """
    if "pids" not in known or known.get("machine") != machine():
        return False  # it ran elsewhere
    (boot, _, container), (now, _, mine) = (str(space).partition(" ") for space in (known["pids"], process_space()))
    return boot != now or (container == mine and find_process(known) is None)


def machine() -> str:
    """The name and id of this machine, which outlive a restart."""
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/etc/machine-id').read_text(encoding='ascii').strip()}"
    return socket.gethostname()


def _started(process: psutil.Process) -> float:
    """Seconds from the machine's start to the process's start, in hundredths, the resolution of the system."""
    while True:
        boot = psutil.boot_time()
        started = psutil.Process(process.pid).create_time()
        if psutil.boot_time() == boot:  # otherwise the clock was set between the two reads
            return round(started - boot, 2)


def process_space() -> str:
    """The namespace in which a pid is unique: the machine's boot id and the container's pid namespace."""
    with suppress(OSError):  # macOS has neither file, and no containers of this kind
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def dying_with_parent(command: Sequence[str]) -> list[str]:
    """Wrap `command` so that it gets SIGTERM when the thread that started it dies, even by `kill -9` (on Linux)."""
    if shutil.which("setpriv"):
        return ["setpriv", "--pdeathsig", "TERM", *command]
    if platform.system() == "Linux":
        return [sys.executable, "-c", PDEATHSIG, *command]
    return list(command)
