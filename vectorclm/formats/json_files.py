"""JSON of foreign files and bytes: size, depth and the number of values are checked before anything is allocated."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from vectorclm.errors import CorruptArtifactError, DataError
from vectorclm.formats.files import Failure, read_bytes
from vectorclm.formats.limits import (
    DEPTH,
    LINE_BYTES,
    LINE_DEPTH,
    LINE_VALUES,
    MANIFEST_BYTES,
    MANIFEST_VALUES,
    SETTINGS_BYTES,
    SETTINGS_VALUES,
)

# A text, also one without an end, so that no place is read twice; or a sign of the structure.
STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)


class _TooLarge(ValueError):
    """A text of JSON is beyond a limit."""


def check_json(text: str, values: int, depth: int = DEPTH) -> None:
    """Raise ValueError where a text of JSON has more values or is deeper than allowed; its syntax is not checked."""
    # Each value takes two characters at least: a short text with few brackets needs no count.
    if len(text) <= 2 * values and text.count("[") + text.count("{") <= depth:
        return
    found = level = 0
    for match in STRUCTURE.finditer(text):
        sign = text[match.start()]
        if sign in "[{":
            level += 1
            found += 1
            if level > depth:
                raise _TooLarge(f"its lists and tables are more than {depth} deep")
        elif sign in "]}":
            level -= 1
        elif sign == ",":
            found += 1
        if found > values:
            raise _TooLarge(f"it has more than {values:,} values")


def parse_line(text: str) -> Any:
    """The value of a line of JSON Lines, or of a whole array. Raises ValueError with the reason."""
    if len(text) > 2 * LINE_VALUES:
        check_json(text, LINE_VALUES, LINE_DEPTH)
    try:
        return from_json(text, cache_strings="keys")  # three times as fast as json
    except (ValueError, TypeError):  # json reads what from_json refuses: lone surrogates
        check_json(text, LINE_VALUES, LINE_DEPTH)
        return _loads(text)


def parse_json(data: str | bytes, values: int = SETTINGS_VALUES) -> Any:
    """The value of a text of JSON in UTF-8. Raises ValueError with the reason."""
    text = data if isinstance(data, str) else data.decode()
    check_json(text, values)
    return _loads(text)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise _TooLarge("its lists and tables are too deep") from None


def read_settings(path: Path, what: str = "a file of settings", failure: Failure = DataError) -> Any:
    """The value of a JSON file of settings, of at most SETTINGS_BYTES. Raises `failure` naming the file."""
    data = read_bytes(path, SETTINGS_BYTES, what, failure)
    try:
        return parse_json(data.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise failure(f"{path} is not {what}: {error}") from error


def read_table(path: Path, what: str = "a file of settings", failure: Failure = DataError) -> dict[str, Any]:
    """The JSON object of a file. Raises `failure` naming the file, also where it holds another value."""
    value = read_settings(path, what, failure)
    if not isinstance(value, dict):
        raise failure(f"{path} is not {what}: it holds no table of settings")
    return value


def parse_manifest(data: bytes) -> Any:
    """The value of a manifest. Raises ValueError with the reason."""
    if len(data) > MANIFEST_BYTES:
        raise _TooLarge(f"it has {len(data):,} bytes, {MANIFEST_BYTES:,} at most")
    return parse_json(data, MANIFEST_VALUES)


def table_lines(data: bytes, where: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON Lines that a stage wrote: metrics, prompts. Raises CorruptArtifactError naming the line."""
    for number, line in enumerate(data.splitlines(), 1):
        try:
            if len(line) > LINE_BYTES:
                raise _TooLarge(f"it has more than {LINE_BYTES:,} bytes")
            row = parse_json(line, LINE_VALUES)
        except ValueError as error:
            raise CorruptArtifactError(f"{where}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise CorruptArtifactError(f"{where}, line {number}: expected an object, found {type(row).__name__}")
        yield row
