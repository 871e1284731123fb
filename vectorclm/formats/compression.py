"""Decompressed bytes of foreign files, as a stream: a decoder's memory is bounded, and the reader bounds the rest."""

import io
import lzma
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from vectorclm.formats.limits import XZ_MEMORY

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined, unused-ignore]

READ = 2**16  # compressed bytes that are read at once


class XzStream(io.RawIOBase):
    """The bytes of an xz file of one or several streams, decoded in at most XZ_MEMORY.

    Raises lzma.LZMAError where a stream asks for more memory or is damaged, and EOFError where the file is cut short.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decoder = self._new()
        self._fed = False  # whether the decoder has bytes of a stream

    def _new(self) -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=XZ_MEMORY)

    def readable(self) -> bool:
        """Whether bytes can be read: always."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def readinto(self, buffer: "Buffer") -> int:
        """Fill a part of a buffer; 0 at the end of the file."""
        view = memoryview(buffer).cast("B")
        while True:
            data = b""
            if self._decoder.eof:
                data = self._decoder.unused_data.lstrip(b"\0") or self._file.read(READ).lstrip(b"\0")
                if not data:
                    return 0
                self._decoder, self._fed = self._new(), False
            elif self._decoder.needs_input and not (data := self._file.read(READ)):
                if not self._fed:
                    return 0
                raise EOFError("compressed file ended before the end-of-stream marker was reached")
            self._fed = True
            found = self._decoder.decompress(data, max_length=len(view))
            if found:
                view[: len(found)] = found
                return len(found)


def open_xz(path: Path) -> BinaryIO:
    """Open an xz file for reading; see XzStream."""
    return cast(BinaryIO, io.BufferedReader(XzStream(path), READ))
