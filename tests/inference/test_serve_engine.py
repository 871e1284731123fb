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
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from tests.inference.conftest import QUESTION, serve_while
from vectorclm.inference import engine as engine_module
from vectorclm.inference import openai_app
from vectorclm.inference.chat import open_chat_model
from vectorclm.inference.engine import Engine
from vectorclm.inference.openai_errors import Refusal
from vectorclm.inference.openai_requests import ChatRequest, Generation
from vectorclm.inference.openai_responses import ChatResponse
from vectorclm.inference.server_metrics import RequestRecord
from vectorclm.runtime.devices import Runtime


def long_generation(engine: Engine) -> Generation:
    asked = {"model": "otter", "messages": QUESTION, "temperature": 2, "seed": 1, "stream": True}
    return ChatRequest.model_validate(asked).read(engine.model)


def test_answers_are_made_in_turn_and_end_with_their_client(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))
    made: list[str] = []
    ended: list[str] = []

    async def client(engine: Engine, name: str, pieces: int | None) -> None:
        answer = engine.answer(long_generation(engine).choices[0])
        async for piece in answer:
            made.append(name)
            if piece.finish:
                ended.append(name)
            if pieces is not None and made.count(name) == pieces:
                break
        await answer.aclose()

    async def meeting() -> None:
        engine = Engine(chat_model)
        clients = [asyncio.create_task(client(engine, name, 3 if name == "b" else None)) for name in "abc"]
        waits = asyncio.create_task(client(engine, "d", None))
        await asyncio.sleep(0)
        monkeypatch.setattr(engine_module, "WAITING", 3)
        with pytest.raises(Refusal, match="3 requests wait already"):
            await client(engine, "e", None)
        waits.cancel()
        await asyncio.gather(*clients)
        assert made == sorted(made) and set(made) == set("abc") and made.count("b") == 3
        assert ended == ["a", "c"] and made.count("a") == made.count("c") > 3
        assert not engine.is_busy and engine.waiting == 0

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
        engine, sent = Engine(chat_model), asyncio.Event()

        async def receive() -> dict[str, Any]:
            await sent.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if steps and b'"content": "' in message.get("body", b""):  # the role comes before any step
                sent.set()

        generation, scope = long_generation(engine), {"type": "http", "asgi": {"spec_version": "2.3"}, "headers": []}
        answered = engine, generation, ChatResponse("otter", "", 0), RequestRecord()
        if stream:
            await openai_app.EventStream(openai_app.events(*answered))(scope, receive, send)
        else:
            asyncio.get_running_loop().call_later(0.1, sent.set)
            await openai_app.while_connected(Request(scope, receive), openai_app.answer_whole(*answered))
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
        yield openai_app.event({"first": True})
        assert left.wait(60)  # holds up the whole server
        for taken in range(1, 101):
            yield openai_app.event({"piece": taken})

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await openai_app.EventStream(made())(scope, receive, send)

    def client(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=60) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while b"first" not in received:
                received += connection.recv(4096)
        left.set()

    serve_while(application, client)
    assert 0 < taken < 4 and "socket.send()" not in caplog.text


def test_a_stream_that_fails_says_so_and_makes_room(chat_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))
    with torch.no_grad():
        chat_model.model.model.norm.weight.fill_(float("nan"))

    async def meeting() -> list[str]:
        engine = Engine(chat_model)
        builder, record = ChatResponse("otter", "", 0), RequestRecord()
        told = [event async for event in openai_app.events(engine, long_generation(engine), builder, record)]
        assert not engine.is_busy
        return told

    told = asyncio.run(meeting())
    assert json.loads(told[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "an answer failed" in caplog.text
