"""One node of a training: it runs torchrun as its input says, and ends its ranks when the input asks or ends."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from flows.execution.engines.node import job_line
from flows.net import free_port
from vectorclm.runtime.devices import Runtime

RUNTIME = Runtime(device="cpu", processes=2, threads=3)
LOOK = """
import json, os, pathlib
names = "RANK", "WORLD_SIZE", "OMP_NUM_THREADS"
line = json.dumps([*map(os.environ.get, names), sorted(path.name for path in pathlib.Path().iterdir())])
os.write(1, line.encode() + b"\\n")
"""
SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
os.write(1, b"ready\\n")
time.sleep(60)
"""


@contextmanager
def node(program: str) -> Iterator["subprocess.Popen[str]"]:
    """A node alone, with its first line of input."""
    files = {"experiment.json": "{}", "runtime.json": RUNTIME.model_dump_json()}
    job = {"stage": ["-c", program], "files": files}
    command = [sys.executable, "-m", "flows.execution.engines.node"]
    here = {**os.environ, "SLURM_NODEID": "0"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=here, **pipes) as child:  # type: ignore[call-overload]
        child.stdin.write(job_line(job, 1, f"127.0.0.1:{free_port()}"))
        child.stdin.flush()
        try:
            yield child
        finally:
            child.kill()


def test_each_rank_finds_the_files_and_the_settings_of_the_job() -> None:
    with node(LOOK) as child:
        said = sorted(json.loads(child.stdout.readline()) for _ in range(2))  # type: ignore[union-attr]
        assert child.wait(60) == 0
    files = ["experiment.json", "runtime.json"]
    assert said == [["0", "2", "3", files], ["1", "2", "3", files]]


@pytest.mark.parametrize("lost", [False, True])
def test_a_further_line_or_the_end_of_the_input_ends_the_ranks(lost: bool) -> None:
    with node(SLOW) as child:
        assert child.stdin is not None and child.stdout is not None
        assert [child.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        if lost:
            child.stdin.close()
        else:
            child.stdin.write("end\n")
            child.stdin.flush()
        assert child.wait(30) in (75, 143)
        assert child.stdout.read() == ""  # no rank holds the pipe any more
