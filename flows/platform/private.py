"""Files that are trusted because only their owner can change them: the password, records of services, Prefect's home.

A file is trusted if it and its folder belong to this user, and neither their group nor others can write to them. The
folder above may be shared: whoever replaces the folder there owns the new one. Symbolic links are not followed.
"""

import errno
import logging
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vectorclm.errors import ConfigError

logger = logging.getLogger(__name__)


def create_folder(folder: Path) -> None:
    """Create a folder for this user alone. Raises ConfigError where there is one that other users control."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Raise ConfigError where other users control a folder; a missing folder is fine."""
    with suppress(FileNotFoundError), opened_folder(folder):
        pass


@contextmanager
def opened_folder(folder: Path) -> Iterator[int]:
    """Open a folder that only its owner, this user, can change; yields its descriptor.

    Raises FileNotFoundError, and ConfigError where other users control the folder.
    """
    with _opened(folder, os.O_RDONLY | os.O_DIRECTORY, None) as descriptor:
        yield descriptor


def read_text(file: Path) -> str:
    """Read a file that only its owner, this user, can change.

    Raises FileNotFoundError, and ConfigError where other users control the file or its folder.
    """
    with opened_folder(file.parent) as folder, _opened(file, os.O_RDONLY | os.O_NONBLOCK, folder) as descriptor:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{file} is not a file: remove it")
        with os.fdopen(descriptor, encoding="utf-8", closefd=False) as text:
            return text.read()


def read_settings(file: Path) -> tuple[str, bool]:
    """Read a file of settings that the user names; the second value is whether others can read it, too.

    Raises ConfigError where others can write to it: its settings name commands, servers and receivers of messages.
    """
    with file.open(encoding="utf-8") as text:
        found = os.fstat(text.fileno())
        if not stat.S_ISREG(found.st_mode):  # a pipe of the shell
            return text.read(), False
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(f"other users can write to {file}: check its settings, then run chmod go-w '{file}'")
        return text.read(), bool(found.st_mode & (stat.S_IRGRP | stat.S_IROTH))


def warn_of_readers(file: Path, secret: str) -> None:
    """Log that other users can read a file of settings, which has this secret."""
    logger.warning("other users can read %s, which has %s: run chmod 600 '%s'", file, secret, file)


@contextmanager
def _opened(path: Path, flags: int, folder: int | None) -> Iterator[int]:
    try:
        descriptor = os.open(path if folder is None else path.name, flags | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            kind = "a symbolic link" if path.is_symlink() else "not a folder"
            raise ConfigError(f"{path} is {kind}, and is not trusted: remove it, or set VECTORCLM_HOME") from error
        raise
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise ConfigError(
                f"{path} belongs to the user {_name(found.st_uid)}, and is not trusted: remove it, or set "
                "VECTORCLM_HOME to a folder of your own"
            )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(
                f"other users can write to {path}, so it is not trusted: check it, then run chmod go-w '{path}'"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
