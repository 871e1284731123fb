"""What `vectorclm doctor --security` finds open: addresses, passwords, foreign pages, file modes, visible secrets.

Nothing is read from settings that the system or a request can tell, no password is sent, and nothing is changed.
"""

import ipaddress
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
from pydantic import SecretStr
from rich.console import Console

from flows.platform.config import SECRETS, PlatformConfig
from flows.platform.machine_checks import Finding
from flows.platform.ownership import reasons_to_leave_alone
from flows.platform.process import HOST, PREFECT, Service

SECONDS = 20  # for which an answer is waited
FOREIGN = "foreign.invalid"
# An address of each server that must not answer without a password, and what gives it one.
ASKING = {
    PREFECT: ("/api/admin/settings", "remove PREFECT_AUTH=none, then `vectorclm down` and `vectorclm up`"),
    "mlflow": (
        "/api/2.0/mlflow/experiments/search?max_results=1",
        "set MLFLOW_ADMIN_PASSWORD and MLFLOW_SECRET_KEY, then `vectorclm down` and `vectorclm up`",
    ),
}
SECRET_NAME = re.compile(r"(PASSWORD|SECRET_KEY|SECRET_ACCESS_KEY|SESSION_TOKEN|TOKEN|AUTH_STRING)$")
SHORTEST = 8  # characters of a value that is searched for
# Of a platform's home: databases, logs, records of services and passwords.
PRIVATE = ("platform/*.env", "platform/*.log*", "platform/*.json", ".prefect/*.db*", "*.db", "*.db-*")
ADDRESSES = ("aws_endpoint_url", "vectorclm_url", "vectorclm_mlflow_url")


def security(config: PlatformConfig, env_file: Path | None, console: Console) -> bool:
    """Print a line for each part of a platform, `ok` or `open` with what to do; False where one is open.

    Where no platform runs with these settings, the lines say so. Raises ConfigError where the file of the password
    cannot be read.
    """
    services = [*config.servers(), *config.workers()]
    reasons = [Finding(False, reason) for reason in reasons_to_leave_alone(config)]
    well = True
    for finding in reasons or _everything(config, services, env_file):
        mark, style = ("ok  ", "green") if finding.good else ("open", "red")
        console.print(f"[{style}]{mark}[/] ", end="")
        console.print(finding.what, highlight=False, markup=False, soft_wrap=True)
        well &= finding.good
    return well


def _everything(config: PlatformConfig, services: list[Service], env_file: Path | None) -> Iterator[Finding]:
    for service in services:
        yield from addresses(service)
    for service in services:
        if service.name in ASKING and service.process() is not None:
            yield from requests(service)
    yield from modes(config.home, env_file)
    yield from arguments(services, secrets_of(config, services))
    yield from links(addresses_of(config, services))


def addresses(service: Service) -> Iterator[Finding]:
    """Where a service and its children listen, as the system says: on this machine's loopback alone, or open."""
    family = _family(service)
    if not family:
        yield Finding(True, f"{service.name} does not run, so it does not listen")
        return
    found: set[tuple[str, int]] = set()
    for process in family:
        try:
            connections = process.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        except psutil.Error as error:
            yield Finding(False, f"{service.name}: its sockets cannot be read ({error}): run this as its user or root")
            return
        found |= {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN and c.laddr}
    wide = sorted(f"{ip}:{port}" for ip, port in found if not _is_loopback(ip))
    if wide:
        fix = "other machines reach it; `vectorclm down` and `vectorclm up` start it on 127.0.0.1"
        yield Finding(False, f"{service.name} listens on {', '.join(wide)}: {fix}")
    else:
        places = ", ".join(sorted(f"{ip}:{port}" for ip, port in found)) or "no port"
        yield Finding(True, f"{service.name} listens on {places}")


def requests(service: Service) -> Iterator[Finding]:
    """Whether a server refuses a request without a password, with a foreign Host and with a foreign Origin; tried."""
    path, fix = ASKING[service.name]
    guard = f"run `vectorclm down` and `vectorclm up`, which start {service.name} behind its guard"
    tries: list[tuple[str, dict[str, str], int, str]] = [
        ("without a password", {}, 401, f"every user of this machine can use it: {fix}"),
        ("with a foreign Host", {"Host": FOREIGN}, 403, f"a web page in your browser can use it: {guard}"),
        (
            "with a foreign Origin",
            {"Origin": f"http://{FOREIGN}"},
            403,
            f"a web page in your browser can use it: {guard}",
        ),
    ]
    url = f"http://{HOST}:{service.port}{path}"
    with httpx.Client(trust_env=False, timeout=SECONDS) as client:
        for what, headers, refused, remedy in tries:
            try:
                status = client.get(url, headers=headers).status_code
            except httpx.HTTPError as error:
                yield Finding(False, f"{service.name} does not answer ({error}): run `vectorclm doctor`")
                return
            good = status == refused
            verdict = f"refuses a request {what}" if good else f"does not refuse a request {what} ({status})"
            yield Finding(good, f"{service.name} {verdict}" + ("" if good else f": {remedy}"))


def modes(home: Path, env_file: Path | None) -> Iterator[Finding]:
    """Folders and files with secrets that other users of this machine may read or change."""
    folders = [folder for folder in (home / "platform", home / ".prefect") if folder.is_dir()]
    files = {file for pattern in PRIVATE for file in home.glob(pattern) if file.is_file()}
    files |= {env_file} if env_file is not None and env_file.is_file() else set()
    wrong = 0
    for path in [*folders, *sorted(files)]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            wrong += 1
            right = "700" if path.is_dir() else "600"
            yield Finding(False, f"{path} has mode {mode:o}: other users have access; `chmod {right} {path}`")
    if not wrong:
        yield Finding(True, f"{len(folders)} folders and {len(files)} files with secrets are the owner's alone")


def arguments(services: Iterable[Service], secrets: Mapping[str, str]) -> Iterator[Finding]:
    """Secrets, by name, in the argument lists of services and their children: every user can read those."""
    good = True
    for service in services:
        for process in _family(service):
            with suppress(psutil.Error):
                line = "\0".join(process.cmdline())
                for name in sorted(name for name, value in secrets.items() if value in line):
                    good = False
                    fix = "pass it in the environment, end the process, and change the secret"
                    what = f"process {process.pid} of {service.name} has {name} in its arguments"
                    yield Finding(False, f"{what}, which every user can read: {fix}")
    if good:
        yield Finding(True, "no argument list has a secret of the platform")


def secrets_of(config: PlatformConfig, services: Iterable[Service]) -> dict[str, str]:
    """The values to search for by the names of their settings and variables; a password alone, without its user."""
    found: dict[str, str] = {}
    for name in SECRETS:
        value = getattr(config, name)
        if isinstance(value, SecretStr):
            found[name.upper()] = value.get_secret_value()
    for environment in _environments(services):
        found |= {name: value for name, value in environment.items() if SECRET_NAME.search(name)}
    if (auth := config.prefect_password) is not None:
        found["PREFECT_AUTH"] = auth.partition(":")[2]
    if (database := config.vectorclm_database) is not None:
        found["VECTORCLM_DATABASE"] = urlsplit(database.get_secret_value()).password or ""
    receiver = found.get("VECTORCLM_NOTIFY", "")
    if not receiver.startswith("webhook:"):
        found.pop("VECTORCLM_NOTIFY", None)  # a mail address or a block's name is no secret
    else:
        found["VECTORCLM_NOTIFY"] = receiver.removeprefix("webhook:")
    return {name: value for name, value in found.items() if len(value) >= SHORTEST}


def addresses_of(config: PlatformConfig, services: Iterable[Service]) -> dict[str, str]:
    """The URLs by which the platform and its users reach other machines, by the names of their settings."""
    found = {name.upper(): str(getattr(config, name) or "") for name in ADDRESSES}
    found["VECTORCLM_NOTIFY"] = config.notify.removeprefix("webhook:") if config.notify.startswith("webhook:") else ""
    for environment in _environments(services):
        found |= {name: value for name, value in environment.items() if name.startswith("AWS_ENDPOINT_URL")}
    return {name: url for name, url in found.items() if url}


def links(urls: Mapping[str, str]) -> Iterator[Finding]:
    """Plain http to another machine, by the name of its setting; the URL, which may be a secret, is not shown."""
    plain = []
    for name, url in sorted(urls.items()):
        at = urlsplit(url)
        if at.scheme == "http" and not _is_loopback(at.hostname or ""):
            plain.append(name)
    for name in plain:
        yield Finding(False, f"{name} is plain http to another machine: the network can read it; use https://")
    if not plain:
        yield Finding(True, "no setting names another machine by plain http")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback
    return False


def _family(service: Service) -> list[psutil.Process]:
    """The process of a service and its descendants; empty where it does not run."""
    process = service.process()
    with suppress(psutil.Error):
        return [] if process is None else [process, *process.children(recursive=True)]
    return []


def _environments(services: Iterable[Service]) -> Iterator[dict[str, str]]:
    for service in services:
        with suppress(psutil.Error):
            if (process := service.process()) is not None:
                yield process.environ()
