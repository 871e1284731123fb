"""The ASGI application of `vectorclm serve`: the routes of OpenAI's API, a chat page, health and metrics."""

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Send

from vectorclm.inference.engine import Engine
from vectorclm.inference.http_limits import BodyLimit
from vectorclm.inference.openai_errors import Refusal, explain
from vectorclm.inference.openai_requests import ChatRequest, Generation, TextRequest, check_name
from vectorclm.inference.openai_responses import ChatResponse, ResponseBuilder, TextResponse, WholeChoice
from vectorclm.inference.server_access import ApiGuard, KeyCheck
from vectorclm.inference.server_metrics import RequestLog, RequestRecord, ServerMetrics

logger = logging.getLogger(__name__)

router = APIRouter()
READ = ["GET", "HEAD"]


@dataclass
class ServedModel:
    """The model of a server, its name in the API, and its engine."""

    name: str
    engine: Engine
    metrics: ServerMetrics
    page: str  # the HTML of the chat page
    started: int = field(default_factory=lambda: int(time.time()))

    def description(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "vectorclm"}
        return {**model, "max_model_len": self.engine.model.context}  # vLLM's field

    def builder(self, kind: type[ResponseBuilder], generation: Generation) -> ResponseBuilder:
        """The builder of the response to a request."""
        fingerprint, used = f"vc_{self.engine.model.content[:12]}", generation.prompt_tokens
        return kind(self.name, fingerprint, used, generation.include_usage, generation.continuous_usage)


def served_model(request: Request) -> ServedModel:
    """The model of the server that a request came to."""
    served: ServedModel = request.app.state.served
    return served


Served = Annotated[ServedModel, Depends(served_model)]


def make_app(
    engine: Engine, name: str, key: str, hosts: Sequence[str], origins: Sequence[str] = (), *, by_address: bool = False
) -> ASGIApp:
    """The ASGI application. It answers to the host names in `hosts`, and to pages of `origins`; see `Guard`."""
    metrics = ServerMetrics(engine)
    page = files("vectorclm.inference").joinpath("chat.html").read_text(encoding="utf-8")
    api = FastAPI(title="VectorCLM", docs_url=None, redoc_url=None, openapi_url=None, strict_content_type=False)
    api.state.served = ServedModel(name, engine, metrics, page)
    api.include_router(router)
    for kind, handler in HANDLERS.items():
        api.add_exception_handler(kind, handler)
    app: ASGIApp = KeyCheck(BodyLimit(api), key)
    if origins:
        headers = ["Authorization", "Content-Type"]
        # Clients of OpenAI's name their system in headers of their own, so any header is allowed.
        app = CORSMiddleware(app, origins, ["GET", "POST"], [*headers, "*"], allow_private_network=True)
    return RequestLog(ApiGuard(app, hosts, origins, by_address=by_address), metrics)


@router.api_route("/", methods=READ)
async def home(served: Served) -> Response:
    """The chat page."""
    return HTMLResponse(served.page, headers=page_headers(served.page))


@router.api_route("/health", methods=READ)
async def health() -> Response:
    """Whether the server answers requests; needs no key."""
    return JSONResponse({"status": "ok"})


@router.api_route("/metrics", methods=READ)
async def prometheus_metrics(served: Served) -> Response:
    """Metrics for Prometheus."""
    return Response(served.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.api_route("/v1/models", methods=READ)
async def models(served: Served) -> Response:
    """The list of models, which has one."""
    return JSONResponse({"object": "list", "data": [served.description()]})


@router.api_route("/v1/models/{name:path}", methods=READ)
async def one_model(name: str, served: Served) -> Response:
    """The model, by its name."""
    check_name(name, served.name)
    return JSONResponse(served.description())


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request, served: Served) -> Response:
    """Answer a conversation."""
    return await respond(request, served, body, ChatResponse)


@router.post("/v1/completions")
async def completions(body: TextRequest, request: Request, served: Served) -> Response:
    """Continue a text."""
    return await respond(request, served, body, TextResponse)


async def respond(
    request: Request, served: ServedModel, body: ChatRequest | TextRequest, kind: type[ResponseBuilder]
) -> Response:
    """Generate the answers to a request, as a stream or whole. Raises Refusal where that is impossible."""
    check_name(body.model, served.name)
    generation = await asyncio.to_thread(body.read, served.engine.model)
    builder, record = served.builder(kind, generation), request.state.record
    record.prompt_tokens = generation.prompt_tokens
    if generation.stream:
        served.engine.check_room()
        return EventStream(events(served.engine, generation, builder, record))
    return await while_connected(request, answer_whole(served.engine, generation, builder, record))


class EventStream(StreamingResponse):
    """Server-sent events; their generator is closed as soon as the client is gone."""

    def __init__(self, made: AsyncGenerator[str, None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(made, media_type="text/event-stream", headers=headers)
        self._made = made

    async def stream_response(self, send: Send) -> None:
        async def send_and_pause(message: Message) -> None:
            await send(message)
            await asyncio.sleep(0)  # without a pause the loss of the connection is not noticed while pieces are ready

        async with aclosing(self._made):
            await super().stream_response(send_and_pause)


async def events(
    engine: Engine, generation: Generation, builder: ResponseBuilder, record: RequestRecord
) -> AsyncGenerator[str, None]:
    """The answers as server-sent events."""
    try:
        for index, choice in enumerate(generation.choices):
            if opening := builder.opening(index):
                yield event(opening)
            if choice.echo:
                yield event(builder.event(index, choice.echo))
        async with aclosing(engine.answers(generation.choices)) as pieces:
            async for index, delta in pieces:
                builder.tokens += delta.tokens
                record.add(delta.tokens)
                if delta.text or delta.logprobs:
                    yield event(builder.event(index, delta.text, logprobs=delta.logprobs))
                if delta.finish:
                    yield event(builder.event(index, "", delta.finish))
    except Exception as error:  # the status is sent already, so the stream carries the error
        if not isinstance(error, Refusal):
            logger.exception("an answer failed")
        yield event(explain(error).body())
        return
    if generation.include_usage:
        yield event(builder.usage_event())
    yield "data: [DONE]\n\n"


def event(value: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def answer_whole(
    engine: Engine, generation: Generation, builder: ResponseBuilder, record: RequestRecord
) -> Response:
    """The answers in one response."""
    answers = [WholeChoice(choice.echo) for choice in generation.choices]
    async with aclosing(engine.answers(generation.choices)) as pieces:
        async for index, delta in pieces:
            builder.tokens += delta.tokens
            record.add(delta.tokens)
            answers[index].text += delta.text
            answers[index].logprobs += delta.logprobs
            answers[index].finish = delta.finish
    return JSONResponse(builder.whole(answers))


async def while_connected(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """Await the answer to a request whose body has been read; cancel it when the client leaves."""
    work, left = asyncio.ensure_future(answer), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait([work, left], return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=499)  # nginx's number; no client reads it
    finally:
        left.cancel()
        work.cancel()


def refused(request: Request, error: Exception) -> Response:
    """The response to a refused request."""
    return explain(error).response()


def invalid(request: Request, error: Exception) -> Response:
    """The response to a request whose body or path is not valid."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return Refusal(f"the body is not JSON: {first['ctx']['error']}", code="invalid_json").response()
    if not place:
        return Refusal("the body must be a JSON object", code="invalid_json").response()
    if first["type"] == "extra_forbidden":
        key = ".".join(place)
        message, code = f"Unrecognized request argument supplied: {key}", "unknown_parameter"
        return Refusal(message, param=key, code=code).response()
    if first["type"] == "missing":
        return Refusal(f"{place[0]} is missing", param=place[0], code="missing_required_parameter").response()
    return Refusal(f"{place[0]}: {first['msg']}", param=place[0], code="invalid_value").response()


def not_served(request: Request, error: Exception) -> Response:
    """The response to an unknown path or method, and to a body that cannot be parsed."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400:
        return Refusal("the body is not JSON", code="invalid_json").response()
    message = f"{request.method} {request.url.path} is not served here"
    return Refusal(message, error.status_code, code="unknown_url").response()


HANDLERS = {
    Refusal: refused,
    RequestValidationError: invalid,
    HTTPException: not_served,
    Exception: refused,  # Starlette logs these
}


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
