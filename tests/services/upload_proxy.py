"""A proxy between an S3 client and its server that does to chosen requests what networks do.

It forwards HTTP/1.1 and asks `rule(method, path)` for each request; what that returns goes wrong with it.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
CHUNK = 16384


@dataclass(frozen=True)
class Fault:
    """What goes wrong: `flip` a bit, `reset`, `stall` or `end` the connection, `short`en consistently, `wait` first."""

    kind: str
    up: bool = False  # on the way to the server
    at: int = 0  # bytes into the body; of `short`, its new length
    status: int = 0  # with the kind `status`: what the client is answered, without asking the server
    code: str = ""
    seconds: float = 0.0


class Proxy:
    """Listens on a port of its own; `requests` counts those that came, `faults` those that went wrong."""

    def __init__(self, host: str, port: int) -> None:
        self.server = host, port
        self.rule: Callable[[str, str], Fault | None] = lambda method, path: None
        self.requests = self.faults = 0
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        threading.Thread(target=self._run, args=(started,), daemon=True).start()
        assert started.wait(30)

    def watch(self, rule: Callable[[str, str], Fault | None] = lambda method, path: None) -> None:
        """Count from zero, with this rule."""
        self.rule, self.requests, self.faults = rule, 0, 0

    def _run(self, started: threading.Event) -> None:
        async def serve() -> None:
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=2**20)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            await server.serve_forever()

        self._loop.run_until_complete(serve())

    async def _connection(self, *client: *Streams) -> None:
        server: Streams | None = None
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head, length = await _head(client[0])
                method, path, _ = head.split(b" ", 2)
                self.requests += 1
                fault = self.rule(method.decode(), path.decode())
                self.faults += fault is not None
                fault = fault or Fault("none")
                server = server or await asyncio.open_connection(*self.server, limit=2**20)
                if not await self._exchange(client, server, head, length, fault):
                    break
        for _, writer in (client, *([server] if server else [])):
            writer.close()

    async def _exchange(self, client: Streams, server: Streams, head: bytes, length: int, fault: Fault) -> bool:
        """Forward one request and its answer; False where the connection is over."""
        if fault.kind == "wait":
            await asyncio.sleep(fault.seconds)
        if fault.kind == "status":
            client[1].write(_error(fault))
            await client[1].drain()
            return False
        if fault.kind == "reset" and not fault.up and fault.at < 0:  # before anything was asked
            _reset(client[1])
            return False
        server[1].write(head)
        if b"\r\nexpect: 100-continue" in head.lower():
            await server[1].drain()
            client[1].write(await server[0].readuntil(b"\r\n\r\n"))
        if not await _body(client[0], server[1], length, fault if fault.up else Fault("none"), client[1]):
            return False
        answer, length = await _head(server[0])
        if fault.kind == "short" and not head.startswith(b"HEAD"):
            answer = answer.replace(b"ength: %d" % length, b"ength: %d" % min(length, fault.at))
        client[1].write(answer)
        if b"\r\ntransfer-encoding: chunked" in answer.lower():  # of listings; they arrive as they are
            await _chunks(server[0], client[1])
            return True
        length = 0 if head.startswith(b"HEAD") else length
        return await _body(server[0], client[1], length, Fault("none") if fault.up else fault, client[1])


async def _head(reader: asyncio.StreamReader) -> tuple[bytes, int]:
    """The lines of a request or an answer, and how many bytes of body follow."""
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head, int(lengths[0]) if lengths else 0


async def _chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Forward a body in chunks."""
    size = -1
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        writer.write(line + await reader.readexactly(size + 2))
        await writer.drain()


async def _body(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int, fault: Fault, client: asyncio.StreamWriter
) -> bool:
    """Forward a body, or as much of it as the fault lets pass; False where the connection is over."""
    fault = replace(fault, at=min(fault.at, max(length - 1, 0)))
    for start in range(0, length, CHUNK):
        data = bytearray(await reader.readexactly(min(CHUNK, length - start)))
        here = fault.at - start
        if 0 <= here < len(data):
            if fault.kind == "flip":
                data[here] ^= 1
            elif fault.kind in ("reset", "stall", "end"):
                writer.write(bytes(data[:here]))
                await writer.drain()
                if fault.kind == "stall":
                    await asyncio.sleep(fault.seconds)
                if fault.kind == "reset":
                    _reset(client)
                return False
        if fault.kind == "short":
            data = data[: max(0, here)]
        writer.write(bytes(data))
        await writer.drain()
    if length == 0 and fault.kind in ("reset", "end"):  # an answer without a body that gets lost
        _reset(client)
        return False
    await writer.drain()
    return fault.kind != "short"


def _error(fault: Fault) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>no</Message></Error>".encode()
    head = f"HTTP/1.1 {fault.status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
