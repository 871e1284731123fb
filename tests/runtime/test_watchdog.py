"""Watchdogs of several ranks end all of them, whatever one of them does, and refuse nodes that differ."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

import vectorclm
from vectorclm.runtime.watchdog import facts, read_line, send

# A rank without torch: what its watchdog reports stands in its output.
RANK = """
import os, sys, time
from pathlib import Path
from vectorclm.errors import VectorCLMError
from vectorclm.runtime.watchdog import watch

class Store:  # two methods of torch's rendezvous store
    def set(self, key, value):
        Path(sys.argv[1] + ".new").write_text(value)
        os.rename(sys.argv[1] + ".new", sys.argv[1])

    def get(self, key):
        while not Path(sys.argv[1]).exists():
            time.sleep(0.01)
        return Path(sys.argv[1]).read_text()

rank = int(os.environ["RANK"])
try:
    watchdog = watch(rank, int(os.environ["WORLD_SIZE"]), Store(), True, {"GPU": os.environ.get("GPU", "none")})
except VectorCLMError as error:
    sys.exit(f"{type(error).__name__}: {error}")
watchdog.limit_hangs(2)
watchdog.moved(collective=True)
print("ready", flush=True)
sys.stdin.readline()
"""
SECOND = "\nwith watchdog.steps(True):\n    watchdog.moved(collective=rank != 1)\n    sys.stdin.readline()\n"
ALONE = "\nwith watchdog.steps(rank != 0):\n    sys.stdin.readline()\n"
LEAVE = "watchdog.leave()\nos._exit(0)\n"
IN_TIME = 30


class Ranks:
    """Three processes with a watchdog each."""

    def __init__(self, processes: "list[subprocess.Popen[str]]") -> None:
        self.processes = processes
        self.watchdogs: list[psutil.Process] = []

    def ready(self) -> None:
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            self.watchdogs += psutil.Process(process.pid).children()
        assert len(self.watchdogs) == len(self.processes)

    def go_on(self, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            stdin = self.processes[rank].stdin
            assert stdin is not None
            stdin.write("\n")
            stdin.flush()

    def next_error(self, rank: int) -> tuple[str, str]:
        """The next error that a rank's watchdog reports, while the rank still runs."""
        stdout = self.processes[rank].stdout
        assert stdout is not None
        error = json.loads(stdout.readline())["error"]
        return error["type"], error["message"]

    def errors(self) -> list[tuple[str, str]]:
        """The errors that the watchdogs report, once all have ended; of a rank without one, what it said."""
        found = []
        for process in self.processes:
            process.wait(IN_TIME)
        for process in self.processes:
            assert process.stdout is not None and process.stderr is not None
            said, wrong = process.stdout.read(), process.stderr.read()
            lines = [json.loads(line)["error"] for line in said.splitlines() if line.startswith("{")]
            found += [(line["type"], line["message"]) for line in lines] or [("", wrong.strip())]
        return found


@contextmanager
def started(folder: Path, program: str, count: int = 3, world_size: int = 0, **other: str) -> Iterator[Ranks]:
    """Ranks that run `program`, the first of `world_size` (default: all); `other` is in the environment of the last."""
    processes, size = [], str(world_size or count)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    for rank in range(count):
        environment = {**os.environ, **place, "RANK": str(rank), **(other if rank == count - 1 else {})}
        command = [sys.executable, "-c", program, str(folder / "store")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, cwd=folder, **pipes))  # type: ignore[call-overload]
    try:
        yield (ranks := Ranks(processes))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        assert not psutil.wait_procs(ranks.watchdogs, IN_TIME)[1]


def test_ranks_that_leave_disturb_nobody(tmp_path: Path) -> None:
    with started(tmp_path, RANK + LEAVE) as ranks:
        ranks.ready()
        ranks.go_on(1)
        ranks.processes[1].wait(IN_TIME)
        time.sleep(1.5)  # longer than a beat
        assert ranks.processes[0].poll() is None
        ranks.go_on(0, 2)
        assert ranks.errors() == [("", "")] * 3 and [process.returncode for process in ranks.processes] == [0] * 3


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_is_named_and_takes_the_others_with_it(tmp_path: Path, victim: int) -> None:
    with started(tmp_path, RANK + LEAVE) as ranks:
        ranks.ready()
        ranks.processes[victim].send_signal(signal.SIGKILL)
        others = [rank for rank in range(3) if rank != victim]
        for rank in others:
            kind, message = ranks.next_error(rank)
            assert kind == "RankLostError" and message.startswith(f"rank {victim} on {os.uname().nodename} ended: run")
        ranks.go_on(*others)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stopped_is_named_and_killed_with_the_others(tmp_path: Path, victim: int) -> None:
    """Also outside of steps, where the first rank may work alone for long."""
    with started(tmp_path, RANK + LEAVE) as ranks:
        ranks.ready()
        ranks.processes[victim].send_signal(signal.SIGSTOP)
        found = ranks.errors()
        said = f"rank {victim} on {os.uname().nodename} gave no sign of life in 2 s (hang_seconds)"
        assert len(found) == 3 and all(said in message for _, message in found), found


def test_a_rank_that_moves_no_more_in_a_step_is_named(tmp_path: Path) -> None:
    with started(tmp_path, RANK + SECOND + LEAVE) as ranks:
        ranks.ready()
        ranks.go_on()
        found, host = ranks.errors(), os.uname().nodename
        said = f"no progress in a step in 2 s (hang_seconds); the other ranks wait for rank 1 on {host}: "
        assert len(found) == 3 and all(message.startswith(said) for _, message in found), found


def test_the_first_rank_may_work_alone_for_long(tmp_path: Path) -> None:
    with started(tmp_path, RANK + ALONE + LEAVE) as ranks:
        ranks.ready()
        ranks.go_on()
        time.sleep(4)  # twice the limit
        ranks.go_on()
        assert ranks.errors() == [("", "")] * 3


def test_an_error_of_a_rank_reaches_the_other_hosts(tmp_path: Path) -> None:
    """The host on which the rank failed has printed the error, so the watchdogs there do not repeat it."""
    failed = "\nif rank == 2:\n    watchdog.leave('DataError', 'a shard is gone')\n    os._exit(2)"
    elsewhere = "import socket, os\nif os.environ['RANK'] == '2':\n    socket.gethostname = lambda: 'node-b'\n"
    with started(tmp_path, elsewhere + RANK + failed) as ranks:
        ranks.ready()
        ranks.go_on(2)
        for rank in (0, 1):
            assert ranks.next_error(rank) == ("DataError", "rank 2 on node-b: a shard is gone")
        ranks.go_on(0, 1)
        assert ranks.errors() == [("", "")] * 3


def _other_version(folder: Path) -> str:
    described = folder / "other" / "safetensors-0.0.1.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 0.0.1\n")
    return str(described.parent)


def _other_code(folder: Path) -> str:
    package = Path(vectorclm.__file__).parent
    shutil.copytree(package, folder / "other" / "vectorclm", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "other" / "vectorclm" / "train.py").open("a") as file:
        file.write("# another version\n")
    return str(folder / "other")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (_other_version, r"ConfigError: (\S+) has safetensors 0\.0\.1, but \1 has \S+: install the same versions"),
        (_other_code, r"ConfigError: the code of vectorclm on (\S+) differs from that on \1: install the same version"),
    ],
)
def test_nodes_that_differ_are_refused_by_all_ranks(tmp_path: Path, other: Callable[[Path], str], said: str) -> None:
    with started(tmp_path, RANK, 2, PYTHONPATH=other(tmp_path)) as ranks:
        found = ranks.errors()
        assert all(re.fullmatch(f"{said} on all nodes", message) for _, message in found), found
    assert [process.returncode for process in ranks.processes] == [1, 1]


def test_nodes_with_other_hardware_are_refused(tmp_path: Path) -> None:
    with started(tmp_path, RANK, 2, GPU="H200") as ranks:
        found = ranks.errors()
        said = r"ConfigError: (\S+) has GPU: H200, but \1 has GPU: none; the nodes of a training must be equal"
        assert all(re.fullmatch(said, message) for _, message in found), found


def test_clocks_that_differ_are_refused(tmp_path: Path) -> None:
    ahead = "import os, time\nif os.environ['RANK'] == '1':\n    now = time.time\n    time.time = lambda: now() + 100\n"
    with started(tmp_path, ahead + RANK, 2) as ranks:
        found = ranks.errors()
        assert all(re.search(r"the clocks of \S+ and \S+ differ by (99|100) s: synchronise", said) for _, said in found)


FEW_FILES = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (40, {hard}))\n"


def test_more_ranks_connect_than_the_first_may_open_files_at_the_beginning(tmp_path: Path) -> None:
    """All ranks but the first are connections of this process."""
    size = 60
    program = FEW_FILES.format(hard="resource.getrlimit(resource.RLIMIT_NOFILE)[1]") + RANK + LEAVE
    with started(tmp_path, program, 1, size) as ranks, ExitStack() as stack:
        deadline = time.monotonic() + IN_TIME
        while not (tmp_path / "store").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        address, port, token, _ = json.loads((tmp_path / "store").read_text())
        own = {**facts(), "hardware": {"GPU": "none"}, "refused": None}
        connections = []
        for rank in range(1, size):
            connections.append(stack.enter_context(socket.create_connection((address, port), IN_TIME)))
            read_line(connections[-1])
            send(connections[-1], {"rank": rank, "token": token, "facts": own, "clock": time.time()})
        assert all(json.loads(read_line(connection))["problem"] is None for connection in connections)
        ranks.ready()
        ranks.go_on()
        assert ranks.errors() == [("", "")] and ranks.processes[0].returncode == 0


def test_a_limit_of_open_files_that_cannot_be_raised_is_named_by_all_ranks(tmp_path: Path) -> None:
    with started(tmp_path, FEW_FILES.format(hard=200) + RANK, 2) as ranks:
        found = ranks.errors()
        said = (
            r"ConfigError: a process on \S+ may open 200 files, and 2 ranks need 258: raise the limit on all nodes, .*"
        )
        assert all(re.fullmatch(said, message) for _, message in found), found
