"""One node of a training: torchrun, as an engine starts it by `python -m flows.execution.engines.node`.

The first line of standard input says what to run, as JSON. Each further line, and the end of the input where the engine
is lost, asks for an end as SIGTERM does: the ranks save a checkpoint.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from flows.net import SAFE_PATH
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.processes import dying_with_parent
from vectorclm.runtime.temporary import temporary_folder
from vectorclm.settings import validate

RUNTIME = "runtime.json"
JOIN_SECONDS = 120  # in which all nodes must have started


def job_line(job: Mapping[str, Any], nodes: int, address: str, node: int | None = None) -> str:
    """The first line of a node's input. The first node's torchrun listens at `address`, a HOST:PORT.

    Without `node`, its number is Slurm's; without HOST, it is the node that has called srun.
    """
    return json.dumps({**job, "nodes": nodes, "address": address, "node": node}) + "\n"


def read_job(path: str) -> tuple[dict[str, Any], Runtime]:
    """The job of an engine, and its runtime settings."""
    job: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return job, validate(Runtime, json.loads(job["files"][RUNTIME]), RUNTIME)


def write_line(stream: IO[str] | None, line: str) -> None:
    """Write a line to a node's input, which may have ended."""
    with suppress(OSError, ValueError):
        assert stream is not None
        stream.write(line)
        stream.flush()


def main() -> int:
    """Run torchrun as standard input says; returns the exit code of the first failed rank."""
    job = json.loads(sys.stdin.readline())
    node = int(os.environ["SLURM_NODEID"]) if job["node"] is None else job["node"]
    host, _, port = job["address"].rpartition(":")
    host = host or os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    threading.Thread(target=_end_with_engine, daemon=True, name="engine").start()
    from flows.execution.ranks import end_with_ranks, run  # with torch: a job that ended already needs none

    runtime = validate(Runtime, json.loads(job["files"][RUNTIME]), RUNTIME)
    processes = runtime.training_processes()
    os.environ |= {"OMP_NUM_THREADS": str(runtime.threads_each(processes)), "PYTHONUNBUFFERED": "1", **SAFE_PATH}
    arguments = [f"--nnodes={job['nodes']}", f"--node-rank={node}", f"--nproc-per-node={processes}"]
    arguments += [f"--master-addr={host}", f"--master-port={port}", f"--rdzv-conf=timeout={JOIN_SECONDS}"]
    threading.Thread(target=end_with_ranks, daemon=True, name="ranks").start()
    with temporary_folder() as folder:
        for name, text in job["files"].items():
            (folder / name).write_text(text, encoding="utf-8")
        os.chdir(folder)
        command = dying_with_parent([sys.executable, *job["stage"]])
        return run([*arguments, "--max-restarts=0", "--no-python", *command])


def _end_with_engine() -> None:
    """Send this process SIGTERM for each further line of input, and at its end."""
    while sys.stdin.readline():
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
