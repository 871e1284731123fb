"""Headers of Parquet's pages: the part of Thrift's compact protocol that they need.

Source: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
DEPTH = 16  # structures inside one another; a page's header has three
FIELDS = 10_000  # fields and entries of one header
UNPACKED, PACKED = 2, 3  # fields of PageHeader, in bytes


class _Reader:
    """A place in the bytes of a header. Raises IndexError at their end, and ValueError for what cannot be one."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.left = data, 0, FIELDS

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
            self.fields(depth)
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

    def fields(self, depth: int) -> dict[int, int]:
        """Pass over a structure; returns its whole numbers of 32 bits by field."""
        found, field = {}, 0
        while head := self.byte():
            delta, kind = head >> 4, head & 15
            field = field + delta if delta else self.signed()
            if kind == I32:
                self.spend()
                found[field] = self.signed()
            else:
                self.skip(kind, depth + 1)
        return found


def page_header(data: bytes) -> tuple[int, int, int]:
    """Length of the page header at the start of `data`, and the page's bytes unpacked and packed.

    Raises IndexError where `data` ends inside it, and ValueError where it is none.
    """
    reader = _Reader(data)
    found = reader.fields(0)
    unpacked, packed = found.get(UNPACKED, -1), found.get(PACKED, -1)
    if unpacked < 0 or packed < 0:
        raise ValueError("the header of a page has no sizes")
    if reader.at > len(data):
        raise IndexError("cut short")
    return reader.at, unpacked, packed
