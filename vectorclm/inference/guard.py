"""ASGI middleware against requests of other web pages: checks the Host and the Origin of each request and websocket.

A browser lets any page send requests to a server on this machine. A page whose name resolves to this machine (DNS
rebinding) can read the responses, too. Such requests have another Host or another Origin.
"""

import ipaddress
import re
from collections.abc import Collection, Mapping, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vectorclm.errors import ConfigError

ALLOWED = "VECTORCLM_ALLOWED_HOSTS"  # the variable with more names of the server, such as behind a proxy
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
AUTHORITY = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{0,5}))?", re.ASCII)
ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<authority>[^/]+)")
PORTS = {"http": 80, "https": 443}
FOREIGN_PAGE = (
    "pages of other origins have no access to this server: open its own page, or send no header Origin; a proxy has to "
    "pass the header Host on"
)
FOREIGN_SITE = "other sites have no access to this server: open its address in a tab of its own"
POLICY_VIOLATION = 1008  # close code of a websocket


class Guard:
    """Refuses requests with a Host outside `hosts`, or from another origin; without `hosts`, any Host is allowed.

    With `by_address` a Host may also be any IP address: a name of a foreign page that resolves to this machine is none.
    Pages of `origins` have access, too ("*": those of any). Other sites may not show the pages in a frame either, where
    they could steal clicks.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str] | None,
        origins: Collection[str] = (),
        *,
        by_address: bool = False,
    ) -> None:
        self.app, self.origins, self.by_address = app, origins, by_address
        self.hosts = None if hosts is None else {normalized(host) for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def send_unframed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])  # optional in ASGI
                MutableHeaders(scope=message).setdefault("X-Frame-Options", "SAMEORIGIN")
            await send(message)

        reason = self.refusal(Headers(scope=scope), scope.get("method", "GET"))
        if reason is None:
            await self.app(scope, receive, send_unframed)
        elif scope["type"] == "http":
            await self.refuse(reason)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": reason[:120]})

    def refuse(self, reason: str) -> ASGIApp:
        """The response to a refused request."""
        return PlainTextResponse(f"{reason}\n", 403, {"X-Content-Type-Options": "nosniff"})

    def refusal(self, headers: Headers, method: str) -> str | None:
        """The reason to refuse a request with these headers; None where it is allowed."""
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or (host := split_authority(hosts[0])) is None:
            return "a request must name this server, once, in its header Host"
        if self.hosts is not None and host[0] not in self.hosts and not (self.by_address and is_address(host[0])):
            return f"this server is not called {host[0]}: name it by its address, or list the name in {ALLOWED}"
        if origins:
            own = len(origins) == 1 and (is_own(origins[0], host) or not {"*", origins[0]}.isdisjoint(self.origins))
            return None if own else FOREIGN_PAGE
        return FOREIGN_SITE if is_embedded(headers, method) else None


def split_authority(text: str) -> tuple[str, int | None] | None:
    """Split a text such as `Localhost.:4200` into the normalized host and the port; None where there is no host."""
    match = AUTHORITY.fullmatch(text.strip().lower())
    if match is None or (name := normalized(match["name"])) == "":
        return None
    return name, int(match["port"]) if match["port"] else None


def normalized(name: str) -> str:
    """Normalize a host: in lower case, without a dot at the end, an IPv6 address short and in brackets."""
    name = name.strip().lower().removesuffix(".")
    if ":" not in name:
        return name
    try:
        return f"[{ipaddress.IPv6Address(name.removeprefix('[').removesuffix(']'))}]"
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    """Whether a normalized host is an IP address."""
    try:
        ipaddress.IPv6Address(name[1:-1]) if name.startswith("[") else ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return True


def is_own(origin: str, host: tuple[str, int | None]) -> bool:
    """Whether an origin is the host of the request; `localhost` and `127.0.0.1` are the same."""
    match = ORIGIN.fullmatch(origin.strip().lower())
    page = split_authority(match["authority"]) if match is not None else None
    if match is None or page is None:
        return False  # such as `null`, the origin of a sandboxed frame
    default = PORTS[match["scheme"]]
    places = [("127.0.0.1" if name == "localhost" else name, port or default) for name, port in (page, host)]
    return places[0] == places[1]


def is_embedded(headers: Headers, method: str) -> bool:
    """Whether the browser's headers say that a page of another site embeds this as a script, an image or a frame."""
    if headers.get("sec-fetch-site") not in ("cross-site", "same-site"):
        return False
    followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest", "document") == "document"
    return not (followed and method in ("GET", "HEAD"))


def allowed_hosts(environment: Mapping[str, str]) -> list[str]:
    """The names of a server that listens on this machine alone, and those in VECTORCLM_ALLOWED_HOSTS.

    Raises ConfigError for a name in the variable that is not a host.
    """
    further = [name.strip() for name in environment.get(ALLOWED, "").split(",") if name.strip()]
    for name in further:
        if (split := split_authority(name)) is None or split[1] is not None:
            raise ConfigError(f"{ALLOWED}: {name!r} is not a host's name, such as mlflow.example.com, without a port")
    return [*LOOPBACK, *map(normalized, further)]


def allowed_origins(origins: Sequence[str]) -> list[str]:
    """The origins of `--cors` as browsers write them. Raises ConfigError for a text that is not an origin, or *."""
    found = []
    for text in origins:
        origin = text.strip().lower().removesuffix("/")
        match = ORIGIN.fullmatch(origin)
        place = split_authority(match["authority"]) if match is not None else None
        if origin != "*" and (match is None or place is None):
            raise ConfigError(f"--cors {text!r} is not an origin, such as https://chat.example.com, and not *")
        if match is not None and place is not None:  # browsers leave the default port out
            name, port = place
            default = port is None or port == PORTS[match["scheme"]]
            origin = f"{match['scheme']}://{name}" + ("" if default else f":{port}")
        found.append(origin)
    return found
