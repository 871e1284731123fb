"""Paired intervals against what is worked out by hand."""

import math

import numpy as np
import pytest

from vectorclm.comparison.compare import paired
from vectorclm.errors import DataError
from vectorclm.evaluation.statistics import DRAWS, Change, Scored, resampled


def answers(right: str) -> Scored:
    """A task's items, `1` for each right answer."""
    parts = np.array([mark == "1" for mark in right], float)
    return Scored([str(number) for number in range(len(right))], parts, np.ones(len(right)))


def one(before: str, after: str) -> Change:
    (found,) = paired({"acc.a": answers(before)}, {"acc.a": answers(after)})
    return found


def test_pairs_find_what_standard_errors_miss() -> None:
    """Of 100 items, 12 are won and 2 lost: 0.10 with a standard deviation of sqrt((0.14 - 0.10**2) / 100) = 0.036."""
    before = "1" * 48 + "0" * 38 + "0" * 12 + "1" * 2
    after = "1" * 48 + "0" * 38 + "1" * 12 + "0" * 2
    found = one(before, after)
    assert found.paired is not None and (found.paired.items, found.paired.differing) == (100, 14)
    assert found.difference == pytest.approx(0.10)
    assert found.paired.low == pytest.approx(0.10 - 1.96 * 0.03606, abs=0.011)  # a grid of hundredths
    assert found.paired.high == pytest.approx(0.10 + 1.96 * 0.03606, abs=0.011)
    assert found.before.stderr == pytest.approx(math.sqrt(0.5 * 0.5 / 99))
    assert found.verdict == "better" and not found._replace(paired=None).beyond_noise
    assert one(after, before).verdict == "worse"
    draws = resampled("acc.a", answers(before), answers(after))
    assert len(draws) == DRAWS and np.std(draws) == pytest.approx(0.03606, rel=0.03)
    assert one(before, after) == found  # seeded


def test_few_items_are_never_beyond_noise() -> None:
    assert one("0" * 5, "1" * 5).paired == (1.0, 1.0, 5, 5)
    assert one("0" * 5, "1" * 5).verdict == "within noise"
    assert one("0" * 6, "1" * 6).verdict == "better"
    assert one("01" * 50, "01" * 50).paired == (0.0, 0.0, 100, 0)


def test_text_is_weighed_by_its_bytes() -> None:
    """Two documents: drawn twice each, or once both, with shares of a quarter, a quarter and a half."""
    ids, sizes = ["a", "b"], np.array([4.0, 10.0])
    before, after = Scored(ids, np.array([8.0, 30.0]), sizes), Scored(ids, np.array([6.0, 33.0]), sizes)
    values, counts = np.unique(resampled("bits_per_byte.t", before, after), return_counts=True)
    assert values == pytest.approx([-2 / 4, 1 / 14, 3 / 10])
    assert counts / DRAWS == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    (found,) = paired({"bits_per_byte.t": before}, {"bits_per_byte.t": after})
    assert (found.before.value, found.after.value) == (38 / 14, 39 / 14)
    assert found.paired == (-0.5, 0.3, 2, 2)


def test_an_average_counts_each_task_alike() -> None:
    """A difference of 0.5 over 8 items and of 0 over 80: the average's is 0.25, its error half of the first's."""
    before = {"acc.a": answers("0" * 8), "acc.b": answers("01" * 40)}
    after = {"acc.a": answers("01" * 4), "acc.b": answers("01" * 40)}
    found = {change.name: change for change in paired(before, after)}
    a, mean = found["acc.a"].paired, found["acc"]
    assert list(found) == ["acc.a", "acc.b", "acc"] and a is not None
    assert (mean.before.value, mean.after.value) == (0.25, 0.5)
    assert mean.paired == (a.low / 2, a.high / 2, 88, 4)


def test_what_is_not_on_the_same_items_is_refused() -> None:
    other = answers("01")._replace(ids=["0", "x"])
    with pytest.raises(DataError, match=r"acc\.a: the models were not scored on the same items"):
        paired({"acc.a": answers("01")}, {"acc.a": other})
    with pytest.raises(DataError, match=r"measured of one model only: acc\.b"):
        paired({"acc.a": answers("01")}, {"acc.a": answers("01"), "acc.b": other})
