"""Lines of UTF-8 files, decompressed by their content: gzip, bzip2, xz and zstd."""

import io
import itertools
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from vectorclm.errors import DataError
from vectorclm.formats.compression import open_xz
from vectorclm.formats.files import check_name
from vectorclm.formats.limits import LINE_BYTES

LONGEST = LINE_BYTES  # characters of a line, or of a file that is one JSON array; each is in memory as a whole
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED_SUFFIXES = (".zst", ".gz", ".bz2", ".xz")


def first_bytes(path: Path, count: int = 8) -> bytes:
    """The first bytes of a file as it is stored. Raises DataError where it cannot be read."""
    check_name(path)
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def open_decompressed(path: Path) -> BinaryIO:
    """Open a file's bytes, decompressed if its content is compressed.

    Arrow decompresses, because zstandard's reader ends a truncated file silently.
    """
    import pyarrow as pa

    start = first_bytes(path)
    kind = next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)
    if kind == "xz":
        return open_xz(path)
    return cast(BinaryIO, pa.input_stream(str(path), compression=kind))


def lines_of(path: Path, errors: str = "strict") -> Iterator[str]:
    """The lines of a UTF-8 file, decompressed, each at most LONGEST: a small file may unpack to more than memory holds.

    A byte order mark is left out. Raises DataError naming a file that cannot be read.
    """
    import pyarrow as pa

    try:
        with open_decompressed(path) as stream:
            text: TextIO = io.TextIOWrapper(stream, encoding="utf-8-sig", errors=errors, newline="\n")
            for number in itertools.count(1):
                line = text.readline(LONGEST + 1)
                if len(line) > LONGEST:
                    raise DataError(
                        f"{path}, line {number}: the line has more than {LONGEST:,} characters; split the document"
                    )
                if not line:
                    return
                yield line
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot read {path}: it is not UTF-8 ({error}); convert it, or download it again if it is cut short"
        ) from error
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        if "too much memory" in str(error) or "Memory usage limit" in str(error):
            raise DataError(
                f"cannot read {path}: it was compressed with a window above 128 MiB; "
                f"compress it again without --long, or with --long=27 at most"
            ) from error
        raise DataError(f"cannot read {path}: {error}; it may be cut short: download it again") from error
