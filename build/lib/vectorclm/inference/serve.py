"""A chat model behind OpenAI's API, `/v1/chat/completions` and `/v1/models`, and a page that chats at `/`.

Answers are generated one at a time, in the order of the requests. Options that are not implemented are refused with
OpenAI's own errors.
"""

import asyncio
import base64
import hashlib
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vectorclm.errors import ConfigError
from vectorclm.inference.chat import ChatModel, TextDelta, open_chat_model, reply
from vectorclm.inference.guard import ALLOWED, Guard, allowed_hosts
from vectorclm.inference.http_limits import BACKLOG, LimitedHTTP
from vectorclm.inference.openai_api import Completion, Refusal, check_name, read_completion
from vectorclm.runtime.devices import Runtime

logger = logging.getLogger(__name__)

KEY = "VECTORCLM_API_KEY"  # the variable with the key; an argument would show in the list of processes
KEY_CHARACTERS = 16  # at least, in a key
BODY_BYTES = 1 << 20  # of a request, at most; a context is some thousand tokens
BODY_SECONDS = 30  # for a request to arrive
WAITING = 64  # requests that may wait for their turn
SHUTDOWN_SECONDS = 5


class Engine:
    """Generates one answer at a time, in the order of the requests."""

    def __init__(self, chat_model: ChatModel) -> None:
        self.chat_model = chat_model
        self._turn = asyncio.Lock()  # wakes waiters in their order
        self._waiting = 0

    def check_room(self) -> None:
        """Raise Refusal where too many requests wait."""
        if self._waiting >= WAITING:
            raise Refusal(f"{WAITING} requests wait already: try again later", 429, code="rate_limit_exceeded")

    async def answer(self, completion: Completion) -> AsyncGenerator[TextDelta, None]:
        """Stream the pieces of an answer. Closing the stream ends the answer and lets the next request begin.

        A caller that reads slowly does not delay the next request. Raises Refusal where too many requests wait.
        """
        self.check_room()
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        pieces: asyncio.Queue[TextDelta | None] = asyncio.Queue()
        gone, loop = threading.Event(), asyncio.get_running_loop()
        work = asyncio.ensure_future(asyncio.to_thread(self._make, completion, pieces, gone, loop))
        work.add_done_callback(lambda _: self._turn.release())
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await work  # raises the error of the thread
        finally:
            gone.set()

    def _make(
        self,
        completion: Completion,
        pieces: "asyncio.Queue[TextDelta | None]",
        gone: threading.Event,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        try:
            made = reply(
                self.chat_model,
                completion.prompt,
                completion.max_new_tokens,
                sampling=completion.sampling,
                stop=completion.stop,
            )
            for piece in made:
                if gone.is_set():
                    return
                loop.call_soon_threadsafe(pieces.put_nowait, piece)
        finally:
            loop.call_soon_threadsafe(pieces.put_nowait, None)


class Gate(Guard):
    """Checks the Host, the Origin and the key of each request; the page itself needs no key."""

    def __init__(self, app: ASGIApp, key: str, hosts: Sequence[str] | None) -> None:
        super().__init__(app, hosts)
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            try:
                self._check(request)
            except Refusal as refusal:
                await refused(request, refusal)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, request: Request) -> None:
        if (reason := self.refusal(request.headers, request.method)) is not None:
            raise Refusal(reason, 403, code="forbidden")
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        right = kind.lower() == "bearer" and secrets.compare_digest(key.encode(), self._key)
        if request.scope["path"] != "/" and not right:
            raise Refusal(f"the key is missing or wrong: it is what {KEY} is", 401, code="invalid_api_key")


def make_app(chat_model: ChatModel, name: str, key: str, hosts: Sequence[str] | None) -> ASGIApp:
    """The ASGI application; it answers to the host names in `hosts`, or to any."""
    engine, started = Engine(chat_model), int(time.time())
    page = files("vectorclm.inference").joinpath("chat.html").read_text(encoding="utf-8")
    model = {"id": name, "object": "model", "created": started, "owned_by": "vectorclm"}
    model["max_model_len"] = chat_model.context  # vLLM's field

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        check_name(request.path_params["name"], name)
        return JSONResponse(model)

    async def completions(request: Request) -> Response:
        body = await read_body(request)
        completion = await asyncio.to_thread(read_completion, body, chat_model, name)
        if completion.stream:
            engine.check_room()
            return EventStream(events(engine, completion))
        return await while_connected(request, answer_whole(engine, completion))

    async def home(request: Request) -> Response:
        return HTMLResponse(page, headers=page_headers(page))

    routes = [
        Route("/", home),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", completions, methods=["POST"]),
    ]
    handlers: Any = {Refusal: refused, HTTPException: not_served, Exception: failed}
    return Gate(Starlette(routes=routes, exception_handlers=handlers), key, hosts)


class EventStream(StreamingResponse):
    """Server-sent events; their generator is closed as soon as the client is gone."""

    def __init__(self, made: AsyncGenerator[str, None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(made, media_type="text/event-stream", headers=headers)
        self._made = made

    async def stream_response(self, send: Send) -> None:
        async def send_and_hear(message: Message) -> None:
            await send(message)
            await asyncio.sleep(0)  # without a pause the loss of the connection is not noticed while pieces are ready

        async with aclosing(self._made):
            await super().stream_response(send_and_hear)


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises Refusal where it is too large or does not arrive."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= BODY_BYTES:
                    body += part
                elif size > 8 * BODY_BYTES:  # a client reads no answer while it sends, so the rest is read and dropped
                    break
    except ClientDisconnect as error:
        raise Refusal("the client left before its request was whole", 499) from error  # no client is left to read this
    except TimeoutError as error:
        raise Refusal(f"the body did not arrive within {BODY_SECONDS} s", 408, code="timeout") from error
    if size > BODY_BYTES:
        raise Refusal(f"the body has more than {BODY_BYTES:,} bytes", 413, code="request_too_large")
    return bytes(body)


async def events(engine: Engine, completion: Completion) -> AsyncGenerator[str, None]:
    """The answer as server-sent events."""
    tokens = 0
    yield event(completion.chunk({"role": "assistant", "content": ""}))
    try:
        async with aclosing(engine.answer(completion)) as pieces:
            async for piece in pieces:
                tokens += piece.tokens
                if piece.text:
                    yield event(completion.chunk({"content": piece.text}))
                if piece.finish:
                    yield event(completion.chunk({}, piece.finish))
    except Exception as error:  # the status is sent already, so the stream carries the error
        if not isinstance(error, Refusal):
            logger.exception("an answer failed")
        yield event(explained(error).body())
        return
    if completion.include_usage:
        yield event(completion.last_chunk(tokens))
    yield "data: [DONE]\n\n"


def event(value: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def answer_whole(engine: Engine, completion: Completion) -> Response:
    """The answer in one piece."""
    async with aclosing(engine.answer(completion)) as pieces:
        return JSONResponse(completion.whole([piece async for piece in pieces]))


async def while_connected(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """Await the answer to a request whose body has been read; cancel it when the client leaves."""
    work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        return (
            work.result() if work.done() else Response(status_code=499)
        )  # nginx's number; no client is left to read it
    finally:
        gone.cancel()
        work.cancel()


def explained(error: Exception) -> Refusal:
    """The API's error for any exception."""
    return error if isinstance(error, Refusal) else Refusal("the server failed; its log says why", 500)


def refused(request: Request, refusal: Refusal) -> Response:
    """The response to a refused request."""
    # A connection with an unread rest of a body cannot be used again.
    headers = {"Connection": "close"} if refusal.status in (408, 413) else {}
    return JSONResponse(refusal.body(), refusal.status, headers)


def not_served(request: Request, error: HTTPException) -> Response:
    """The response to an unknown path or method."""
    message = f"{request.method} {request.url.path} is not served here"
    return refused(request, Refusal(message, error.status_code, code="unknown_url"))


def failed(request: Request, error: Exception) -> Response:
    """The response to an unexpected error, which Starlette logs."""
    return refused(request, explained(error))


def page_headers(page: str) -> dict[str, str]:
    """Security headers: a browser runs only this page's own script, which may connect only to this server."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    }
    policy = f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'"
    policy += "; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_key(environment: Mapping[str, str], host: str, *, terminal: bool) -> tuple[str, bool]:
    """The server's key, and whether it was generated here, to be shown once.

    A key is generated only for a server of this machine alone, started in a terminal: elsewhere the key would end up in
    a log. Raises ConfigError where there is no key, or a weak one.
    """
    if key := environment.get(KEY, ""):
        if len(key) < KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{KEY} must be {KEY_CHARACTERS} or more letters, digits and signs, without spaces")
        return key, False
    if is_loopback(host) and terminal:
        return secrets.token_urlsafe(24), True
    why = "nobody reads a key printed here" if is_loopback(host) else f"others can reach {host}"
    raise ConfigError(f"set {KEY} to the key that clients send: {why}")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where the address is not this machine's, or the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}, port {port}: {error}; choose another --host or --port") from error


def serve(address: str, runtime: Runtime, host: str, port: int, name: str | None) -> None:
    """Serve the chat model at an address until interrupted. Raises VectorCLMError where the server cannot start."""
    key, made = find_key(os.environ, host, terminal=sys.stdout.isatty())
    chat_model = open_chat_model(address, runtime)
    name = name or Path(address).absolute().name
    with listen(host, port) as listening:
        shown, port = f"[{host}]" if ":" in host else host, listening.getsockname()[1]
        hosts = [*allowed_hosts(os.environ), shown] if is_loopback(host) or os.environ.get(ALLOWED) else None
        app = make_app(chat_model, name, key, hosts)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            http=LimitedHTTP,
            backlog=BACKLOG,
            ws="none",
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        secret = f"#key={key}" if made else ""  # browsers never send the part after # to a server
        print(f"{name} at http://{shown}:{port}/{secret} and http://{shown}:{port}/v1", flush=True)  # noqa: T201
        if made:
            print(f"the key of this run is {key}; set {KEY} for one that stays", flush=True)  # noqa: T201
        uvicorn.Server(config).run(sockets=[listening])
