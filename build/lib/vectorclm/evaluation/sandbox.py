"""Programs that a model wrote, and the tests that judge them, each in a sandbox of its own.

The sandbox is bubblewrap's: namespaces of users, mounts, processes, network and IPC, a read-only root that shows the
interpreter and its libraries alone, no privileges, and a seccomp filter where libseccomp is installed. The tests' side
is trusted and alone knows what is expected, so no program can claim to have passed.
"""

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from vectorclm.errors import ConfigError, DataError
from vectorclm.evaluation import code_judge
from vectorclm.evaluation.code_judge import PASSED, UNSUITABLE, has_more

SECONDS = 10.0
JUDGE = Path(code_judge.__file__).resolve()
ISOLATION = (
    "--unshare-user",
    "--unshare-ipc",
    "--unshare-pid",
    "--unshare-net",
    "--unshare-uts",
    "--unshare-cgroup-try",
    *("--uid", "65534"),
    *("--gid", "65534"),
    *("--cap-drop", "ALL"),
    "--die-with-parent",
)
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
# One thread of a BLAS: what NumPy takes of the memory must not depend on the machine's cores.
ENVIRONMENT = {"PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
DENIED = (
    # other processes
    *("fork", "vfork", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"),
    # the network, and memory that outlives its process
    *("socket", "socketpair", "memfd_create", "shmget", "msgget", "semget", "mq_open"),
    # namespaces and mounts
    *("unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "move_mount", "fsopen", "fsconfig", "fsmount"),
    *("fspick", "open_tree", "mount_setattr", "open_by_handle_at", "name_to_handle_at"),
    # what programs do not need and kernels have had faults in
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("add_key", "request_key", "keyctl", "personality", "modify_ldt", "iopl", "ioperm", "fanotify_init"),
    *("kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "reboot", "swapon", "swapoff"),
    *("acct", "quotactl", "syslog", "vhangup", "settimeofday", "clock_settime", "adjtimex", "clock_adjtime"),
)
CLONE_THREAD = 0x00010000


class Problem(NamedTuple):
    """What a program is to do: the beginning of it, the function that is tested, and the tests, which are trusted."""

    prompt: str
    entry_point: str
    test: str


class Sandbox(NamedTuple):
    """The command that puts a program into a sandbox, or why the system offers none."""

    command: tuple[str, ...] = ()
    seccomp: bytes = b""
    problem: str = ""


@functools.cache
def find_sandbox() -> Sandbox:
    """The sandbox of this system, tried once; `problem` says what is missing where there is none."""
    if not sys.platform.startswith("linux"):
        return Sandbox(problem="the sandbox needs Linux")
    if (bwrap := shutil.which("bwrap")) is None:
        return Sandbox(problem="bubblewrap is not installed (apt install bubblewrap)")
    found = Sandbox((bwrap, *ISOLATION, *_visible(), "--remount-ro", "/", "--chdir", "/", "--"), seccomp_filter())
    with contextlib.ExitStack() as files, tempfile.TemporaryFile() as said:
        process = _start(found, files, ["try", str(SECONDS)], b"", (), said)
        try:
            code = process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            return Sandbox(problem="bubblewrap does not start a program within 30 seconds")
        finally:
            _kill(process)
        if code == 0:
            return found
        said.seek(0)
        why = said.read().decode(errors="replace").strip().rpartition("\n")[2]
    return Sandbox(problem=f"bubblewrap cannot make a sandbox ({why or f'it ended with {code}'})")


def _visible() -> list[str]:
    """The options that show the interpreter, the packages and the system's libraries, each read-only at its place."""
    prefixes = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.base_prefix).resolve()}
    parts = [prefix / name for prefix in sorted(prefixes) for name in ("bin", "lib", "lib64", "pyvenv.cfg")]
    paths = dict.fromkeys(str(path) for path in [*parts, *map(Path, LIBRARIES), JUDGE] if path.exists())
    return [word for path in paths for word in ("--ro-bind", path, path)]


def seccomp_filter() -> bytes:
    """The compiled filter that refuses DENIED and new processes, threads excepted; empty without libseccomp."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError):  # the second where the system has no libseccomp
        return b""
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    refused = pyseccomp.ERRNO(errno.EPERM)
    for name in DENIED:
        with contextlib.suppress(OSError, ValueError):  # a call that this architecture lacks
            rules.add_rule(refused, name)
    rules.add_rule(refused, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, CLONE_THREAD, 0))
    with contextlib.suppress(OSError, ValueError):  # its flags lie in memory: glibc then takes clone
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def check_sandbox(*, allow_unsandboxed: bool) -> Sandbox:
    """The sandbox, or none where that is allowed. Raises ConfigError where there is none and it is not."""
    found = find_sandbox()
    if found.problem and not allow_unsandboxed:
        raise ConfigError(f"{found.problem}; --allow-unsandboxed runs the programs without a sandbox")
    return found


def passes(problem: Problem, completion: str, seconds: float = SECONDS, *, allow_unsandboxed: bool = False) -> bool:
    """Whether the prompt with a model's completion passes the tests, all within `seconds`.

    Raises ConfigError where the system offers no sandbox and none is not allowed, and DataError where the tests cannot
    be run this way.
    """
    sandbox = check_sandbox(allow_unsandboxed=allow_unsandboxed)
    program = {"program": problem.prompt + completion, "entry_point": problem.entry_point}
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as files:
        (calls, asked), (answered, answers), (told, verdict) = (_pipe(files) for _ in range(3))
        sides = (
            ("program", program, (calls, answers)),
            ("tests", problem._asdict(), (asked, answered, verdict)),
        )
        for role, task, pipes in sides:
            numbers = [pipe.fileno() for pipe in pipes]
            arguments = [role, str(seconds), *map(str, numbers)]
            files.callback(_kill, _start(sandbox, files, arguments, json.dumps(task).encode(), numbers))
        for _, _, pipes in sides:
            for pipe in pipes:
                pipe.close()
        word, _, why = _read(told, deadline).decode(errors="replace").partition(" ")
    if word == UNSUITABLE:
        raise DataError(f"the tests of {problem.entry_point} cannot judge a program in another process: {why}")
    return word == PASSED


def _pipe(files: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    reading, writing = os.pipe()
    return files.enter_context(os.fdopen(reading, "rb", 0)), files.enter_context(os.fdopen(writing, "wb", 0))


def _start(
    sandbox: Sandbox,
    files: contextlib.ExitStack,
    arguments: Sequence[str],
    task: bytes,
    pipes: Sequence[int],
    stderr: IO[bytes] | int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start one side; `files` keeps what must stay open until it runs."""
    command, passed = list(sandbox.command), list(pipes)
    if sandbox.seccomp:
        filtered = _file(files, sandbox.seccomp)
        command[1:1] = ["--seccomp", str(filtered.fileno())]
        passed.append(filtered.fileno())
    # A program has the standard library alone, whatever is installed; tests may need packages.
    options = ["-I", "-B", "-S"] if arguments[0] == "program" else ["-I", "-B"]
    return subprocess.Popen(
        [*command, sys.executable, *options, str(JUDGE), *arguments],
        cwd="/",
        env=ENVIRONMENT,
        stdin=_file(files, task),
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=passed,
        start_new_session=True,
    )


def _file(files: contextlib.ExitStack, content: bytes) -> IO[bytes]:
    """A nameless file to read: unlike a pipe, it takes any size at once."""
    file: IO[bytes] = files.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file


def _read(pipe: IO[bytes], deadline: float) -> bytes:
    """What the tests' side wrote at once; empty where it ended or did not within the time."""
    return pipe.read(4096) or b"" if has_more(pipe.fileno(), deadline) else b""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a side with all that it started: bubblewrap's processes are in its group, all others in their namespace."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
