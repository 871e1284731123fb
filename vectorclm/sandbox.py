"""Programs that a model wrote, each in a process of its own that can do little.

It has limits on time, memory and files, an empty folder, no environment and, where the system lets users make
namespaces, no network; Python refuses it to write, remove, start and connect. That keeps accidents in. Against a
program that means harm, run the evaluation in a container or a virtual machine.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile

SECONDS = 10
ENDED = b"ended"
NAMESPACES = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
# A program that leaves early, by sys.exit say, has not ended: the last line is never reached.
RUNNER = """
import os, resource, sys

# What it compares with is computed here, as the program may change what `os` says.
def refuse(event, args, writes=os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
    started = event.startswith(("socket.", "subprocess.", "shutil.", "ctypes.", "webbrowser.", "sqlite3."))
    changed = event.startswith("os.") and event not in ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
    if started or changed or event == "open" and args[2] & writes:
        raise PermissionError(event)

limits = {"AS": 1 << 30, "CPU": int(sys.argv[2]), "FSIZE": 0, "NOFILE": 32, "CORE": 0, "NPROC": 64}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
ended = int(sys.argv[1])
program = compile(sys.stdin.buffer.read(), "program", "exec")
sys.stdin.close()
sys.addaudithook(refuse)
exec(program, {"__name__": "__main__"})
os.write(ended, b"ended")
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program runs to its end, without an error and within `seconds`."""
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(prefix="vectorclm-sandbox-") as folder, os.fdopen(reading, "rb") as pipe:
        process = subprocess.Popen(
            [*_namespaces(), sys.executable, "-I", "-B", "-c", RUNNER, str(writing), str(int(seconds) + 1)],
            cwd=folder,
            env={"PATH": os.defpath},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        try:
            process.communicate(program.encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
        return pipe.read(len(ENDED)) == ENDED


@functools.cache
def _namespaces() -> tuple[str, ...]:
    """The command that takes the network away, where the system has it and allows it."""
    try:
        done = subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return NAMESPACES if done.returncode == 0 else ()
