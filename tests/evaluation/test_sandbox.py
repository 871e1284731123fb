"""The sandbox of programs that a model wrote: what they try leaves no trace outside."""

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail
from tests.evaluation.test_code_judge import FAKES, HONEST, PROBLEM
from vectorclm.errors import ConfigError
from vectorclm.evaluation import sandbox
from vectorclm.evaluation.sandbox import Problem, Sandbox, find_sandbox, passes

pytestmark = pytest.mark.usefixtures("sandboxed")


@pytest.fixture
def unfiltered(monkeypatch: pytest.MonkeyPatch, sandboxed: Sandbox) -> None:
    """The sandbox of a system without libseccomp."""
    monkeypatch.setattr(sandbox, "find_sandbox", lambda: sandboxed._replace(seccomp=b""))


def child(mark: str) -> str:
    """A program whose grandchild, in a session of its own, holds every descriptor and lives on."""
    return f"""    return 0
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(256):
            try: os.set_inheritable(fd, True)
            except OSError: pass
        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)', '{mark}'])
    os._exit(0)
time.sleep(0.2)
{{}}
"""


def processes(mark: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] if mark.encode() in path.read_bytes().split(b"\0") else []
        except OSError:
            continue
    return found


def ended(mark: str) -> bool:
    """Whether no process of that name is left, sooner or later."""
    for _ in range(600):
        if not processes(mark):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("end", ["os._exit(0)", "time.sleep(600)", "raise SystemExit"])
def test_a_grandchild_neither_delays_the_verdict_nor_outlives_it(end: str, unfiltered: None) -> None:
    mark = f"grandchild-{os.getpid()}"
    assert not passes(PROBLEM, child(mark).format(end), 2)
    assert ended(mark)
    assert passes(PROBLEM, HONEST + child(mark).format("").partition("\n")[2])  # it did start, beside a right answer
    assert ended(mark)


def test_no_process_is_left_by_a_fork_bomb(unfiltered: None) -> None:
    mark = f"bomb-{os.getpid()}"
    sleep = f"[sys.executable, '-c', 'import time; time.sleep(600)', '{mark}']"
    bomb = f"    import os, sys\n    for _ in range(5): os.fork()\n    os.execv(sys.executable, {sleep})\n"
    assert not passes(PROBLEM, bomb, 2)
    assert ended(mark)


@pytest.mark.parametrize(
    "call",
    [
        "os.fork()",
        "os.posix_spawn(sys.executable, [sys.executable], {})",
        "__import__('subprocess').run([sys.executable, '-c', ''])",
        "__import__('socket').socket()",
        "__import__('socket').socketpair()",
        "os.memfd_create('x')",
        "c('unshare', 0x10000000)",
        "c('ptrace', 0, 0, 0, 0)",
        "open('/work.txt', 'w')",
        "os.mkdir('/tmp')",
        "os.chmod(sys.executable, 0o777)",
    ],
)
def test_the_system_refuses_what_no_program_needs(call: str, sandboxed: Sandbox) -> None:
    """Each is refused by the kernel, whatever Python allows."""
    if not sandboxed.seccomp:
        skip_or_fail("no seccomp filter here: apt-get install libseccomp2, pip install pyseccomp")
    problem = Problem("def f():\n    ''\n", "f", "def check(f):\n    assert f() == 'refused'\n")
    program = f"""    import ctypes, os, sys
    def c(name, *args):
        if getattr(ctypes.CDLL(None), name)(*args) < 0: raise OSError
    try: {call}
    except OSError: return 'refused'
    return 'done'
"""
    assert passes(problem, program)
    threads = (
        "    import threading\n    t = threading.Thread(target=lambda: None); t.start(); t.join(); return 'refused'\n"
    )
    assert passes(problem, threads)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def test_a_program_reaches_nothing_outside(tmp_path: Path, listener: socket.socket, unfiltered: None) -> None:
    """Without the filter, too: each way is tried by its system call, and the outside shows no trace of it."""
    outside, port = tmp_path / "outside", listener.getsockname()[1]
    (tmp_path / "secret").write_text("secret")
    ways = f"""    import ctypes, glob, os, socket, subprocess, sys
    done = []
    def attempt(name, call):
        try:
            if call() is not False: done.append(name)
        except (OSError, ImportError): pass
    attempt('file', lambda: open({str(outside)!r}, 'w'))
    attempt('ctypes', lambda: ctypes.CDLL(None).creat({str(outside).encode()!r}, 0o600) >= 0)
    attempt('socket', lambda: socket.create_connection(('127.0.0.1', {port}), 1))
    attempt('secret', lambda: open({str(tmp_path / "secret")!r}))
    attempt('packages', lambda: open(sys.executable, 'r+b'))
    attempt('folder', lambda: os.listdir({str(tmp_path)!r}))
    attempt('processes', lambda: len(glob.glob('/proc/*')) > 0)
    attempt('mount', lambda: ctypes.CDLL(None).mount(b'proc', b'/usr', b'proc', 0, None) == 0)
    attempt('host', lambda: socket.sethostname('x'))
    attempt('root', lambda: os.getuid() == 0)
    attempt('environment', lambda: 'HOME' in os.environ)
    return done
"""
    problem = Problem("def f():\n    ''\n", "f", "def check(f):\n    assert f() == []\n")
    assert passes(problem, ways)
    assert not outside.exists()
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_a_process_with_many_open_files_tests_programs_as_well() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]  # more than `select` can wait for
    try:
        assert passes(PROBLEM, HONEST)
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_command_line_of_no_side_shows_the_tests() -> None:
    slow = "    import time; time.sleep(1); return 0\n"
    command = [
        sys.executable,
        "-c",
        "import sys; from tests.evaluation.test_code_judge import *; passes(PROBLEM, sys.argv[1])",
        slow,
    ]
    with subprocess.Popen(command) as process:
        seen: set[bytes] = set()
        while process.poll() is None:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen |= {path.read_bytes()}
                except OSError:
                    continue
            time.sleep(0.05)
    sides = [line for line in seen if b"code_judge.py" in line]
    assert sides and not any(b"candidate" in line for line in sides)


def test_without_a_sandbox_nothing_runs_until_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    find_sandbox.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"apt install bubblewrap\); --allow-unsandboxed runs"):
            passes(PROBLEM, HONEST)
        assert passes(PROBLEM, HONEST, allow_unsandboxed=True)
        for fake in ("writes to each descriptor and leaves", "an object equal to all", "reads all functions"):
            assert not passes(PROBLEM, FAKES[fake], 5, allow_unsandboxed=True)
        (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
        (tmp_path / "bwrap").chmod(0o755)
        find_sandbox.cache_clear()
        with pytest.raises(ConfigError, match=r"cannot make a sandbox .bwrap: No permissions to create new namespace"):
            passes(PROBLEM, HONEST)
    finally:
        monkeypatch.undo()
        find_sandbox.cache_clear()
