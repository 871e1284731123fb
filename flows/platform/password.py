"""The password that `vectorclm up` creates for Prefect: create it, store it, read it.

Its file can also be sourced by a shell: then the user's own `prefect` command uses the platform.
"""

import os
import secrets
import shlex
from contextlib import suppress
from pathlib import Path

from pydantic import SecretStr

from flows.platform import private
from vectorclm.errors import ConfigError

URL, AUTH = "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"  # Prefect's own names
SETTING = "PREFECT_AUTH"  # the name of the password for every command of vectorclm
OPEN = "none, so every user of this machine can run programs as you; without PREFECT_AUTH=none, `up` creates one"
OFF = "none"  # the value of PREFECT_AUTH for no password
ABOUT = "# Written by `vectorclm up`. For a `prefect` of your own: set -a; . {}; set +a\n"


def place(home: Path) -> Path:
    """The file with the password of the platform of a home."""
    return home / "platform" / "prefect.env"


def make() -> str:
    """A new random user:password."""
    return f"admin:{secrets.token_urlsafe(24)}"


def is_complete(text: str) -> bool:
    """Whether a text has the form user:password."""
    user, _, password = text.partition(":")
    return bool(user and password)


def is_off(setting: SecretStr) -> bool:
    """Whether PREFECT_AUTH switches the password off."""
    return setting.get_secret_value().lower() == OFF


def read(home: Path, url: str | None = None) -> str | None:
    """Read the password of the platform of a home; None without one, or if it is for another server than `url`.

    Raises ConfigError where its file cannot be read, or other users control it.
    """
    try:
        lines = private.read_text(place(home)).splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of Prefect's password, {place(home)}, cannot be read: {error}") from error
    values = dict(line.partition("=")[::2] for line in lines if not line.startswith("#"))
    if url is not None and values.get(URL) != url:
        return None
    return values.get(AUTH) or None


def about(home: Path, setting: SecretStr | None, *, shown: bool) -> str:
    """A line about the password of the platform of a home. The one that `up` created is printed only if it is `shown`.

    `setting` is PREFECT_AUTH. Raises ConfigError where the file of the password cannot be read.
    """
    if setting is not None:
        return OPEN if is_off(setting) else f"{SETTING}; Prefect's page asks once for all of it, as user:password"
    if (known := read(home)) is None:
        return OPEN
    if not shown:
        return f"in {place(home)}, after {AUTH}=; Prefect's page asks for it once"
    return f"{known}  (Prefect's page asks once for all of it; it is kept in {place(home)})"


def ensure(home: Path, url: str) -> None:
    """Create a password for the Prefect server at `url` unless there is one.

    Raises ConfigError where its file cannot be read.
    """
    if read(home) is None:
        _write(home, url, make())


def settle(home: Path, url: str, *, own: bool) -> None:
    """Write the server's URL beside the password; delete the password if the user set one, or none, instead.

    Raises ConfigError where its file cannot be read.
    """
    if not own:
        with suppress(FileNotFoundError), private.opened_folder(place(home).parent) as folder:
            os.unlink(place(home).name, dir_fd=folder)
    elif (known := read(home)) is not None and read(home, url) is None:
        _write(home, url, known)


def _write(home: Path, url: str, password: str) -> None:
    file = place(home)
    private.create_folder(file.parent)
    draft = f".{file.name}.{secrets.token_hex(4)}"
    with private.opened_folder(file.parent) as folder:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(f"{ABOUT.format(shlex.quote(str(file)))}{URL}={url}\n{AUTH}={password}\n")
        # Atomic, and never readable for other users.
        os.replace(draft, file.name, src_dir_fd=folder, dst_dir_fd=folder)
