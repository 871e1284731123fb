"""The server's engine in this process: turns, clients that leave, and answers that fail."""

import asyncio
import json
import socket
import struct
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from vectorclm.inference import serve
from vectorclm.inference.chat import open_chat_model
from vectorclm.inference.openai_api import Completion, Refusal, read_completion
from vectorclm.runtime.devices import Runtime

QUESTION = [{"role": "user", "content": "Who swims?"}]


def long_completion(engine: serve.Engine) -> Completion:
    asked = {"model": "otter", "messages": QUESTION, "temperature": 2, "seed": 1, "stream": True}
    return read_completion(json.dumps(asked).encode(), engine.chat_model, "otter")


def test_answers_are_made_in_turn_and_end_with_their_client(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))
    made: list[str] = []
    ended: list[str] = []

    async def client(engine: serve.Engine, name: str, pieces: int | None) -> None:
        answer = engine.answer(long_completion(engine))
        async for piece in answer:
            made.append(name)
            if piece.finish:
                ended.append(name)
            if pieces is not None and made.count(name) == pieces:
                break
        await answer.aclose()

    async def meeting() -> None:
        engine = serve.Engine(chat_model)
        clients = [asyncio.create_task(client(engine, name, 3 if name == "b" else None)) for name in "abc"]
        waits = asyncio.create_task(client(engine, "d", None))
        await asyncio.sleep(0)
        monkeypatch.setattr(serve, "WAITING", 3)
        with pytest.raises(Refusal, match="3 requests wait already"):
            await client(engine, "e", None)
        waits.cancel()
        await asyncio.gather(*clients)
        assert made == sorted(made) and set(made) == set("abc") and made.count("b") == 3
        assert ended == ["a", "c"] and made.count("a") == made.count("c") > 3
        assert not engine._turn.locked() and engine._waiting == 0

    asyncio.run(meeting())


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_given_up_when_its_client_leaves(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The model waits in its fifth step until the server has heard that the client left, and makes no seventh."""
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))
    step, steps, goes_on = chat_model.model.next_logits, 0, threading.Event()

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            assert goes_on.wait(60)
        return step(*arguments)

    monkeypatch.setattr(chat_model.model, "next_logits", counted)

    async def meeting() -> None:
        engine, sent = serve.Engine(chat_model), asyncio.Event()

        async def receive() -> dict[str, Any]:
            await sent.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if steps and b'"content": "' in message.get("body", b""):  # the role comes before any step
                sent.set()

        completion, scope = long_completion(engine), {"type": "http", "asgi": {"spec_version": "2.3"}, "headers": []}
        if stream:
            await serve.EventStream(serve.events(engine, completion))(scope, receive, send)
        else:
            asyncio.get_running_loop().call_later(0.1, sent.set)
            await serve.while_connected(Request(scope, receive), serve.answer_whole(engine, completion))
        await asyncio.sleep(0)
        goes_on.set()
        async with asyncio.timeout(60), engine._turn:
            assert 0 < steps <= 6

    asyncio.run(meeting())


def test_a_client_that_left_is_written_to_no_more(caplog: pytest.LogCaptureFixture) -> None:
    """It leaves while the server is busy, and then many pieces are ready at once."""
    left, taken = threading.Event(), 0

    async def made() -> AsyncGenerator[str, None]:
        nonlocal taken
        yield serve.event({"first": True})
        assert left.wait(60)  # holds up the whole server
        for taken in range(1, 101):
            yield serve.event({"piece": taken})

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await serve.EventStream(made())(scope, receive, send)

    def client(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=60) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while b"first" not in received:
                received += connection.recv(4096)
        left.set()

    async def meeting(listening: socket.socket) -> None:
        server = uvicorn.Server(uvicorn.Config(application, log_config=None, lifespan="off", ws="none"))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        await asyncio.to_thread(client, listening.getsockname())
        server.should_exit = True
        async with asyncio.timeout(60):
            await serving

    with serve.listen("127.0.0.1", 0) as listening:
        asyncio.run(meeting(listening))
    assert 0 < taken < 4 and "socket.send()" not in caplog.text


def test_a_stream_that_fails_says_so_and_makes_room(chat_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))
    with torch.no_grad():
        chat_model.model.model.norm.weight.fill_(float("nan"))

    async def meeting() -> list[str]:
        engine = serve.Engine(chat_model)
        told = [event async for event in serve.events(engine, long_completion(engine))]
        assert not engine._turn.locked()
        return told

    told = asyncio.run(meeting())
    assert json.loads(told[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "an answer failed" in caplog.text
