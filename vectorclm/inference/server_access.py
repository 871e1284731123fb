"""Who may use `vectorclm serve`: the key, and the check of Host and Origin in the API's own errors."""

import ipaddress
import secrets
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vectorclm.errors import ConfigError
from vectorclm.inference.guard import Guard
from vectorclm.inference.openai_errors import Refusal

KEY = "VECTORCLM_API_KEY"  # the variable with the key; an argument would show in the list of processes
KEY_CHARACTERS = 16  # at least, in a key
OPEN = ("/", "/health")  # paths that need no key


class ApiGuard(Guard):
    """Checks the Host and the Origin of each request; refuses in the form of the API."""

    def refuse(self, reason: str) -> ASGIApp:
        return Refusal(reason, 403, code="forbidden").response()


class KeyCheck:
    """ASGI middleware that refuses requests without the key; the chat page and the health check need none."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and scope["path"] not in OPEN and not self._has_key(Headers(scope=scope)):
            app = Refusal(f"the key is missing or wrong: it is what {KEY} is", 401, code="invalid_api_key").response()
        await app(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        kind, _, key = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and secrets.compare_digest(key.encode(), self._key)


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
