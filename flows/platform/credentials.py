"""Credentials that `vectorclm up` had in its environment, for the services that a later command starts again.

No value is written to a file: it is read from the environment of a service that still runs. The home keeps the names of
the variables only, so that a command can say what is missing once no service is left.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress

import psutil

from flows.platform.process import Service

# The variables that say who one is, by the prefix of all variables of a provider.
PROVIDERS = {
    "AWS_": (
        "AWS_ACCESS_KEY_ID",
        "AWS_PROFILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    ),
    "AZURE_": ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"),
    "GOOGLE_": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "HF_": ("HF_TOKEN",),
}
IDENTITIES = [name for names in PROVIDERS.values() for name in names]


def names() -> list[str]:
    """The variables of this process that say who one is to a store or a hub."""
    return [name for name in IDENTITIES if os.environ.get(name)]


def recall(services: Iterable[Service], known: Iterable[str]) -> list[str]:
    """Take the credentials that this process lacks from a running service into its environment.

    The credentials of this process win: of a provider whose credentials it has, nothing is taken. Returns the names in
    `known`, those that `up` had, that no service has any more.
    """
    environments = [_environment_of(service) for service in services]
    for prefix, identities in PROVIDERS.items():
        if any(os.environ.get(name) for name in identities):
            continue
        found = ({name: value for name, value in each.items() if name.startswith(prefix)} for each in environments)
        for name, value in next(filter(None, found), {}).items():
            os.environ.setdefault(name, value)
    had = set(names())
    lost = [identities for identities in PROVIDERS.values() if not had.intersection(identities)]
    return [name for name in known if any(name in identities for identities in lost)]


def _environment_of(service: Service) -> Mapping[str, str]:
    with suppress(psutil.Error, OSError):
        if (process := service.process()) is not None:
            return process.environ()
    return {}
