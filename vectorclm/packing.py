"""Documents into windows of equal length: whole where they fit, and hardly any padding.

Both ways take a buffer of documents at a time, in a seeded order, and lose no token: what does not fill a window
waits for the next buffer, and the last window is padded.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Packing = Literal["best_fit", "concatenate"]
BUFFER_TOKENS = 1 << 24  # held in memory to be packed together
CARRIED = 4  # at most one in so many of them waits for the next buffer
SHORTEST = 16  # tokens of a long document that are worth to stand alone
PADDING = -1  # the number of the document that padding is


class Piece(NamedTuple):
    """A document, or a part of it."""

    document: int
    columns: NDArray[Any]  # [C, n]


class Packed(NamedTuple):
    """Windows, and what stands where in them."""

    columns: NDArray[Any]  # [C, windows, T]
    pieces: NDArray[np.int64]  # [P, 3]: document, window, end (one past its last token in the window), in their order


def pack(
    documents: Iterable[NDArray[Any]],
    length: int,
    padding: Sequence[int],
    how: Packing,
    seed: int,
    buffer_tokens: int = BUFFER_TOKENS,
) -> Iterator[Packed]:
    """All tokens of `documents` ([C, n] each) in windows of `length`, with `padding` [C] where nothing stands.

    `best_fit` splits a document longer than a window into full ones and packs the rest of it like a document: best
    fit decreasing, which truncates nothing that fits (Ding et al., arXiv 2404.10830). What room then is left, it fills
    with the ends of a few of the long documents' full windows. `concatenate` lets documents follow each other and cuts
    wherever a window ends. Windows (documents, where they are concatenated) are shuffled within the buffer.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    arrange = _fitted if how == "best_fit" else _joined
    pad = np.array(padding)[:, None]
    most = max(buffer_tokens, CARRIED * length)
    buffer: list[Piece] = []
    size = 0
    for number, columns in enumerate(documents):
        buffer.append(Piece(number, columns))
        size += columns.shape[1]
        if size >= most:
            windows, rest = arrange(buffer, length, pad, generator, most // CARRIED)
            yield _laid(windows, length)
            buffer = [Piece(number, columns.copy()) for number, columns in rest]  # a view would keep a buffer alive
            size = sum(piece.columns.shape[1] for piece in buffer)
    if buffer:
        yield _laid(arrange(buffer, length, pad, generator, 0)[0], length)


def best_fit(sizes: NDArray[Any], capacity: int) -> list[list[int]]:
    """Which items stand together in each window, the largest item first, each in the fullest window that has room.

    `sizes` [n] are from 1 to `capacity`. Windows are kept by the room they have left, and one bit for each room says
    whether there is such a window, so that the best one is found by looking at the lowest bit: O(n log n) in all.
    """
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    windows: list[list[int]] = []
    for item in np.argsort(-sizes.astype(np.int64), kind="stable").tolist():
        size = int(sizes[item])
        if fitting := rooms >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            window = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            windows[window].append(item)
        else:
            room, window = capacity, len(windows)
            windows.append([item])
        if room > size:
            by_room[room - size].append(window)
            rooms |= 1 << (room - size)
    return windows


def _fitted(
    buffer: list[Piece], length: int, pad: NDArray[Any], generator: np.random.Generator, carried: int
) -> tuple[list[Piece], list[Piece]]:
    """The pieces of all windows in their order, padding included; and up to `carried` tokens that fill none."""
    rests: list[Piece] = []
    long: list[Piece] = []
    for number, columns in buffer:
        full = columns.shape[1] // length * length if columns.shape[1] > length else 0
        if full:
            long.append(Piece(number, columns[:, :full]))
        if full < columns.shape[1]:
            rests.append(Piece(number, columns[:, full:]))
    sizes = np.array([piece.columns.shape[1] for piece in rests], np.int64)
    packed = [(int(sizes[items].sum()), items) for items in best_fit(sizes, length)]
    windows: list[list[Piece]] = []
    waiting: list[Piece] = []
    for size, items in sorted(packed, key=lambda window: window[0]):  # the emptiest wait, as long as there is room
        pieces = [rests[item] for item in items]
        if size < length and size <= carried:
            carried -= size
            waiting += pieces
        else:
            windows.append(pieces + _end_of(long, length - size, pad))
    for number, columns in long:
        for start in range(0, columns.shape[1], length):
            part = columns[:, start : start + length]
            windows.append([Piece(number, part), *_padding(pad, length - part.shape[1])])
    return [piece for i in generator.permutation(len(windows)) for piece in windows[i]], waiting


def _end_of(long: list[Piece], room: int, pad: NDArray[Any]) -> list[Piece]:
    """What fills a window up: the end of the last of `long`, which is cut somewhere anyway; and padding after it.

    It stands last in its window, as nothing in it says that it ends.
    """
    if room < SHORTEST or not long:
        return _padding(pad, room)
    number, columns = long.pop()
    size = min(room, columns.shape[1])
    if size < columns.shape[1]:
        long.append(Piece(number, columns[:, :-size]))
    return [Piece(number, columns[:, -size:]), *_padding(pad, room - size)]


def _joined(
    buffer: list[Piece], length: int, pad: NDArray[Any], generator: np.random.Generator, carried: int
) -> tuple[list[Piece], list[Piece]]:
    """The documents one after the other; the end that fills no window, padded where nothing may be `carried`."""
    head = buffer[:1]  # may be the end of a document whose beginning is written already
    pieces = head + [buffer[1:][i] for i in generator.permutation(len(buffer) - 1)]
    over = sum(piece.columns.shape[1] for piece in pieces) % length
    if carried < over or over == 0:
        return pieces + _padding(pad, -over % length), []
    waiting: list[Piece] = []
    while over:
        number, columns = pieces.pop()
        keep = max(0, columns.shape[1] - over)
        over -= columns.shape[1] - keep
        waiting.insert(0, Piece(number, columns[:, keep:]))
        if keep:
            pieces.append(Piece(number, columns[:, :keep]))
    return pieces, waiting


def _padding(pad: NDArray[Any], size: int) -> list[Piece]:
    return [Piece(PADDING, np.broadcast_to(pad, (len(pad), size)))] if size else []


def _laid(pieces: list[Piece], length: int) -> Packed:
    """The pieces, which fill whole windows, as windows; cut where a window ends."""
    columns = np.concatenate(
        [piece.columns for piece in pieces], axis=1, dtype=pieces[0].columns.dtype, casting="unsafe"
    )
    ends = np.cumsum([piece.columns.shape[1] for piece in pieces])
    cuts = np.union1d(ends, np.arange(length, columns.shape[1] + 1, length))
    document = np.array([piece.document for piece in pieces])[np.searchsorted(ends, cuts)]
    table = np.stack([document, (cuts - 1) // length, (cuts - 1) % length + 1], axis=1)
    return Packed(columns.reshape(len(columns), -1, length), table[document != PADDING])
