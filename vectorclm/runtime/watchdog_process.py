"""The watchdog process of a rank: it kills the rank when another rank is lost or the training hangs.

It reads lines of JSON: beats from its rank on standard input, and messages from other watchdogs. The first rank's
watchdog is connected to all others and decides; each of the others is connected to the first.
"""

import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

BEAT_SECONDS = 1.0
GRACE_SECONDS = 12  # in which a rank may end by itself
CAUSE_SECONDS = 2  # in which the cause arrives where a rank ended because of another
UNNOTICED_SECONDS = 20  # without a rank, after which a launcher hangs; torchrun looks ten times a second
LAUNCHER_SECONDS = 50  # in which a launcher may end its ranks or start them again
LOST = "RankLostError"
AGAIN = "run the same command again, which continues from the newest checkpoint"
CLOSED = b""


class Member:
    """A rank as a watchdog knows it: its last beat, and when the rank last moved."""

    def __init__(self, rank: int, host: str, file: int) -> None:
        self.rank, self.host, self.file = rank, host, file
        self.place = self.moves = 0
        self.buffer = b""

    def lines(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The whole lines that have arrived."""
        *whole, self.buffer = (self.buffer + data).split(b"\n")
        return map(json.loads, whole)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Launcher:
    """The torchrun that started the rank: where another node is lost, it may wait for that node for minutes.

    It is looked at in /proc, so on Linux alone.
    """

    def __init__(self, process: int) -> None:
        self.process = process
        self.started = self._stat(process)[1]

    def hangs(self) -> bool:
        """Wait until it ends, or lives on without any rank for UNNOTICED_SECONDS; True in the second case."""
        end = time.monotonic() + LAUNCHER_SECONDS
        since = time.monotonic()
        while self._lives() and time.monotonic() < end:
            if self._has_ranks():
                since = time.monotonic()
            elif time.monotonic() - since > UNNOTICED_SECONDS:
                return True
            time.sleep(0.5)
        return False

    def end(self) -> None:
        """Kill it: in a call into its rendezvous store it hears no other signal."""
        with suppress(ProcessLookupError, PermissionError):
            os.kill(self.process, signal.SIGKILL)

    def _lives(self) -> bool:
        return self.started != "" and self._stat(self.process)[1] == self.started

    def _has_ranks(self) -> bool:
        numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return any(self._stat(number)[0] == str(self.process) for number in numbers)

    def _stat(self, process: int) -> tuple[str, str]:
        """The parent and the start time of a living process; nothing for another."""
        with suppress(OSError):
            # The name of the program, in brackets, may have spaces.
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                return fields[1], fields[19]
        return "", ""


class Watch:
    """The loop of one watchdog process."""

    def __init__(self, head: Mapping[str, Any]) -> None:
        self.relay = head["relay"]
        self.parent, self.launcher = os.getppid(), Launcher(head["launcher"])
        self.own = Member(head["rank"], head["host"], sys.stdin.fileno())
        self.peers = [Member(*peer) for peer in head["peers"]]
        self.beat, self.moved = time.monotonic(), time.monotonic()  # the own rank's last beat, any rank's last progress
        self.hang, self.in_step = 0.0, False
        self.pending: tuple[float, str] | None = None  # a rank that ended because of another, and until when to wait
        self.selector = selectors.DefaultSelector()
        self.sockets = {peer: socket.socket(fileno=peer.file) for peer in self.peers}
        for member in (self.own, *self.peers):
            self.selector.register(member.file, selectors.EVENT_READ, member)

    def run(self) -> None:
        """Watch until the rank leaves, or until an error ends all ranks."""
        sent = 0.0
        while True:
            for key, _ in self.selector.select(BEAT_SECONDS):
                self._read(key.data)
            if time.monotonic() - sent >= BEAT_SECONDS:
                sent = time.monotonic()
                for peer in [*self.peers]:
                    self._tell(peer, {"place": self.own.place, "moves": self.own.moves})
            self._judge()

    def _read(self, member: Member) -> None:
        try:
            data = os.read(member.file, 65536)
        except BlockingIOError:
            return
        except ConnectionError:
            data = CLOSED
        except OSError as error:
            self._end(LOST, f"{member} cannot be reached ({error.strerror})", grace=0)
        if data == CLOSED:
            if member is self.own:  # the other watchdogs see that this one has ended
                sys.exit(0)
            self._end(LOST, f"{member} ended")
        for line in member.lines(data):
            self._understand(member, line)

    def _understand(self, member: Member, line: Mapping[str, Any]) -> None:
        if "end" in line:
            self._end(**line["end"])
        elif "left" in line:
            self._left(member, line["left"]["type"], line["left"]["message"])
        else:
            if (line["place"], line["moves"]) != (member.place, member.moves):
                member.place, member.moves, self.moved = line["place"], line["moves"], time.monotonic()
            if member is self.own:
                self.beat, self.hang, self.in_step = time.monotonic(), line["hang"], line["step"]

    def _left(self, member: Member, kind: str, message: str) -> None:
        """A rank ends on purpose: all work is done, an error of its own, or the loss of another rank."""
        self.selector.unregister(member.file)
        if member is self.own:
            if kind != LOST:
                for peer in self.peers:
                    self._tell(peer, {"left": {"type": kind, "message": message}})
                sys.exit(0)
        else:
            self.peers.remove(member)
            if kind not in ("", LOST):
                self._end(kind, f"{member}: {message}", member.host)
        if kind == LOST and self.pending is None:
            self.pending = time.monotonic() + CAUSE_SECONDS, f"{member} lost another rank ({message})"

    def _judge(self) -> None:
        """End all ranks where this rank is silent, or no rank moves in a step."""
        now = time.monotonic()
        if self.pending is not None:
            if now > self.pending[0]:
                self._end(LOST, self.pending[1])
            return
        if os.getppid() != self.parent:
            sys.exit(0)
        limit = f"in {self.hang:,.0f} s (hang_seconds)"
        if self.hang and now - self.beat > self.hang:
            self._end(
                LOST, f"{self.own} gave no sign of life {limit}: it is stopped, or hangs in a library's call", grace=0
            )
        if self.own.rank == 0 and self.hang and self.in_step and now - self.moved > self.hang:
            members = (self.own, *self.peers)
            last = min(member.place for member in members)
            stuck = ", ".join(str(member) for member in members if member.place == last)
            self._end(LOST, f"no progress in a step {limit}; the other ranks wait for {stuck}", grace=0)

    def _tell(self, peer: Member, line: Mapping[str, Any]) -> None:
        try:
            send(self.sockets[peer], line)
        except (BlockingIOError, TimeoutError):
            pass  # a watchdog that does not read is stopped, which `hang_seconds` finds
        except OSError:
            if "end" not in line and "left" not in line:
                self._read(peer)  # what the peer sent last, or how the connection broke

    def _end(self, kind: str, message: str, printed_on: str = "", grace: float = GRACE_SECONDS) -> NoReturn:
        """Tell all watchdogs and the launcher why all ranks end; kill the rank if it does not end by itself.

        On the host `printed_on`, the rank that failed has printed its error already. Where a rank has ended,
        collectives fail, and the first rank has `grace` seconds to save a checkpoint.
        """
        end = {"kind": kind, "message": message, "printed_on": printed_on, "grace": grace}
        for peer in self.peers:
            self._tell(peer, {"end": end})
        if printed_on != self.own.host:
            self._print(kind, f"{message}: {AGAIN}" if kind == LOST else message)
        deadline = time.monotonic() + grace
        while os.getppid() == self.parent and time.monotonic() < deadline:
            time.sleep(0.05)
        if os.getppid() == self.parent:
            with suppress(ProcessLookupError):
                os.kill(self.parent, signal.SIGKILL)
        if kind == LOST and self.launcher.hangs():
            self.launcher.end()
            self._print(kind, "all ranks of this node have ended, but torchrun waits for another node: it ends, too")
        sys.exit(0)

    def _print(self, kind: str, message: str) -> None:
        """Print an error as `vectorclm.command_line.explain` does, which this process does not import."""
        line = json.dumps({"error": {"type": kind, "message": message}}) if self.relay else f"error: {message}"
        stream = sys.stdout if self.relay else sys.stderr
        stream.write(line + "\n")  # one write, because ranks share the pipe
        stream.flush()


def send(connection: socket.socket, values: Mapping[str, Any]) -> None:
    """Send a line of JSON."""
    connection.sendall(json.dumps(values).encode() + b"\n")


def read_line(connection: socket.socket) -> bytes:
    """Read one line. Raises ValueError where the connection ends first."""
    line = b""
    while not line.endswith(b"\n"):
        if not (data := connection.recv(1)):
            raise ValueError("the connection was closed")
        line += data
    return line


def main() -> None:
    """Watch the parent process until it ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with its rank, which may still save a checkpoint
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    head = b""
    while not head.endswith(b"\n"):
        if not (byte := os.read(sys.stdin.fileno(), 1)):
            return
        head += byte
    watch = Watch(json.loads(head))
    for connection in watch.sockets.values():
        connection.settimeout(BEAT_SECONDS)
    watch.run()


if __name__ == "__main__":
    main()
