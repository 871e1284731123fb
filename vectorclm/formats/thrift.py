"""Headers of Parquet's pages, and column chunks of its footers: the part of Thrift's compact protocol that they need.

Arrow's own view of a column chunk aborts the process where the chunk is damaged. Sources:
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
DEPTH = 16  # structures inside one another; a page's header has three
FIELDS = 10_000  # fields and entries of one header
UNPACKED, PACKED = 2, 3  # fields of PageHeader, in bytes
ROW_GROUPS, COLUMNS, META_DATA = 4, 1, 3  # fields of FileMetaData, RowGroup and ColumnChunk
PATH, COMPRESSED, DATA_PAGE, DICTIONARY_PAGE = 3, 7, 9, 11  # fields of ColumnMetaData

Part = Callable[[int, int], Any]  # reads a value, by its kind and depth


class Chunk(NamedTuple):
    """The pages of a column in a row group: their place in the file, in bytes."""

    path: str  # names joined by dots
    start: int
    end: int


class _Reader:
    """A place in the bytes of a header. Raises IndexError at their end, and ValueError for what cannot be one."""

    def __init__(self, data: bytes, fields: int = FIELDS) -> None:
        self.data, self.at, self.left = data, 0, fields

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        """A whole number of variable length."""
        found = shift = 0
        while True:
            byte = self.byte()
            found |= (byte & 0x7F) << shift
            if byte < 0x80:
                return found
            shift += 7
            if shift > 63:
                raise ValueError("the header of a page has a number of more than 64 bits")

    def signed(self) -> int:
        """A zigzag number."""
        found = self.number()
        return (found >> 1) ^ -(found & 1)

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError("the header of a page has too many fields")

    def skip(self, kind: int, depth: int) -> None:
        """Pass over a value of this kind."""
        if depth > DEPTH:
            raise ValueError("the header of a page is too deep")
        self.spend()
        if kind in (TRUE, FALSE):
            return
        if kind in (I16, I32, I64):
            self.number()
        elif kind in (BYTE, DOUBLE, BINARY):
            length = {BYTE: 1, DOUBLE: 8}.get(kind) or self.number()
            self.at += length
        elif kind in (LIST, SET):
            self.entries(depth)
        elif kind == STRUCT:
            self.structure(depth)
        else:
            raise ValueError("the header of a page has a field of an unknown kind")

    def entries(self, depth: int) -> None:
        """Pass over a list."""
        head = self.byte()
        count = head >> 4 if head >> 4 != 15 else self.number()
        for _ in range(count):
            if head & 15 in (TRUE, FALSE):
                self.at += 1
            self.skip(head & 15, depth + 1)

    def structure(self, depth: int, parts: Mapping[int, Part] = MappingProxyType({})) -> dict[int, Any]:
        """Pass over a structure; returns its whole numbers, and what `parts` read, by field."""
        found, field = dict[int, Any](), 0
        while head := self.byte():
            delta, kind = head >> 4, head & 15
            field = field + delta if delta else self.signed()
            if field in parts:
                self.spend()
                found[field] = parts[field](kind, depth + 1)
            elif kind in (I32, I64):
                self.spend()
                found[field] = self.signed()
            else:
                self.skip(kind, depth + 1)
        return found

    def listed(self, kind: int, depth: int, entry: int, read: Callable[[int], Any]) -> list[Any]:
        """The entries of a list of one kind. Raises ValueError for another value."""
        head = self.byte()
        if kind != LIST or head & 15 != entry or depth > DEPTH:
            raise ValueError("the footer has a value of another kind than its format says")
        count = head >> 4 if head >> 4 != 15 else self.number()
        found = []
        for _ in range(count):
            self.spend()
            found.append(read(depth + 1))
        return found

    def text(self, depth: int) -> str:
        """A text."""
        length = self.number()
        if length > len(self.data) - self.at:
            raise IndexError("cut short")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")


def page_header(data: bytes) -> tuple[int, int, int]:
    """Length of the page header at the start of `data`, and the page's bytes unpacked and packed.

    Raises IndexError where `data` ends inside it, and ValueError where it is none.
    """
    reader = _Reader(data)
    found = reader.structure(0)
    unpacked, packed = found.get(UNPACKED, -1), found.get(PACKED, -1)
    if unpacked < 0 or packed < 0:
        raise ValueError("the header of a page has no sizes")
    if reader.at > len(data):
        raise IndexError("cut short")
    return reader.at, unpacked, packed


def column_chunks(footer: bytes) -> list[list[Chunk]]:
    """The column chunks of each row group, by a file's footer. Raises IndexError or ValueError where it is none."""
    reader = _Reader(footer, len(footer))  # each field takes a byte

    def chunk(depth: int) -> Chunk:
        def about(kind: int, depth: int) -> dict[int, Any]:
            if kind != STRUCT:
                raise ValueError("the footer has a column chunk of another kind")
            return reader.structure(depth, {PATH: lambda kind, depth: reader.listed(kind, depth, BINARY, reader.text)})

        found = reader.structure(depth, {META_DATA: about}).get(META_DATA)
        if found is None or not isinstance(found.get(DATA_PAGE), int):
            raise ValueError("the footer has a column chunk without its place")
        starts = [found[place] for place in (DICTIONARY_PAGE, DATA_PAGE) if found.get(place, 0) > 0]
        start = min(starts, default=0)
        return Chunk(".".join(found.get(PATH, ())), start, start + found.get(COMPRESSED, 0))

    def row_group(depth: int) -> list[Chunk]:
        parts = {COLUMNS: lambda kind, depth: reader.listed(kind, depth, STRUCT, chunk)}
        return list(reader.structure(depth, parts).get(COLUMNS, ()))

    parts = {ROW_GROUPS: lambda kind, depth: reader.listed(kind, depth, STRUCT, row_group)}
    return list(reader.structure(0, parts).get(ROW_GROUPS, ()))
