"""Hostile files, one function each: it writes its file and hands it to the loader that the commands use.

`python -m tests.formats.hostile FOLDER` prints what became of each, as a table.
"""

import os
import resource
import select
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.formats import hostile_data, hostile_models, hostile_stores
from tests.formats.samples import CASES
from vectorclm.errors import VectorCLMError

assert hostile_data and hostile_models and hostile_stores  # each adds its cases
MEMORY, SECONDS = 2 * 2**30, 20.0  # of one case, beyond what the libraries take


def outcome(name: str, folder: Path) -> tuple[str, float]:
    """What becomes of a case in a child with its limits: `typed …`, `value …`, `untyped …` or how it ended; seconds."""
    read, write = os.pipe()
    began = time.monotonic()
    if (child := os.fork()) == 0:
        os.setpgid(0, 0)
        os.dup2(write, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        said = "ended"
        try:
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            said = f"value {CASES[name](folder)!r:.60}"
        except VectorCLMError as error:
            said = f"typed {type(error).__name__}: {error}"
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            said = f"untyped {kinds[0]}: {error!r:.80}"
            if "Refusal" in kinds:
                said = f"typed Refusal: {error}"
        os.write(1, said.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(write)
    said, whole = b"", False
    while not whole and (left := SECONDS - (time.monotonic() - began)) > 0:
        if select.select([read], [], [], left)[0]:
            whole = not (part := os.read(read, 4096))
            said += part
    seconds = time.monotonic() - began
    if not whole:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(read)
    if not whole:
        return "hangs", seconds
    if os.WIFSIGNALED(status):
        return f"dies by signal {os.WTERMSIG(status)}", seconds
    return said.decode(), seconds


def main() -> None:
    """Print the table of all cases, or of those named after the folder."""
    root = Path(sys.argv[1])
    for name in sys.argv[2:] or CASES:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        said, seconds = outcome(name, root)
        sys.stdout.write(f"{name} | {seconds:.1f} s | {said[:150]!r}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
