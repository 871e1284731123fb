"""A log line for each request, and metrics for Prometheus."""

import logging
import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vectorclm.inference.engine import Engine

logger = logging.getLogger(__name__)

METHODS = ("GET", "HEAD", "POST", "OPTIONS")
POLLED = ("/health", "/metrics")  # no log lines, as monitors ask again and again
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass
class RequestRecord:
    """What one request used."""

    started: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    tokens: int = 0  # generated
    first_token: float | None = None  # seconds until then

    def add(self, tokens: int) -> None:
        """Count generated tokens."""
        self.tokens += tokens
        if self.first_token is None:
            self.first_token = self.seconds

    @property
    def seconds(self) -> float:
        """The time since the request arrived."""
        return time.perf_counter() - self.started


class ServerMetrics:
    """The metrics of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vectorclm_requests", "Finished requests", ["route", "method", "status"], registry=registry
        )
        self.seconds = Histogram(
            "vectorclm_request_seconds", "Time of a request", ["route"], registry=registry, buckets=SECONDS
        )
        self.first_token = Histogram(
            "vectorclm_time_to_first_token_seconds",
            "Time from a request to its first token",
            registry=registry,
            buckets=SECONDS,
        )
        self.prompt_tokens = Counter("vectorclm_prompt_tokens", "Tokens of prompts", registry=registry)
        self.tokens = Counter("vectorclm_generated_tokens", "Generated tokens", registry=registry)
        waiting = Gauge("vectorclm_requests_waiting", "Requests that wait for their turn", registry=registry)
        waiting.set_function(lambda: engine.waiting)
        running = Gauge("vectorclm_answers_running", "Answers that are being generated", registry=registry)
        running.set_function(lambda: engine.running)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def count(self, record: RequestRecord, route: str, method: str, status: int) -> None:
        """Count a finished request."""
        self.requests.labels(route, method, str(status)).inc()
        self.seconds.labels(route).observe(record.seconds)
        self.prompt_tokens.inc(record.prompt_tokens)
        self.tokens.inc(record.tokens)
        if record.first_token is not None:
            self.first_token.observe(record.first_token)


class RequestLog:
    """ASGI middleware that counts each request and writes one log line.

    The line names the route, never the path, the query or a header: a client can write its key in any of them.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record, status, complete = RequestRecord(), 499, False
        scope.setdefault("state", {})["record"] = record

        async def send_and_note(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                complete = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.count(record, route, method, status)
            if route not in POLLED or status != 200:
                tokens = f", {record.prompt_tokens} prompt and {record.tokens} new tokens" if record.tokens else ""
                left = "" if complete and status != 499 else ", the client left"
                client = (scope.get("client") or ("-",))[0]
                line = f"{client} {method} {route} {status}{tokens}, {record.seconds:.3f} s{left}"
                logger.info(line)
