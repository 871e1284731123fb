"""Two nodes on this machine: a network namespace and a host name each, and one cable (a veth pair) between them."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vectorclm.runtime.processes import dying_with_parent

NODES = "two network namespaces cannot be made here: run as root, or apt-get install util-linux iproute2"
HOSTS = "node-a", "node-b"
ADDRESSES = "10.77.0.1", "10.77.0.2"
CABLE = "cable"  # the name of the network interface in both namespaces
_ports = itertools.count(29400)


class NodesMissingError(Exception):
    """This machine lets the user create no network namespaces."""


class Nodes:
    """Commands on the two nodes, and the cable between them."""

    def __init__(self, holders: Sequence[int], user: Sequence[str]) -> None:
        self.holders, self.user = holders, user  # processes that keep the namespaces, and how to enter their user's

    def on(self, node: int, command: Sequence[str]) -> list[str]:
        """Wrap `command` so that it runs on a node."""
        return ["nsenter", "--target", str(self.holders[node]), *self.user, "--net", "--uts", *command]

    def cable(self, state: str) -> None:
        """Take the cable `down` or `up`."""
        subprocess.run(self.on(0, ["ip", "link", "set", CABLE, state]), check=True)

    def limit_cable(self, megabits: int) -> None:
        """Limit the cable to so many Mb a second in each direction (tc's token bucket filter)."""
        shape = f"root tbf rate {megabits}mbit burst 32kb latency 20ms"
        for node in range(len(self.holders)):
            _done(self.on(node, ["tc", "qdisc", "replace", "dev", CABLE, *shape.split()]))

    def sent_bytes(self) -> int:
        """Bytes that went through the cable, both ways."""
        read = self.on(0, ["cat", "/proc/net/dev"])
        lines = subprocess.run(read, check=True, capture_output=True, text=True).stdout.splitlines()
        fields = next(line for line in lines if line.strip().startswith(CABLE)).split(":")[1].split()
        return int(fields[0]) + int(fields[8])

    def torchrun(
        self, command: Sequence[str], processes: int, launcher: Sequence[str] = ("-m", "flows.execution.ranks")
    ) -> list[list[str]]:
        """Wrap `command` in one torchrun on each node, which find each other over the cable."""
        port = next(_ports)
        settings = ["OMP_NUM_THREADS=1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
        found = []
        for node, address in enumerate(ADDRESSES):
            torchrun = [sys.executable, *launcher, "--nnodes=2", f"--nproc-per-node={processes}", "--max-restarts=0"]
            torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{port}", "--rdzv-id=test"]
            torchrun += [f"--rdzv-conf=is_host={node == 0}", f"--local-addr={address}", "--no-python"]
            here = ["env", *settings, f"TEST_NODE={HOSTS[node]}"]
            found.append(self.on(node, [*here, *torchrun, *dying_with_parent(command)]))
        return found


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Two nodes that reach each other. Raises NodesMissingError where the system allows none."""
    user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
    held: list[subprocess.Popen[bytes]] = []
    try:
        begin = ["unshare", *([] if not user else ["--user", "--map-root-user"]), "--net", "--uts"]
        held.append(_holder(begin))
        enter = ["nsenter", "--target", str(held[0].pid), *user] if user else []
        held.append(_holder([*enter, "unshare", "--net", "--uts"]))
        nodes = Nodes([process.pid for process in held], user)
        make = f"ip link add {CABLE} type veth peer name {CABLE} netns {nodes.holders[1]}"
        _done(nodes.on(0, make.split()))
        for node, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
            _done(nodes.on(node, ["hostname", host]))
            for words in (f"address add {address}/24 dev {CABLE}", f"link set {CABLE} up", "link set lo up"):
                _done(nodes.on(node, ["ip", *words.split()]))
        yield nodes
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise NodesMissingError(str(error)) from error
    finally:
        for process in held:
            process.kill()
            process.wait()


def _holder(begin: Sequence[str]) -> "subprocess.Popen[bytes]":
    """A process that keeps new namespaces, once it has them."""
    process = subprocess.Popen([*begin, "sh", "-c", "echo ready; exec sleep 3600"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        process.wait()
        raise subprocess.CalledProcessError(1, list(begin))
    return process


def _done(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)
