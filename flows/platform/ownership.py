"""Ownership of a running platform: what `up` started in a home, and with which store and ports."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.platform import private
from flows.platform.config import PlatformConfig
from flows.platform.process import Service, holder
from vectorclm.errors import ConfigError
from vectorclm.store.artifact import Store

ABOUT = "about.json"  # beside the records of the services


def remember(config: PlatformConfig) -> None:
    """Write down the store and ports of the platform, for messages of commands with other settings. No secrets."""
    folder = config.home / "platform"
    private.create_folder(folder)
    file = folder / ABOUT
    file.touch(mode=0o600)
    file.write_text(json.dumps(_about(config)), encoding="utf-8")


def ran_here(config: PlatformConfig) -> bool:
    """Whether a platform ever ran in the home."""
    return (config.home / "platform").is_dir()


def check_folders(config: PlatformConfig) -> None:
    """Raise ConfigError where other users control the folders of the platform, and so its records and settings."""
    for folder in (config.home / "platform", config.home / ".prefect"):
        private.check_folder(folder)


def check_listeners(config: PlatformConfig) -> None:
    """Raise ConfigError where a program that `up` did not start would get the password of Prefect or MLflow.

    After a restart of the machine any user's program can listen at their ports.
    """
    prefect, mlflow = config.servers()
    for server, secret in ((prefect, config.prefect_password), (mlflow, config.mlflow_admin_password)):
        if secret is None or server.port is None or server.holds_its_port():
            continue
        if (held := holder(server.port)) is not None:
            raise ConfigError(
                f"port {server.port} is held by {held}, not by the {server.name} that `vectorclm up` started, so no "
                "password is sent there: end it and run `vectorclm up`, or give the options that `up` had"
            )


def reasons_to_leave_alone(config: PlatformConfig) -> list[str]:
    """Reasons why a command with these settings must not touch the platform, a line each; empty if it may."""
    services = [*config.servers(), *config.workers()]
    started = [service for service in services if service.record.exists()]
    if not started:
        state = f"the platform of {config.home} is stopped" if ran_here(config) else f"no platform ran in {config.home}"
        return [f"{state}: `vectorclm up` starts {'it' if ran_here(config) else 'one'}", *_ports_of_others(services)]
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


def _difference(config: PlatformConfig) -> str:
    """The settings that differ, without secrets."""
    with suppress(OSError, ValueError):
        known = dict(json.loads((Path(config.home) / "platform" / ABOUT).read_text(encoding="utf-8")))
        mine = _about(config)
        names = [name for name in mine if known.get(name, mine[name]) != mine[name]]
        if differing := [f"{name} {known[name]}, not {mine[name]}" for name in names]:
            return f" ({'; '.join(differing)})"
    return ""
