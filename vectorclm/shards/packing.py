"""Sequence packing: best-fit or concatenated packing of documents into windows of equal length, with little padding.

Both methods pack a buffer of documents at a time, in a seeded order, and drop no token: tokens that do not fill a
window wait for the next buffer, and the last window is padded.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vectorclm.shards.config import Packing

BUFFER_TOKENS = 1 << 24  # packed together in memory
CARRIED = 4  # at most one in so many tokens waits for the next buffer
SHORTEST = 16  # tokens; a shorter part of a long document is not split off
PADDING = -1  # stands for padding in place of a document's number


Cuts = NDArray[np.int64]  # [P, 3]: pieces of the buffer's documents: index in the buffer (or PADDING), start and stop


class Segment(NamedTuple):
    """A document, or a part of one."""

    document: int
    columns: NDArray[Any]  # [C, n]


class Packed(NamedTuple):
    """Windows, and the pieces of documents in them."""

    columns: NDArray[Any]  # [C, windows, T]
    pieces: NDArray[np.int64]  # [P, 3]: document, window, end (one past the last token in the window), in order


def pack(
    documents: Iterable[NDArray[Any]],
    length: int,
    padding: Sequence[int],
    how: Packing,
    seed: int,
    buffer_tokens: int = BUFFER_TOKENS,
) -> Iterator[Packed]:
    """Pack all tokens of `documents` ([C, n] each) into windows of `length`, and fill the rest with `padding` [C].

    `best_fit` splits a document longer than a window into full windows, and packs its rest like a document by best-fit
    decreasing, which splits no document that fits (Ding et al., arXiv 2404.10830). The remaining room is filled with
    the ends of a few long documents. `concatenate` joins documents and cuts wherever a window ends. Windows (for
    `concatenate`, documents) are shuffled within the buffer.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    arrange = _fitted if how == "best_fit" else _joined
    pad = np.repeat(np.array(padding)[:, None], length, axis=1)
    most = max(buffer_tokens, CARRIED * length)
    buffer: list[Segment] = []
    size = 0
    for document, columns in enumerate(documents):
        buffer.append(Segment(document, columns))
        size += columns.shape[1]
        if size >= most:
            windows, rest = arrange(buffer, length, generator, most // CARRIED)
            yield _assemble(buffer, windows, length, pad)
            parts = zip(rest[:, 0].tolist(), _parts(buffer, rest, pad), strict=True)
            buffer = [Segment(buffer[i].document, part.copy()) for i, part in parts]  # a view would keep a buffer alive
            size = sum(piece.columns.shape[1] for piece in buffer)
    if buffer:
        yield _assemble(buffer, arrange(buffer, length, generator, 0)[0], length, pad)


def best_fit(sizes: NDArray[Any], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: the items of each window, largest first, each in the fullest window with room.

    `sizes` [n] are from 1 to `capacity`. Windows are grouped by the room left, and a bit set marks the non-empty
    groups, so the lowest fitting bit finds the best window: O(n log n) in all.
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


def _fitted(buffer: list[Segment], length: int, generator: np.random.Generator, carried: int) -> tuple[Cuts, Cuts]:
    """Best-fit packing: the pieces of all windows in order, padding included, and up to `carried` leftover tokens."""
    sizes = np.array([piece.columns.shape[1] for piece in buffer])
    full = np.where(sizes > length, sizes // length * length, 0)
    rests = np.flatnonzero(full < sizes)
    left = (sizes - full)[rests]
    of_rests, room = np.stack([rests, full[rests], sizes[rests]], axis=1).tolist(), left.tolist()
    packed = [(sum(room[item] for item in items), items) for items in best_fit(left, length)]
    long = [[number, int(full[number])] for number in np.flatnonzero(full).tolist()]
    pieces: list[list[int]] = []
    windows: list[int] = []  # of each piece
    waiting: list[list[int]] = []
    count = 0
    for size, items in sorted(
        packed, key=lambda window: window[0]
    ):  # the emptiest windows wait for the next buffer, up to `carried` tokens
        here = [of_rests[item] for item in items]
        if size < length and size <= carried:
            carried -= size
            waiting += here
        else:
            here += _end_of(long, length - size)
            pieces += here
            windows += [count] * len(here)
            count += 1
    number, end = np.array(long, np.int64).reshape(-1, 2).T
    each = -(-end // length)
    start = length * (np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each))
    stop = np.minimum(start + length, np.repeat(end, each))
    whole = np.stack([np.repeat(number, each), start, stop], axis=1)
    lack = length - (stop - start)
    padding = np.stack([np.full_like(lack, PADDING), np.zeros_like(lack), lack], axis=1)[lack > 0]
    own = count + np.arange(len(whole))
    table = np.concatenate([_cuts(pieces), whole, padding])
    place = np.argsort(generator.permutation(count + len(whole)))  # of each window
    order = np.argsort(place[np.concatenate([np.array(windows, np.int64), own, own[lack > 0]])], kind="stable")
    return table[order], _cuts(waiting)


def _end_of(long: list[list[int]], room: int) -> list[list[int]]:
    """Fill the room of a window with the end of the last document of `long`, and padding after it.

    `long` are documents, which are split anyway, and the length left of each. The piece is the last in its window,
    because no EOS marks where it ends.
    """
    if room < SHORTEST or not long:
        return _padding(room)
    number, end = long[-1]
    size = min(room, end)
    if size < end:
        long[-1][1] -= size
    else:
        long.pop()
    return [[number, end - size, end], *_padding(room - size)]


def _joined(buffer: list[Segment], length: int, generator: np.random.Generator, carried: int) -> tuple[Cuts, Cuts]:
    """Concatenated packing: the pieces of all documents in order; the rest waits, or is padded with `carried` 0."""
    # The first may be the end of a document whose beginning is already written.
    order = [0, *(1 + generator.permutation(len(buffer) - 1)).tolist()]
    pieces = [[number, 0, buffer[number].columns.shape[1]] for number in order]
    over = sum(stop for _, _, stop in pieces) % length
    if carried < over or over == 0:
        return _cuts(pieces + _padding(-over % length)), _cuts([])
    waiting: list[list[int]] = []
    while over:
        number, _, stop = pieces.pop()
        keep = max(0, stop - over)
        over -= stop - keep
        waiting.insert(0, [number, keep, stop])
        if keep:
            pieces.append([number, 0, keep])
    return _cuts(pieces), _cuts(waiting)


def _padding(size: int) -> list[list[int]]:
    return [[PADDING, 0, size]] if size else []


def _cuts(pieces: list[list[int]]) -> Cuts:
    return np.array(pieces, np.int64).reshape(-1, 3)


def _parts(buffer: list[Segment], cuts: Cuts, pad: NDArray[Any]) -> list[NDArray[Any]]:
    """The columns of each piece."""
    whole = [piece.columns for piece in buffer]
    ranges = zip(*cuts.T.tolist(), strict=True)  # no list for each, which Python's garbage collector would scan
    return [pad[:, :stop] if i == PADDING else whole[i][:, start:stop] for i, start, stop in ranges]


def _assemble(buffer: list[Segment], cuts: Cuts, length: int, pad: NDArray[Any]) -> Packed:
    """Copy pieces, which fill whole windows, into windows; a piece is cut where a window ends."""
    dtype = buffer[0].columns.dtype
    columns = np.concatenate(_parts(buffer, cuts, pad.astype(dtype)), axis=1)
    ends = np.cumsum(cuts[:, 2] - cuts[:, 1])
    stops = np.union1d(ends, np.arange(length, columns.shape[1] + 1, length))
    numbers = np.array([*(piece.document for piece in buffer), PADDING])  # index PADDING (-1) selects the last
    document = numbers[cuts[:, 0]][np.searchsorted(ends, stops)]
    table = np.stack([document, (stops - 1) // length, (stops - 1) % length + 1], axis=1)
    return Packed(columns.reshape(len(columns), -1, length), table[document != PADDING])
