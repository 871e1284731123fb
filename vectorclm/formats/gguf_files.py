"""Headers of GGUF files: counts, types and places are checked against the file before a value is allocated.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from vectorclm.errors import DataError
from vectorclm.formats.files import size_of
from vectorclm.formats.limits import DIMENSIONS, GGUF_ARRAY, GGUF_FIELDS, GGUF_TENSORS, GGUF_TEXT

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
MAGIC, VERSIONS = b"GGUF", (2, 3)


class _Header:
    """The values of a header in their order. Raises ValueError where the file ends, or a count is beyond its limit."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def value(self, form: str) -> Any:
        """A value of a `struct` form, little-endian."""
        length = struct.calcsize(f"<{form}")
        data = self.file.read(length)
        if len(data) < length:
            raise ValueError("it is cut short")
        return struct.unpack(f"<{form}", data)[0]

    def count(self, most: int, what: str) -> int:
        """A count of what follows."""
        found: int = self.value("Q")
        if found > most:
            raise ValueError(f"it claims {found:,} {what}, {most:,} at most")
        return found

    def text(self) -> str:
        """A text in UTF-8."""
        length = self.count(GGUF_TEXT, "bytes of a text")
        data = self.file.read(length)
        if len(data) < length:
            raise ValueError("it is cut short")
        return data.decode()

    def field(self, kind: int) -> Any:
        """The value of a field; None for an array, which is passed over."""
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.value(_scalar(kind))
        inner, count = self.value("I"), 0
        count = self.count(GGUF_ARRAY, "entries of an array")
        if inner != TEXT:
            self.skip(count * struct.calcsize(_scalar(inner)))
        else:
            for _ in range(count):
                self.skip(self.count(GGUF_TEXT, "bytes of a text"))
        return None

    def skip(self, length: int) -> None:
        """Pass over bytes."""
        if self.file.tell() + length > self.size:
            raise ValueError("it is cut short")
        self.file.seek(length, os.SEEK_CUR)


def _scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"it has a field of the unknown type {kind}")
    return SCALARS[kind]


def read_gguf_fields(path: Path) -> dict[str, Any]:
    """The numbers and texts in the metadata of a GGUF file; arrays are left out. Raises DataError for another file."""
    size = size_of(path, "a GGUF file")
    try:
        with path.open("rb") as file:
            header = _Header(file, size)
            if file.read(4) != MAGIC or header.value("I") not in VERSIONS:
                raise ValueError(f"it does not begin with {MAGIC.decode()} and a version of {VERSIONS}")
            tensors = header.count(GGUF_TENSORS, "tensors")
            fields: dict[str, Any] = {}
            for _ in range(header.count(GGUF_FIELDS, "fields")):
                name = header.text()
                if name in fields:
                    raise ValueError(f"the field {name!r:.100} stands there twice")
                fields[name] = header.field(header.value("I"))
            _check_tensors(header, tensors)
            return fields
    except OSError as error:
        raise DataError(f"{path} is not a GGUF file: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is not a GGUF file: {error}") from error


def _check_tensors(header: _Header, count: int) -> None:
    """Pass over the entries of tensors; each must begin inside the file."""
    for _ in range(count):
        name = header.text()
        dimensions = header.value("I")
        if dimensions > DIMENSIONS:
            raise ValueError(f"{name!r:.100} has {dimensions:,} dimensions, {DIMENSIONS} at most")
        shape = [header.value("Q") for _ in range(dimensions)]
        header.value("I")
        if math.prod(shape) > 8 * header.size or header.value("Q") > header.size:
            raise ValueError(f"{name!r:.100} is larger than the file")
