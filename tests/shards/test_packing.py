"""Packing loses no token, splits no document that fits, and says what stands where."""

from collections import defaultdict

import numpy as np
import pytest
from numpy.typing import NDArray

from vectorclm.shards.audit import split_documents
from vectorclm.shards.config import Packing
from vectorclm.shards.packing import Packed, best_fit, pack

PAD = 4


def documents(seed: int, count: int, longest: int) -> list[NDArray[np.uint32]]:
    """Documents [1, n] of random lengths; every token is another one."""
    sizes = np.random.default_rng(seed).integers(1, longest, count)
    ids = np.arange(5, 5 + sizes.sum(), dtype=np.uint32)
    return [part[None] for part in np.split(ids, np.cumsum(sizes)[:-1])]


def unpacked(parts: list[Packed]) -> dict[int, list[int]]:
    """The tokens of each document again, by the pieces alone; what stands between them is padding."""
    pieces: dict[int, list[list[int]]] = defaultdict(list)
    for part in parts:
        before = (-1, 0)
        rest = np.ones(part.columns.shape[1:], bool)
        for document, window, end in part.pieces.tolist():
            start = before[1] if before[0] == window else 0
            pieces[document].append(part.columns[0, window, start:end].tolist())
            rest[window, start:end] = False
            before = (window, end)
        assert (part.columns[0][rest] == PAD).all() and not (part.columns[0][~rest] == PAD).any()
    # Windows are in no order, so neither are the parts of a document; its tokens count up.
    return {number: [token for piece in sorted(found) for token in piece] for number, found in pieces.items()}


def test_best_fit_by_hand() -> None:
    assert best_fit(np.array([3, 7, 6, 4, 2, 8]), 10) == [[5, 4], [1, 0], [2, 3]]
    assert best_fit(np.array([6, 6]), 10) == [[0], [1]]
    assert best_fit(np.array([], np.int64), 10) == []


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_is_best_fit(seed: int) -> None:
    """Against the rule itself, window by window."""
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(4, 70))
    sizes = generator.integers(1, capacity + 1, 300)
    room: list[int] = []
    expected: list[list[int]] = []
    for item in np.argsort(-sizes, kind="stable"):
        fitting = [left for left in room if left >= sizes[item]]
        if not fitting:
            room.append(capacity)
            expected.append([])
            fitting = [capacity]
        # Of windows that are equally full, the one that became so last.
        place = max((i for i, left in enumerate(room) if left == min(fitting)), key=lambda i: _touched(expected[i]))
        room[place] -= sizes[item]
        expected[place].append(_Touch.next(int(item)))
    assert best_fit(sizes, capacity) == [[touch.item for touch in window] for window in expected]


class _Touch:
    count = 0

    def __init__(self, item: int, time: int) -> None:
        self.item, self.time = item, time

    @classmethod
    def next(cls, item: int) -> "_Touch":
        cls.count += 1
        return cls(item, cls.count)


def _touched(window: list[_Touch]) -> int:
    return window[-1].time if window else _Touch.count + 1


@pytest.mark.parametrize("how", ["best_fit", "concatenate"])
@pytest.mark.parametrize("buffer", [1, 1000, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_no_token_is_lost_doubled_or_moved(how: Packing, buffer: int, seed: int) -> None:
    length = [8, 64, 33, 128][seed]
    given = documents(seed, 400, [40, 70, 300, 100][seed])
    parts = list(pack(given, length, (PAD,), how, seed, buffer))
    assert len(parts) > 1 or buffer > 1000
    assert all(part.columns.shape[2] == length and part.columns.dtype == np.uint32 for part in parts)
    found = unpacked(parts)
    assert [found[number] for number in range(len(given))] == [document[0].tolist() for document in given]


@pytest.mark.parametrize("buffer", [1, 3000, 1 << 20])
def test_no_document_that_fits_is_split(buffer: int) -> None:
    given = [*documents(7, 500, 200), *[np.full((1, 64), 9, np.uint32)] * 20]
    parts = list(pack(given, 64, (PAD,), "best_fit", 0, buffer))
    pieces = np.bincount(np.concatenate([part.pieces[:, 0] for part in parts]))
    sizes = np.array([document.shape[1] for document in given])
    assert (pieces[sizes <= 64] == 1).all() and (pieces >= -(-sizes // 64)).all()


def test_the_end_of_a_long_document_fills_what_others_leave() -> None:
    long, given = np.arange(1000, 1640)[None], [np.full((1, 40), 100 + i) for i in range(5)]
    (part,) = pack([long, *given], 64, (PAD,), "best_fit", 0)
    assert part.columns.shape[1] == -(-(640 + 200) // 64)
    for row in part.columns[0]:  # it stands last, and goes on to the window's end or to padding
        if row[0] < 1000:
            kept = row[40:][row[40:] != PAD]
            assert len(set(row[:40].tolist())) == 1 and len(kept) >= 16 and (np.diff(kept) == 1).all()
    assert sorted(part.columns[part.columns >= 1000]) == long[0].tolist()


def test_a_long_document_is_full_windows_and_a_rest() -> None:
    (part,) = pack([np.arange(5, 25)[None], np.arange(30, 36)[None]], 8, (PAD,), "best_fit", 0)
    rest, other = [21, 22, 23, 24, PAD, PAD, PAD, PAD], [30, 31, 32, 33, 34, 35, PAD, PAD]
    assert sorted(part.columns[0].tolist()) == [list(range(5, 13)), list(range(13, 21)), rest, other]


def test_equal_documents_and_seed_give_equal_windows_and_another_seed_another_order() -> None:
    def made(seed: int, how: Packing) -> list[list[int]]:
        return np.concatenate([p.columns[0] for p in pack(documents(1, 300, 90), 64, (PAD,), how, seed, 4096)]).tolist()

    for how in ("best_fit", "concatenate"):
        assert made(1, how) == made(1, how)
        assert made(1, how) != made(2, how)


def test_hardly_anything_is_padding() -> None:
    """Lengths as those of web text, which are about log-normal; a bounded buffer costs hardly more than a large one."""
    sizes = np.random.default_rng(0).lognormal(6.0, 1.0, 6000).astype(int) + 2
    given = [np.full((1, size), 9, np.uint16) for size in sizes]
    for buffer, most in ((1 << 24, 0.0005), (1 << 18, 0.001)):
        windows = sum(part.columns.shape[1] for part in pack(given, 1024, (PAD,), "best_fit", 0, buffer))
        assert 1 - sizes.sum() / (windows * 1024) <= most
    parts = list(pack(given, 1024, (PAD,), "concatenate", 0))
    assert sum(part.columns.shape[1] for part in parts) == -(-sizes.sum() // 1024)
    split, though_fit = split_documents(np.concatenate([part.pieces for part in parts]), 1024)
    assert split - though_fit == (sizes > 1024).sum() and though_fit > 0.3 * (sizes <= 1024).sum()


def test_columns_stay_beside_each_other() -> None:
    given = [np.stack([np.arange(10, 10 + n), np.arange(10, 10 + n) % 2]) for n in (3, 9, 20, 5)]
    for part in pack(given, 8, (PAD, 0), "best_fit", 0):
        ids, odd = part.columns
        assert (odd == np.where(ids == PAD, 0, ids % 2)).all()
