"""Workers build slices in processes of their own, which end with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from vectorclm.errors import DataError
from vectorclm.runtime.devices import LITTLE_DATA, MOST_WORKERS, Runtime
from vectorclm.runtime.workers import open_workers

IN_TIME = 20
PROGRAM = """
import sys, time
from pathlib import Path
from tests.runtime.test_workers import slowly
from vectorclm.runtime.workers import open_workers
if __name__ == "__main__":
    with open_workers(2) as workers:
        results = [workers.submit(slowly, Path(sys.argv[1], str(number))) for number in range(2)]
        results[0]()
"""


def write(out: Path, number: int) -> dict[str, int]:
    out.write_text(str(number * number))
    return {"process": os.getpid(), "number": number}


def refuse(out: Path) -> None:
    raise DataError(f"{out.name} is not read")


def slowly(out: Path) -> None:
    out.write_text(str(os.getpid()))
    time.sleep(600)


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + IN_TIME
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_order_of_the_calls(processes: int, tmp_path: Path) -> None:
    with open_workers(processes) as workers:
        results = [workers.submit(write, tmp_path / str(number), number) for number in range(5)]
        found = [result() for result in results]
    assert [one["number"] for one in found] == list(range(5))
    assert [(tmp_path / str(number)).read_text() for number in range(5)] == ["0", "1", "4", "9", "16"]
    assert (os.getpid() in {one["process"] for one in found}) == (processes == 1)


def test_an_error_of_a_worker_is_the_same_error_here_and_ends_the_others_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match="second is not read"), open_workers(2) as workers:
        workers.submit(slowly, tmp_path / "first")
        until((tmp_path / "first").exists)
        workers.submit(refuse, tmp_path / "second")()
    assert time.monotonic() - began < 2 * IN_TIME
    first = int((tmp_path / "first").read_text())
    until(lambda: not psutil.pid_exists(first))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(number: signal.Signals, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, str(program), str(tmp_path)], env=here, stderr=subprocess.DEVNULL)
    until(lambda: all((tmp_path / str(name)).exists() and (tmp_path / str(name)).read_text() for name in range(2)))
    workers = [psutil.Process(int((tmp_path / str(name)).read_text())) for name in range(2)]
    parent.send_signal(number)
    parent.wait(IN_TIME)
    assert not psutil.wait_procs(workers, IN_TIME)[1]


def test_little_data_needs_no_other_process() -> None:
    assert Runtime().data_processes(LITTLE_DATA) == 1
    assert Runtime().data_processes(LITTLE_DATA + 1) == min(os.cpu_count() or 1, MOST_WORKERS)
    assert Runtime(data_workers=3).data_processes(1) == 3
