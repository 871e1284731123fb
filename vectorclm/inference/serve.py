"""Serve a model over OpenAI's API: `/v1/chat/completions`, `/v1/completions`, `/v1/models`, and a chat page at `/`.

The answers of all clients are generated together, in one continuous batch. Options that are not implemented are refused
with OpenAI's own errors.
"""

import asyncio
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

from vectorclm.errors import ConfigError
from vectorclm.inference.chat import open_language_model
from vectorclm.inference.engine import Engine
from vectorclm.inference.guard import ALLOWED, allowed_hosts, allowed_origins
from vectorclm.inference.http_limits import BACKLOG, HEAD_BYTES, HEAD_SECONDS, LimitedHTTP
from vectorclm.inference.openai_app import make_app
from vectorclm.inference.server_access import KEY, find_key, is_loopback
from vectorclm.runtime.devices import Runtime

ANSWER_SECONDS = 3  # that answers may take after a signal
SHUTDOWN_SECONDS = 5  # until connections are cut
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
    "loggers": {
        "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "vectorclm": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}


class ModelServer(uvicorn.Server):
    """A uvicorn server that ends long answers with an error of the API before connections are cut."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self.engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the server after a signal."""
        timer = asyncio.get_running_loop().call_later(ANSWER_SECONDS, self.engine.close)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            self.engine.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where the address is not this machine's, or the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}, port {port}: {error}; choose another --host or --port") from error
    # Connections inherit this; with Nagle's algorithm an event of a stream can wait 40 ms for an acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def host_names(environment: Mapping[str, str], host: str) -> tuple[list[str], bool]:
    """The names of the server at an address, and whether it also answers to any IP address.

    Where others can reach the server and no names are set, those are this machine's own. Raises ConfigError for a
    setting that is not a host's name.
    """
    names = allowed_hosts(environment)
    if is_loopback(host) or environment.get(ALLOWED):
        return names, False
    return [*names, socket.gethostname(), socket.getfqdn()], True


class ServerAddress(NamedTuple):
    """Where a server listens, and the origins of web pages that may use it."""

    host: str
    port: int
    cors: Sequence[str] = ()


def serve(address: str, runtime: Runtime, place: ServerAddress, name: str | None, parallel: int | None = None) -> None:
    """Serve the model at an address until interrupted. Raises VectorCLMError where the server cannot start."""
    host, port, _ = place
    key, made = find_key(os.environ, host, terminal=sys.stdout.isatty())
    origins = allowed_origins(place.cors)
    engine = Engine(open_language_model(address, runtime), parallel)
    name = name or Path(address).absolute().name
    with listen(host, port) as listening:
        shown, port = f"[{host}]" if ":" in host else host, listening.getsockname()[1]
        hosts, by_address = host_names(os.environ, host)
        config = uvicorn.Config(
            make_app(engine, name, key, [*hosts, shown], origins, by_address=by_address),
            log_config=LOGGING,
            access_log=False,
            server_header=False,
            lifespan="off",
            http=LimitedHTTP,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_keep_alive=HEAD_SECONDS,
            backlog=BACKLOG,
            ws="none",
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        secret = f"#key={key}" if made else ""  # browsers never send the part after # to a server
        print(f"{name} at http://{shown}:{port}/{secret} and http://{shown}:{port}/v1", flush=True)  # noqa: T201
        if made:
            print(f"the key of this run is {key}; set {KEY} for one that stays", flush=True)  # noqa: T201
        ModelServer(config, engine).run(sockets=[listening])
