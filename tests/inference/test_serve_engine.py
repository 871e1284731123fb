"""The server's engine in this process: answers together, clients that leave, and answers that fail."""

import asyncio
import json
import socket
import struct
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from tests.inference.conftest import QUESTION, serve_while
from vectorclm.inference import engine as engine_module
from vectorclm.inference import openai_app
from vectorclm.inference.batch import ContinuousBatch
from vectorclm.inference.chat import open_chat_model
from vectorclm.inference.engine import Answer, Engine
from vectorclm.inference.openai_errors import Refusal
from vectorclm.inference.openai_requests import ChatRequest, Generation
from vectorclm.inference.openai_responses import ChatResponse
from vectorclm.inference.server_metrics import RequestRecord
from vectorclm.inference.text_stream import TextDelta
from vectorclm.runtime.devices import Runtime


def long_generation(engine: Engine) -> Generation:
    asked = {"model": "otter", "messages": QUESTION, "temperature": 2, "seed": 1, "stream": True}
    return ChatRequest.model_validate(asked).read(engine.model)


def asked(engine: Engine, number: int, answers: int = 1) -> Generation:
    """A request whose answer is long: it would go on past the end of its turn until the context is full."""
    values = {"model": "otter", "messages": QUESTION, "temperature": 2, "seed": 10 * number, "n": answers}
    return ChatRequest.model_validate({**values, "ignore_eos": True}).read(engine.model)


async def texts_of(engine: Engine, generation: Generation) -> list[str]:
    texts = [""] * len(generation.choices)
    async with aclosing(engine.answers(generation.choices)) as pieces:
        async for index, piece in pieces:
            texts[index] += piece.text
    return texts


def test_answers_are_made_together_and_are_those_of_one_at_a_time(chat_folder: Path) -> None:
    """Three places for five clients; each draws with a seed, so that any mixture of rows would show."""
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))

    async def meeting() -> None:
        engine, alone = Engine(chat_model, parallel=3), Engine(chat_model, parallel=1)
        generations = [asked(engine, number) for number in range(5)]
        together = asyncio.gather(*(texts_of(engine, generation) for generation in generations))
        while engine.running < 3:
            await asyncio.sleep(0)
        assert engine.waiting == 2
        expected = [await texts_of(alone, generation) for generation in generations]
        assert await together == expected and len({text for (text,) in expected}) == 5
        assert engine.running == engine.waiting == 0

    asyncio.run(meeting())


def test_a_request_for_many_answers_does_not_keep_others_waiting(chat_folder: Path) -> None:
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))

    async def meeting() -> None:
        engine, ended = Engine(chat_model, parallel=2), list[str]()

        async def client(name: str, number: int, answers: int) -> None:
            async with aclosing(engine.answers(asked(engine, number, answers).choices)) as pieces:
                async for _, piece in pieces:
                    if piece.finish:
                        ended.append(name)

        many = asyncio.create_task(client("many", 1, 8))
        while not engine.running:
            await asyncio.sleep(0)
        await asyncio.gather(*(client("one", number, 1) for number in (2, 3)))
        assert ended.count("many") <= 4  # those that ran already, and those beside each of the two
        await many
        assert ended.count("many") == 8

    asyncio.run(meeting())


def test_too_many_waiting_requests_are_refused_and_clients_that_leave_make_room(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))
    monkeypatch.setattr(engine_module, "WAITING", 3)

    async def meeting() -> None:
        engine = Engine(chat_model, parallel=1)
        runs = asyncio.create_task(texts_of(engine, asked(engine, 1)))
        while not engine.running:
            await asyncio.sleep(0)
        waits = [asyncio.create_task(texts_of(engine, asked(engine, number))) for number in (2, 3, 4)]
        while engine.waiting < 3:
            await asyncio.sleep(0)
        with pytest.raises(Refusal, match="3 requests wait already"):
            await texts_of(engine, asked(engine, 5))
        for task in (runs, *waits[:2]):
            task.cancel()
        (text,) = await waits[2]
        assert text and engine.running == engine.waiting == 0

    asyncio.run(meeting())


def test_a_failing_answer_fails_alone(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))
    take = Answer.take

    def failing(answer: Answer, logits_TV: torch.Tensor) -> TextDelta | None:
        if answer.choice.sampling.seed == 20 and len(answer.ids) > 60:
            raise ArithmeticError("of this answer")
        return take(answer, logits_TV)

    monkeypatch.setattr(Answer, "take", failing)

    async def meeting() -> None:
        engine = Engine(chat_model, parallel=2)
        results = await asyncio.gather(
            *(texts_of(engine, asked(engine, number)) for number in (1, 2, 3)), return_exceptions=True
        )
        assert [type(result) for result in results] == [list, ArithmeticError, list]
        assert engine.running == engine.waiting == 0

    asyncio.run(meeting())


def test_a_failing_step_fails_its_answers_and_the_next_ones_succeed(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))
    step, steps = ContinuousBatch.step, 0

    def failing(batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 20:
            raise MemoryError("of the device")
        return step(batch)

    async def meeting() -> None:
        engine = Engine(chat_model, parallel=2)
        (expected,) = await texts_of(engine, asked(engine, 3))
        monkeypatch.setattr(ContinuousBatch, "step", failing)
        tasks = (texts_of(engine, asked(engine, number)) for number in (1, 2))
        assert [type(one) for one in await asyncio.gather(*tasks, return_exceptions=True)] == [MemoryError] * 2
        assert await texts_of(engine, asked(engine, 3)) == [expected]

    asyncio.run(meeting())


def test_a_closed_engine_ends_its_answers_and_refuses_others(chat_folder: Path) -> None:
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))

    async def meeting() -> None:
        engine = Engine(chat_model, parallel=1)
        tasks = [asyncio.create_task(texts_of(engine, asked(engine, number))) for number in (1, 2)]
        while not engine.running:
            await asyncio.sleep(0)
        engine.close()
        for task in (*tasks, texts_of(engine, asked(engine, 3))):
            with pytest.raises(Refusal, match="the server shuts down"):
                await task

    asyncio.run(meeting())


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_given_up_when_its_client_leaves(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The model waits in its fifth step until the server has heard that the client left, and makes no seventh."""
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))
    step, steps, goes_on = ContinuousBatch.step, 0, threading.Event()

    def counted(batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            assert goes_on.wait(60)
        return step(batch)

    monkeypatch.setattr(ContinuousBatch, "step", counted)

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
        async with asyncio.timeout(60):
            while engine.running:
                await asyncio.sleep(0.01)
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
        assert engine.running == 0
        return told

    told = asyncio.run(meeting())
    assert json.loads(told[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "an answer failed" in caplog.text
