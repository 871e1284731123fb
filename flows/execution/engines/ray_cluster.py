"""Ray, where there is no scheduler: an actor on each node runs torchrun as its child, and tasks build slices of data.

`python -m flows.execution.engines.ray_cluster JOB` trains, and prints the lines of all nodes; with the command line of
`python -m vectorclm` it builds a data set. Both run on a machine of the cluster.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

from flows.execution.engines.node import job_line, read_job, write_line
from vectorclm.command_line import explain, run
from vectorclm.errors import ConfigError, RankLostError
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.preemption import ENDED
from vectorclm.runtime.processes import dying_with_parent
from vectorclm.runtime.workers import Shared, Workers, build_slice, use_workers

ANSWER_SECONDS = 5  # in which the head must accept a connection
TRIES = 4  # connections that the head may miss, one after another
PLACE_SECONDS = 10  # for the resources of the nodes, after which the nodes are counted anew
NODES_SECONDS = 60  # in which enough nodes must be there
TURN_SECONDS = 1.0


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
    """The actor of one node: torchrun as its child, which gets SIGTERM when the actor ends."""

    def address(self) -> str:
        """This node's address in the cluster, with a free port."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(self, line: str) -> Iterator[str | int]:
        """Run torchrun, whose first line of input is `line`; yields its lines, and in the end its exit code."""
        command = dying_with_parent([sys.executable, "-m", "flows.execution.engines.node"])
        with Popen(command, stdin=PIPE, stdout=PIPE, stderr=STDOUT, text=True, errors="replace") as child:
            self._input = child.stdin
            self.write(line)
            assert child.stdout is not None
            for text in child.stdout:  # noqa: UP028 - Ray sends values into it, which a file does not take
                yield text
        yield child.returncode

    def write(self, line: str) -> None:
        """Give torchrun a line of input: each after the first asks for an end."""
        write_line(self._input, line)


def connect() -> None:
    """Join the cluster of RAY_ADDRESS as a client; from then on this process ends where the head no longer answers.

    Raises RankLostError where no head answers, and ConfigError where the head refuses the token.
    """
    address = os.environ["RAY_ADDRESS"]
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    if not _answers(address):
        raise RankLostError(f"no Ray head answers at {address}: start it by `ray start --head`")
    threading.Thread(target=_end_with_head, args=(address,), daemon=True, name="head").start()
    import ray

    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:  # also of a wrong token
        raise ConfigError(f"Ray at {address} refuses this machine: {str(error).strip().splitlines()[0]}") from error


class RayWorkers(Workers):
    """Builds slices as Ray tasks on all nodes, which a lost node does not end; their files come to this machine."""

    local = False

    def __init__(self) -> None:
        import ray

        self.ahead = int(ray.cluster_resources().get("CPU", 0)) + 1
        self.share = lambda value: Shared(partial(ray.get, ray.put(value)))  # type: ignore[method-assign]

    def submit(self, work: Callable[..., Any], out: Path, *arguments: Any) -> Callable[[], Any]:
        """Have `work(out, *arguments)` called; returns a function that waits for its result."""
        import ray

        task = ray.remote(num_cpus=1, max_retries=-1)(build_slice).remote(work, *arguments)

        def result() -> Any:
            found, files = ray.get(task)  # which lets handlers of signals run
            for name, data in files.items():
                (out / name).write_bytes(data)
            return found

        return result


def main() -> int:
    """Train on as many nodes as there are, at most those of the job; returns the exit code of the first failed rank."""
    connect()
    if len(sys.argv) > 2:
        from vectorclm.__main__ import main as build  # which a node need not import

        use_workers(RayWorkers())
        return build(sys.argv[1:])
    job, runtime = read_job(sys.argv[1])
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ENDED) if asked.is_set() else asked.set())
    return _run(job, _actors(runtime), asked)


def _actors(runtime: Runtime) -> list[Any]:
    """An actor on each of as many nodes as possible. Raises RankLostError where there are too few for a minute."""
    import ray
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    deadline = time.monotonic() + NODES_SECONDS
    while True:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = [] if runtime.device == "cpu" else [node["GPU"] for node in alive if node.get("GPU")]
        need = {"CPU": 1.0, **({"GPU": float(runtime.processes or min(gpus))} if gpus else {})}
        fitting = sum(all(node.get(name, 0) >= count for name, count in need.items()) for node in alive)
        if fitting >= runtime.nodes[0]:
            group = placement_group([need] * min(fitting, runtime.nodes[1]), strategy="STRICT_SPREAD")
            if group.wait(PLACE_SECONDS):
                break
            remove_placement_group(group)
            sys.stderr.write(f"waits for {fitting} nodes: one is lost, or at work for another training\n")
        elif time.monotonic() > deadline:
            raise RankLostError(f"{fitting} nodes of the Ray cluster have {need}, but nodes is {[*runtime.nodes]}")
        time.sleep(TURN_SECONDS)
    places = [PlacementGroupSchedulingStrategy(group, number) for number in range(group.bundle_count)]
    actor = ray.remote(num_cpus=need["CPU"], num_gpus=need.get("GPU", 0), max_concurrency=2)(Node)
    return [actor.options(scheduling_strategy=place).remote() for place in places]


def _run(job: dict[str, Any], actors: list[Any], asked: threading.Event) -> int:
    """Print the lines of all nodes until all have ended; returns the exit code of the first that failed."""
    import ray

    address, code = ray.get(actors[0].address.remote()), 0
    streams = {}
    for number, node in enumerate(actors):
        streams[node.run.options(num_returns="streaming").remote(job_line(job, len(actors), address, number))] = node
    while streams:
        for stream in ray.wait(list(streams), timeout=TURN_SECONDS)[0]:
            try:
                found: Any = ray.get(next(stream))
            except StopIteration:
                del streams[stream]
                continue
            except ray.exceptions.RayError as error:
                explain(RankLostError(f"a node is lost: {str(error).strip().splitlines()[-1]}"), relay=True)
                del streams[stream]
                found = 128 + signal.SIGKILL
            if isinstance(found, str):
                sys.stdout.write(found)
                sys.stdout.flush()
            else:
                code = code or found
        if asked.is_set() and actors:
            for node in streams.values():
                node.write.remote("end\n")
            actors = []
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
    explain(RankLostError(f"the Ray head at {address} no longer answers: start it again"), relay=True)
    os._exit(2)


if __name__ == "__main__":
    from flows.execution.engines import ray_cluster  # whose actor other nodes import by its name

    sys.exit(run(ray_cluster.main, relay=True))
