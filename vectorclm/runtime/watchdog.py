"""Ends all ranks together: a watchdog process beside each rank, connected to the watchdog of the first rank.

A rank may hang where it hears nothing: in a collective, in a driver's call, or stopped by a signal. So the watchdog is
a process of its own (`watchdog_process`), which kills its rank where the others have ended, cannot be reached or hang.
The rank sends it a beat each second. A lost connection to a watchdog means that the rank or its node is lost.
"""

import hashlib
import json
import os
import platform
import resource
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vectorclm.errors import ConfigError, RankLostError
from vectorclm.runtime import watchdog_process
from vectorclm.runtime.watchdog_process import BEAT_SECONDS, read_line, send

JOIN_SECONDS = 300  # in which all ranks must connect
ANSWER_SECONDS = 20  # in which a rank that has connected must answer
UNREACHABLE_SECONDS = 20  # without an answer from another node's system, after which the node counts as lost
CLOCK_SECONDS = 30  # by which the nodes' clocks may differ, as leases of a shared store last as long
OTHER_FILES = 256  # that a rank opens besides a connection to each rank: shards, libraries, loaders
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "pyarrow")


class Watchdog:
    """The watchdog of one rank, as the rank sees it: `moved` reports progress, `steps` says when it is expected."""

    def __init__(self, rank: int, peers: Mapping[int, tuple[str, socket.socket]], relay: bool) -> None:
        self._hang_seconds = 0.0  # no limit yet
        self._place = self._moves = 0
        self._in_step = False
        self._lock = threading.Lock()
        command = [sys.executable, "-IS", watchdog_process.__file__]  # without site: it starts at once
        files = [connection.fileno() for _, connection in peers.values()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=files)
        named = [[peer, host, connection.fileno()] for peer, (host, connection) in peers.items()]
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
        self._send({"rank": rank, "host": socket.gethostname(), "peers": named, "relay": relay, "launcher": launcher})
        for _, connection in peers.values():
            connection.close()  # the watchdog has it now
        threading.Thread(target=self._beat, daemon=True, name="watchdog").start()

    def limit_hangs(self, seconds: float) -> None:
        """End all ranks where no rank moves for so many seconds in a step, or one gives no sign of life; 0 = never."""
        self._hang_seconds = seconds
        self._send_beat()

    def moved(self, collective: bool = False) -> None:
        """Report progress: a micro-batch, or that this rank begins the next `collective`."""
        self._moves += 1
        self._place += collective

    @contextmanager
    def steps(self, expected: bool) -> Iterator[None]:
        """Say that the block is made of steps, in which all ranks move; with False, that the first rank works alone."""
        before, self._in_step = self._in_step, expected
        self.moved()
        try:
            yield
        finally:
            self._in_step = before
            self.moved()

    def leave(self, kind: str = "", reason: str = "") -> None:
        """Tell the other ranks that this one ends on purpose, or the error that ends it."""
        self._send({"left": {"type": kind, "message": reason}})

    def _beat(self) -> None:
        while self._send_beat():
            time.sleep(BEAT_SECONDS)

    def _send_beat(self) -> bool:
        beat = {"place": self._place, "moves": self._moves, "hang": self._hang_seconds, "step": self._in_step}
        return self._send(beat)

    def _send(self, values: Mapping[str, Any]) -> bool:
        """Send a line to the watchdog; False where the watchdog has ended."""
        assert self._process.stdin is not None
        with self._lock, suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(values).encode() + b"\n")
            self._process.stdin.flush()
            return True
        return False


def watch(rank: int, world_size: int, store: Any, relay: bool, hardware: Mapping[str, Any]) -> Watchdog:
    """Connect all ranks' watchdogs, and compare their nodes before any work; `store` is the rendezvous store.

    Raises ConfigError, naming a host, where packages, code, `hardware` or clocks of the nodes differ.
    """
    own = {**facts(), "hardware": hardware, "refused": _allow_connections(world_size)}
    peers = _accept(world_size, store, own) if rank == 0 else _connect(rank, store, own)
    return Watchdog(rank, peers, relay)


def _accept(world_size: int, store: Any, mine: Mapping[str, Any]) -> dict[int, tuple[str, socket.socket]]:
    """Connections from all other ranks to the first, once their nodes are known to equal this one."""
    address, token = own_address(), secrets.token_hex(16)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    peers: dict[int, tuple[str, socket.socket]] = {}
    problems: list[str] = []
    if mine["refused"]:
        store.set("watchdog", json.dumps([address, 0, "", mine["refused"]]))
        raise ConfigError(mine["refused"])
    deadline = time.monotonic() + JOIN_SECONDS
    with socket.create_server((address, 0), family=family, backlog=world_size) as server:
        store.set("watchdog", json.dumps([address, server.getsockname()[1], token, None]))
        while len(peers) < world_size - 1:
            server.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(rank) for rank in range(1, world_size) if rank not in peers)
                raise RankLostError(f"rank {missing} has not connected to the first rank in {JOIN_SECONDS} s") from None
            _set_up(connection)
            with suppress(OSError, ValueError, KeyError, TypeError):  # a stranger
                asked = time.time()
                send(connection, {"facts": True})
                hello = json.loads(read_line(connection))
                if secrets.compare_digest(str(hello["token"]), token):
                    if other := hello["facts"]["refused"]:
                        problems.append(other)
                    clock = (asked - hello["clock"], hello["clock"] - time.time())  # its time lies between the two
                    problems += differences(mine, hello["facts"], max(clock))
                    peers[int(hello["rank"])] = hello["facts"]["host"], connection
    for _, connection in peers.values():
        with suppress(OSError):
            send(connection, {"problem": problems[0] if problems else None, "host": mine["host"]})
    if problems:
        raise ConfigError(problems[0])
    return peers


def _connect(rank: int, store: Any, own: Mapping[str, Any]) -> dict[int, tuple[str, socket.socket]]:
    """A connection to the first rank. Raises ConfigError where the first rank finds that a node differs."""
    address, port, token, problem = json.loads(store.get("watchdog"))
    if problem:
        raise ConfigError(problem)
    try:
        connection = socket.create_connection((address, port), timeout=JOIN_SECONDS)
        _set_up(connection)
        read_line(connection)
        send(connection, {"rank": rank, "token": token, "facts": own, "clock": time.time()})
        connection.settimeout(JOIN_SECONDS)  # until the last rank has connected
        answer = json.loads(read_line(connection))
    except (OSError, ValueError) as error:
        raise RankLostError(f"the first rank, at {address}, cannot be reached: {error}") from error
    if answer["problem"]:
        raise ConfigError(answer["problem"])
    return {0: (answer["host"], connection)}


def _allow_connections(world_size: int) -> str | None:
    """Raise this process's limit of open files for a connection to each rank; what to do where the system forbids it.

    The first rank's watchdog is connected to all others.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = world_size + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            return (
                f"a process on {socket.gethostname()} may open {hard:,} files, and {world_size:,} ranks need "
                f"{needed:,}: raise the limit on all nodes, for example by `ulimit -n {needed}` before torchrun"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return None


def own_address() -> str:
    """This node's address on the network over which torchrun's nodes find each other."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE"):
        return "127.0.0.1"  # all ranks are on this machine
    family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        address = str(probe.getsockname()[0])
    return socket.gethostname() if address.startswith("127.") else address


def _set_up(connection: socket.socket) -> None:
    """Limit how long the system waits for an answer of the other node."""
    connection.settimeout(ANSWER_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; elsewhere all ranks are on one machine
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREACHABLE_SECONDS * 1000)


def facts() -> dict[str, Any]:
    """What must be equal on all nodes: the versions of packages and this package's code; and the host's name."""
    root, code = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    versions = {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {"host": socket.gethostname(), "versions": versions, "code": code.hexdigest()}


def differences(first: Mapping[str, Any], other: Mapping[str, Any], clock: float) -> Iterator[str]:
    """What differs between the first rank's node and another's, a line each; `clock` is by how much its clock does."""
    host, here = other["host"], first["host"]
    for name, wanted in first["versions"].items():
        if (found := other["versions"].get(name)) != wanted:
            yield f"{host} has {name} {found}, but {here} has {wanted}: install the same versions on all nodes"
    for name, wanted in first["hardware"].items():
        if (found := other["hardware"].get(name)) != wanted:
            yield f"{host} has {name}: {found}, but {here} has {name}: {wanted}; the nodes of a training must be equal"
    if other["code"] != first["code"]:
        yield f"the code of vectorclm on {host} differs from that on {here}: install the same version on all nodes"
    if clock > CLOCK_SECONDS:
        yield f"the clocks of {host} and {here} differ by {clock:,.0f} s: synchronise them, for example with chrony"
