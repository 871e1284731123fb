"""Bytes of foreign files: regular files of at most a number of bytes."""

import stat
from collections.abc import Callable
from pathlib import Path

from vectorclm.errors import DataError, VectorCLMError

Failure = Callable[[str], VectorCLMError]  # builds the error from its message


def read_bytes(path: Path, most: int, what: str, failure: Failure = DataError) -> bytes:
    """The bytes of a regular file. Raises `failure` where it cannot be read, or has more than `most` bytes."""
    check_name(path, failure)
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise failure(f"{path} is not {what}: {error.strerror or error}") from error
    if len(data) > most:
        raise failure(f"{path} is not {what}: it has more than {most:,} bytes")
    return data


def size_of(path: Path, what: str, failure: Failure = DataError) -> int:
    """The bytes of a regular file. Raises `failure` where there is none."""
    check_name(path, failure)
    try:
        found = path.stat()
    except OSError as error:
        raise failure(f"{path} is not {what}: {error.strerror or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise failure(f"{path} is not {what}: it is no regular file")
    return found.st_size


def check_name(name: Path | str, failure: Failure = DataError) -> None:
    """Raise `failure` for a name that no file can have: with NUL, or with half a surrogate."""
    text = str(name)
    if "\0" in text:
        raise failure(f"{text!r:.200} cannot be a name: it has the character NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        # os.fsdecode writes bytes that are not UTF-8 as U+DC80 to U+DCFF; files may have such names.
        if not is_file_name(text):
            raise failure(f"{text!r:.200} cannot be a name: it has half a surrogate") from None


def is_file_name(text: str) -> bool:
    """Whether a text without NUL can be the name of a file on this system."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def is_there(path: Path) -> bool:
    """Whether there is a file or a folder; no name is too long, and none has a character that is not allowed."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
