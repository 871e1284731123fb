"""Ray, where there is no scheduler: an actor on each node runs torchrun as its child process.

`python -m flows.execution.engines.ray_cluster JOB` runs on a machine of the cluster. It prints the lines of all nodes.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flows.execution.engines.node import RUNTIME, job_line
from flows.execution.launch import dying_with_parent
from vectorclm.command_line import run
from vectorclm.errors import ConfigError, RankLostError
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.preemption import ENDED
from vectorclm.settings import validate

ANSWER_SECONDS = 5  # in which the head must accept a connection
TRIES = 4  # connections that the head may miss, one after another
PLACE_SECONDS = 10  # for the resources of the nodes, after which the nodes are counted anew
NODES_SECONDS = 60  # in which enough nodes must be there
TURN_SECONDS = 1.0  # in which a node collects lines


def check(runtime: Runtime) -> None:
    """Raise ConfigError where Ray is not installed, or the cluster's address or token is not known."""
    if find_spec("ray") is None:
        raise ConfigError("engine ray needs the package: pip install 'vectorclm[ray]'")
    if not os.environ.get("RAY_ADDRESS"):
        raise ConfigError("engine ray needs the head's address: set RAY_ADDRESS=HOST:PORT, on a machine of the cluster")
    kept = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not os.environ.get("RAY_AUTH_TOKEN") and not kept.is_file():
        raise ConfigError("engine ray needs the cluster's token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")


class Node:
    """The actor of one node: torchrun as a child, which gets SIGTERM when the actor ends."""

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._child: subprocess.Popen[str] | None = None

    def address(self) -> str:
        """This node's address in the cluster, with a free port."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, line: str) -> None:
        """Start the node's torchrun, whose first line of input is `line`."""
        threading.Thread(target=self._run, args=(line,), daemon=True, name="torchrun").start()

    def _run(self, line: str) -> None:
        command = dying_with_parent([sys.executable, "-m", "flows.execution.engines.node"])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._child = subprocess.Popen(command, text=True, errors="replace", **pipes)  # type: ignore[call-overload]
        self._write(line)
        for found in self._child.stdout or ():
            self._lines.put(found)
        self._child.wait()
        self._lines.put(None)

    def _write(self, line: str) -> None:
        with suppress(OSError):
            assert self._child is not None and self._child.stdin is not None
            self._child.stdin.write(line)
            self._child.stdin.flush()

    def read(self) -> tuple[list[str], int | None]:
        """The lines of the next moment, and the exit code once torchrun has ended."""
        lines: list[str] = []
        with suppress(queue.Empty):
            while (line := self._lines.get(timeout=0.05 if lines else TURN_SECONDS)) is not None:
                lines.append(line)
            assert self._child is not None
            return lines, self._child.returncode
        return lines, None

    def end(self) -> None:
        """Ask the ranks to save a checkpoint and end."""
        self._write("end\n")


def main() -> int:
    """Train on as many nodes as there are, at most those of the job; returns the exit code of the first failed rank."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    runtime = validate(Runtime, json.loads(job["files"][RUNTIME]), RUNTIME)
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"})
    address = os.environ["RAY_ADDRESS"]
    if not _answers(address):
        raise RankLostError(f"no Ray head answers at {address}: start it by `ray start --head`")
    threading.Thread(target=_end_with_head, args=(address,), daemon=True, name="head").start()
    import ray

    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError) as error:  # also of a wrong token
        raise ConfigError(f"Ray at {address} refuses this machine: {str(error).strip().splitlines()[0]}") from error
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ENDED) if asked.is_set() else asked.set())
    return _relay(_started(job, runtime), asked)


def _started(job: dict[str, Any], runtime: Runtime) -> list[Any]:
    """Actors that have started torchrun, on a node each."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group, resources = _placed(runtime)
    actors = []
    for number in range(group.bundle_count):
        place = PlacementGroupSchedulingStrategy(group, number)
        options = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0), "max_concurrency": 2}
        actors.append(ray.remote(Node).options(scheduling_strategy=place, **options).remote())
    address = ray.get(actors[0].address.remote())
    ray.get([node.start.remote(job_line(job, len(actors), address, n)) for n, node in enumerate(actors)])
    return actors


def _placed(runtime: Runtime) -> tuple[Any, dict[str, float]]:
    """A placement group over as many nodes as possible, and what it takes of each node."""
    import ray
    from ray.util import placement_group, remove_placement_group

    deadline = time.monotonic() + NODES_SECONDS
    while True:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = [node["GPU"] for node in alive if node.get("GPU")] if runtime.device != "cpu" else []
        resources = {"CPU": float(max(1, runtime.processes * runtime.threads))}
        if gpus:
            resources["GPU"] = float(runtime.processes or min(gpus))
        fitting = [node for node in alive if all(node.get(name, 0) >= count for name, count in resources.items())]
        if len(fitting) >= runtime.nodes[0]:
            bundles = [resources] * min(len(fitting), runtime.nodes[1])
            group = placement_group(bundles, strategy="STRICT_SPREAD")
            if group.wait(PLACE_SECONDS):
                return group, resources
            remove_placement_group(group)
            print(f"waits for {len(bundles)} nodes that are free", flush=True)
        elif time.monotonic() > deadline:
            needed = ", ".join(f"{count:g} {name}" for name, count in resources.items())
            raise RankLostError(
                f"{len(fitting)} nodes of the Ray cluster have {needed}, but nodes is {[*runtime.nodes]}: add nodes"
            )
        time.sleep(TURN_SECONDS)


def _relay(actors: Sequence[Any], asked: threading.Event) -> int:
    """Print the lines of all nodes until all have ended; returns the exit code of the first that failed."""
    import ray

    reads = {node.read.remote(): node for node in actors}
    code, told = 0, False
    while reads:
        for ready in ray.wait(list(reads), timeout=TURN_SECONDS)[0]:
            node = reads.pop(ready)
            try:
                lines, ended = ray.get(ready)
            except ray.exceptions.RayError as error:
                lost = f"a node of the Ray cluster is lost ({str(error).strip().splitlines()[0]})"
                lines, ended = [json.dumps({"error": {"type": "RankLostError", "message": lost}}) + "\n"], 128 + 9
            sys.stdout.write("".join(lines))
            sys.stdout.flush()
            code = code or ended or 0
            if ended is None:
                reads[node.read.remote()] = node
        if asked.is_set() and not told:
            told = True
            for node in reads.values():
                node.end.remote()
    return code


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError, ValueError), socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS):
        return True
    return False


def _end_with_head(address: str) -> None:
    """End this process where the head no longer answers; Ray itself would wait for minutes."""
    missed = 0
    while missed < TRIES:
        time.sleep(ANSWER_SECONDS if not missed else TURN_SECONDS)
        missed = 0 if _answers(address) else missed + 1
    message = f"the Ray head at {address} no longer answers: start it again by `ray start --head`"
    sys.stdout.write(json.dumps({"error": {"type": "RankLostError", "message": message}}) + "\n")
    sys.stdout.flush()
    os._exit(2)


if __name__ == "__main__":
    from flows.execution.engines import ray_cluster  # whose actor other nodes import by its name

    sys.exit(run(ray_cluster.main, relay=True))
