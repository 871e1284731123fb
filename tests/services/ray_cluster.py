"""A Ray cluster on two nodes of this machine: a head and a second raylet, each in its own network namespace."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.services.nodes import ADDRESSES, HOSTS, Nodes

PORT = 6380
START_SECONDS = 90
OPTIONS = ("--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats", "--block")
MARK = "TEST_RAY_CLUSTER"  # in the environment of every process of a cluster, and of what they start


class RayCluster:
    """The head on the first node and a raylet on the second; what they start has their environment."""

    address = f"{ADDRESSES[0]}:{PORT}"

    def __init__(self, nodes: Nodes, **environment: str) -> None:
        self.nodes = nodes
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need a short path
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # Ray starts its workers at 15
            "RAY_ADDRESS": self.address,
            "HOME": self.folder,  # no token of the user's
            **environment,
        }

    def start(self, node: int) -> None:
        """Start the head (node 0), or the raylet of another node, which joins it."""
        place = f"--node-ip-address={ADDRESSES[node]}"
        if node == 0:
            place += f" --head --port={PORT} --include-dashboard=false --temp-dir={self.folder}/head"
        else:
            place += f" --address={self.address}"
        ray = [str(Path(sys.executable).with_name("ray")), "start", *place.split(), *OPTIONS]
        here = {**self.environment, MARK: f"{self.folder} {node}", "TEST_NODE": HOSTS[node]}
        with Path(self.folder, f"node-{node}.log").open("ab") as log:
            subprocess.Popen(self.nodes.on(node, ray), env=here, stdout=log, stderr=log, start_new_session=True)

    def run(self, program: str, node: int = 0, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a program on a node, as a user of the cluster does."""
        command = self.nodes.on(node, [sys.executable, "-c", program])
        here = {name: value for name, value in {**self.environment, **environment}.items() if value}
        return subprocess.run(command, env=here, capture_output=True, text=True, check=False, timeout=START_SECONDS)

    def wait(self, nodes: int) -> None:
        """Wait until so many nodes are alive."""
        ready = self.run(WAIT, COUNT=str(nodes))
        assert ready.returncode == 0, ready.stderr + self.log()

    def processes(self, node: int | None = None, *words: str) -> list[psutil.Process]:
        """The processes of a node, or of all, with all these words in their command lines."""
        mark = f"{MARK}={self.folder}" + ("" if node is None else f" {node}")
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                marked = mark in Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
                if marked and all(word in " ".join(process.cmdline()) for word in words):
                    found.append(process)
        return found

    def kill(self, node: int) -> None:
        """Kill everything on a node at once, as when its machine is lost."""
        while found := self.processes(node):
            for process in found:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, 5)

    def log(self) -> str:
        """The end of what the nodes printed."""
        return "\n".join(path.read_text()[-2000:] for path in sorted(Path(self.folder).glob("node-*.log")))

    def close(self) -> None:
        """End all nodes."""
        for node in reversed(range(len(HOSTS))):
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)


WAIT = """
import logging, os, time
import ray
deadline = time.monotonic() + 60
while True:
    try:
        ray.init(os.environ["RAY_ADDRESS"], logging_level=logging.ERROR)
        break
    except (ConnectionError, RuntimeError):
        if time.monotonic() > deadline:
            raise
        time.sleep(0.5)
while sum(node["Alive"] for node in ray.nodes()) < int(os.environ["COUNT"]):
    if time.monotonic() > deadline:
        raise SystemExit("the nodes are not there")
    time.sleep(0.2)
"""


@contextmanager
def ray_cluster(nodes: Nodes, wait: Sequence[int] = (0, 1), **environment: str) -> Iterator[RayCluster]:
    """A cluster of both nodes, with token authentication and without a dashboard."""
    cluster = RayCluster(nodes, **environment)
    try:
        for node in wait:
            cluster.start(node)
            if node == 0:
                _until_open(nodes)
        cluster.wait(len(wait))
        yield cluster
    finally:
        cluster.close()


def _until_open(nodes: Nodes) -> None:
    """Wait until the head accepts connections."""
    deadline = time.monotonic() + START_SECONDS
    knock = nodes.on(0, ["bash", "-c", f"exec 3<>/dev/tcp/{ADDRESSES[0]}/{PORT}"])
    while subprocess.run(knock, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "the Ray head does not start"
        time.sleep(0.2)
