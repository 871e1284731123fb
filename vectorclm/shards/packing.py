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


Cuts = NDArray[np.int64]  # [P, 3]: pieces of what the buffer holds, as its index there (or PADDING), start and stop


class Segment(NamedTuple):
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
    pad = np.repeat(np.array(padding)[:, None], length, axis=1)
    most = max(buffer_tokens, CARRIED * length)
    buffer: list[Segment] = []
    size = 0
    for document, columns in enumerate(documents):
        buffer.append(Segment(document, columns))
        size += columns.shape[1]
        if size >= most:
            windows, rest = arrange(buffer, length, generator, most // CARRIED)
            yield _laid(buffer, windows, length, pad)
            parts = zip(rest[:, 0].tolist(), _parts(buffer, rest, pad), strict=True)
            buffer = [Segment(buffer[i].document, part.copy()) for i, part in parts]  # a view would keep a buffer alive
            size = sum(piece.columns.shape[1] for piece in buffer)
    if buffer:
        yield _laid(buffer, arrange(buffer, length, generator, 0)[0], length, pad)


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


def _fitted(buffer: list[Segment], length: int, generator: np.random.Generator, carried: int) -> tuple[Cuts, Cuts]:
    """The pieces of all windows in their order, padding included; and up to `carried` tokens that fill none."""
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
    for size, items in sorted(packed, key=lambda window: window[0]):  # the emptiest wait, as long as there is room
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
    """What fills a window up: the end of the last of `long`, which is cut somewhere anyway; and padding after it.

    `long` are documents and how much of each is left. The piece stands last in its window, as nothing in it says that
    it ends.
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
    """The documents one after the other; the end that fills no window, padded where nothing may be `carried`."""
    # The first may be the end of a document whose beginning is written already.
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
    ranges = zip(*cuts.T.tolist(), strict=True)  # without a list for each, which Python would search for cycles
    return [pad[:, :stop] if i == PADDING else whole[i][:, start:stop] for i, start, stop in ranges]


def _laid(buffer: list[Segment], cuts: Cuts, length: int, pad: NDArray[Any]) -> Packed:
    """The pieces, which fill whole windows, as windows; cut where a window ends."""
    dtype = buffer[0].columns.dtype
    columns = np.concatenate(_parts(buffer, cuts, pad.astype(dtype)), axis=1)
    ends = np.cumsum(cuts[:, 2] - cuts[:, 1])
    stops = np.union1d(ends, np.arange(length, columns.shape[1] + 1, length))
    numbers = np.array([*(piece.document for piece in buffer), PADDING])  # the last is that of PADDING's index
    document = numbers[cuts[:, 0]][np.searchsorted(ends, stops)]
    table = np.stack([document, (stops - 1) // length, (stops - 1) % length + 1], axis=1)
    return Packed(columns.reshape(len(columns), -1, length), table[document != PADDING])
