"""Run the tests of a program that a model wrote: the program and its tests each run in a separate sandbox.

bubblewrap provides the sandbox: namespaces of users, mounts, processes, network and IPC, a read-only root with only the
interpreter and its libraries, no privileges, and a seccomp filter where libseccomp is installed. Only the trusted
process of the tests knows the expected results, so a program cannot claim to have passed.
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
# One BLAS thread, so that the memory of NumPy does not depend on the number of cores.
ENVIRONMENT = {"PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
DENIED = (
    # other processes
    *("fork", "vfork", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"),
    # the network, and memory that outlives its process
    *("socket", "socketpair", "memfd_create", "shmget", "msgget", "semget", "mq_open"),
    # namespaces and mounts
    *("unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "move_mount", "fsopen", "fsconfig", "fsmount"),
    *("fspick", "open_tree", "mount_setattr", "open_by_handle_at", "name_to_handle_at"),
    # calls that programs do not need and that have had kernel vulnerabilities
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("add_key", "request_key", "keyctl", "personality", "modify_ldt", "iopl", "ioperm", "fanotify_init"),
    *("kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "reboot", "swapon", "swapoff"),
    *("acct", "quotactl", "syslog", "vhangup", "settimeofday", "clock_settime", "adjtimex", "clock_adjtime"),
)
CLONE_THREAD = 0x00010000


class Problem(NamedTuple):
    """A programming problem: the beginning of the program, the name of the tested function, and the trusted tests."""

    prompt: str
    entry_point: str
    test: str


class Sandbox(NamedTuple):
    """The command that runs a program in a sandbox, or the reason why this system has no sandbox."""

    command: tuple[str, ...] = ()
    seccomp: bytes = b""
    problem: str = ""


@functools.cache
def find_sandbox() -> Sandbox:
    """Find the sandbox of this system, and try it once. Without a sandbox, `problem` says what is missing."""
    if not sys.platform.startswith("linux"):
        return Sandbox(problem="the sandbox needs Linux")
    if (bwrap := shutil.which("bwrap")) is None:
        return Sandbox(problem="bubblewrap is not installed (apt install bubblewrap)")
    found = Sandbox((bwrap, *ISOLATION, *_visible(), "--remount-ro", "/", "--chdir", "/", "--"), seccomp_filter())
    with contextlib.ExitStack() as files, tempfile.TemporaryFile() as output:
        process = _start(found, files, ["try", str(SECONDS)], b"", (), output)
        try:
            code = process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            return Sandbox(problem="bubblewrap does not start a program within 30 seconds")
        finally:
            _kill(process)
        if code == 0:
            return found
        output.seek(0)
        why = output.read().decode(errors="replace").strip().rpartition("\n")[2]
    return Sandbox(problem=f"bubblewrap cannot make a sandbox ({why or f'it ended with {code}'})")


def _visible() -> list[str]:
    """bubblewrap's options that mount the interpreter, the packages and the system's libraries read-only."""
    prefixes = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.base_prefix).resolve()}
    parts = [prefix / name for prefix in sorted(prefixes) for name in ("bin", "lib", "lib64", "pyvenv.cfg")]
    paths = dict.fromkeys(str(path) for path in [*parts, *map(Path, LIBRARIES), JUDGE] if path.exists())
    return [word for path in paths for word in ("--ro-bind", path, path)]


def seccomp_filter() -> bytes:
    """The compiled seccomp filter: it refuses the calls in DENIED and new processes, but allows threads.

    Empty without libseccomp.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError):  # RuntimeError where the system lacks libseccomp
        return b""
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    refused = pyseccomp.ERRNO(errno.EPERM)
    for name in DENIED:
        with contextlib.suppress(OSError, ValueError):  # a call that this architecture lacks
            rules.add_rule(refused, name)
    rules.add_rule(refused, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, CLONE_THREAD, 0))
    with contextlib.suppress(
        OSError, ValueError
    ):  # its flags are in memory, out of the filter's reach: glibc then uses clone
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def check_sandbox(*, allow_unsandboxed: bool) -> Sandbox:
    """Return the sandbox. Raises ConfigError where the system has none, unless `allow_unsandboxed`."""
    found = find_sandbox()
    if found.problem and not allow_unsandboxed:
        raise ConfigError(f"{found.problem}; --allow-unsandboxed runs the programs without a sandbox")
    return found


def passes(problem: Problem, completion: str, seconds: float = SECONDS, *, allow_unsandboxed: bool = False) -> bool:
    """Whether the prompt with a model's completion passes the tests, all within `seconds`.

    Raises ConfigError where the system has no sandbox, unless `allow_unsandboxed`, and DataError where the tests cannot
    test a program in another process.
    """
    sandbox = check_sandbox(allow_unsandboxed=allow_unsandboxed)
    program = {"program": problem.prompt + completion, "entry_point": problem.entry_point}
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as files:
        (calls, asked), (answered, answers), (verdicts, verdict) = (_pipe(files) for _ in range(3))
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
        word, _, why = _read(verdicts, deadline).decode(errors="replace").partition(" ")
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
    """Start the process of the program or of the tests; `files` keeps open what the process inherits."""
    command, passed = list(sandbox.command), list(pipes)
    if sandbox.seccomp:
        filtered = _file(files, sandbox.seccomp)
        command[1:1] = ["--seccomp", str(filtered.fileno())]
        passed.append(filtered.fileno())
    # A program may import only the standard library; tests may need packages.
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
    """An unnamed file with this content; unlike a pipe, it holds any size."""
    file: IO[bytes] = files.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file


def _read(pipe: IO[bytes], deadline: float) -> bytes:
    """The verdict of the tests; empty where their process ended or the deadline passed without one."""
    return pipe.read(4096) or b"" if has_more(pipe.fileno(), deadline) else b""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all its children: they share its process group or its process namespace."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
