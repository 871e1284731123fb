"""Ownership of a running platform: what `up` started in a home, and with which store and ports."""

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.platform import credentials, private
from flows.platform.config import PlatformConfig
from flows.platform.process import Service, holder, running_homes
from vectorclm.errors import ConfigError
from vectorclm.store.artifact import Store

ABOUT = "about.json"  # beside the records of the services


def remember(config: PlatformConfig) -> None:
    """Write down the store and ports of the platform, for messages of commands with other settings. No secrets."""
    folder = config.home / "platform"
    private.create_folder(folder)
    file = folder / ABOUT
    file.touch(mode=0o600)
    places = {"home": str(config.home), "prefect_page": config.prefect_page, "mlflow_page": config.mlflow_page}
    written = _about(config) | places | {"variables": credentials.names()}
    file.write_text(json.dumps(written), encoding="utf-8")


def before(home: Path) -> dict[str, Any]:
    """The places of a platform when `up` was run last, also where its home was copied from elsewhere since."""
    return _known(home)


def remembered(config: PlatformConfig) -> PlatformConfig:
    """The settings with the ports that the platform of the home was started with."""
    ports = {name: port for name, port in _known(config.home).items() if name in ("prefect_port", "mlflow_port")}
    return config.model_copy(update=ports)


def ran_here(config: PlatformConfig) -> bool:
    """Whether a platform ever ran in the home."""
    return (config.home / "platform").is_dir()


def check_folders(config: PlatformConfig) -> None:
    """Raise ConfigError where other users control the folders of the platform, and so its records and settings."""
    for folder in (config.home / "platform", config.home / ".prefect"):
        private.check_folder(folder)


def check_listeners(config: PlatformConfig) -> None:
    """Raise ConfigError where a program that `up` did not start would get the password of Prefect or MLflow."""
    prefect, mlflow = config.servers()
    for server, secret in ((prefect, config.prefect_password), (mlflow, config.mlflow_admin_password)):
        if secret is not None:
            server.check_listener()


def recall_credentials(config: PlatformConfig) -> str:
    """Take credentials that `up` had, and this command lacks, from a running service; a message if some are lost."""
    known: list[str] = _known(config.home).get("variables", [])
    lost = credentials.recall([*config.workers(), *config.servers()], known)
    if not lost:
        return ""
    return (
        f"`vectorclm up` had {', '.join(lost)} in its environment, which this command lacks, and no service is left "
        "that has them: set them and run this again"
    )


def running_elsewhere(home: Path | None) -> list[str]:
    """The platforms that run on this machine in other homes, a line each, with the options that name the platform."""
    others = [other for other in running_homes() if other != home]
    return [
        f"a platform runs in {other}: write the command as {command_for(other)}, with the --env-file that `up` had, "
        "if any"
        for other in others
    ]


def command_for(home: Path) -> str:
    """A command with the options, and the variable if one is needed, that name the platform of a home."""
    known = _known(home)
    store = str(known.get("store", home))
    words = ["--store", store]
    for name in ("prefect_port", "mlflow_port"):
        default = PlatformConfig.model_fields[name].default
        if known.get(name, default) != default:
            words += [f"--{name.replace('_', '-')}", str(known[name])]
    variable = "" if store == str(home) else f"VECTORCLM_HOME={shlex.quote(str(home))} "
    return f"`{variable}vectorclm COMMAND {shlex.join(words)}`"


def reasons_to_leave_alone(config: PlatformConfig) -> list[str]:
    """Reasons why a command with these settings must not touch the platform, a line each; empty if it may."""
    services = [*config.servers(), *config.workers()]
    started = [service for service in services if service.was_started()]
    if not started:
        elsewhere = running_elsewhere(config.home)
        if ran_here(config):
            stopped = f"the platform of {config.home} is stopped: `vectorclm up` starts it"
        elif elsewhere:
            stopped = f"no platform ran in {config.home}"
        else:
            stopped = (
                f"no platform ran in {config.home}, and none runs on this machine: run this in the folder where `up` "
                "was run, or with its --store or --env-file; `vectorclm up` starts a new, empty platform"
            )
        return [stopped, *elsewhere, *_ports_of_others(services)]
    if others := [service.name for service in started if not service.has_these_settings()]:
        return [
            f"the platform of {config.home} was started with other settings{_difference(config)}: give doctor the "
            "--store, --env-file and ports that `up` had, or stop it by `vectorclm down` with them "
            f"({', '.join(others)})"
        ]
    return []


def _ports_of_others(services: list[Service]) -> list[str]:
    found = []
    for service in services:
        if service.port is not None and (held := holder(service.port)) is not None:
            found.append(f"port {service.port}, which {service.name} would take, is held by {held}")
    return found


def _about(config: PlatformConfig) -> dict[str, Any]:
    ports = {"prefect_port": config.prefect_port, "mlflow_port": config.mlflow_port}
    return {"store": Store(config.vectorclm_store).uri, **ports}


def _known(home: Path) -> dict[str, Any]:
    """What `up` wrote down about the platform of a home; empty where it wrote nothing, or others could have."""
    with suppress(OSError, ValueError, TypeError, ConfigError):
        return dict(json.loads(private.read_text(home / "platform" / ABOUT)))
    return {}


def _difference(config: PlatformConfig) -> str:
    """The settings that differ, without secrets."""
    known, mine = _known(config.home), _about(config)
    names = [name for name in mine if known.get(name, mine[name]) != mine[name]]
    differing = [f"{name} {known[name]}, not {mine[name]}" for name in names]
    return f" ({'; '.join(differing)})" if differing else ""
