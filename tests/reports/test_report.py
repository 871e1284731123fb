"""The pictures of the report, and that a stranger's text stays text."""

from xml.etree import ElementTree

import pytest

from flows.reports.plots import POINTS, Box, IntervalBar, bars, curves, graph, intervals, short, thinned, ticks

EVIL = '</svg><script>alert(1)</script>"&'


def test_numbers_are_short_and_ticks_are_round() -> None:
    assert [short(value) for value in (3.5e9, 650_000, 0.02, 0, -1200)] == ["3.5B", "650k", "0.02", "0", "-1.2k"]
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 3) == [3]


def test_a_long_curve_is_drawn_by_means() -> None:
    points = [(float(x), float(x % 2)) for x in range(10 * POINTS)]
    drawn = thinned(points)
    assert len(drawn) == POINTS and {y for _, y in drawn} == {0.5}
    assert thinned(points[:5]) == points[:5]


@pytest.mark.parametrize(
    "picture",
    [
        curves(EVIL, {EVIL: [(1.0, 2.0), (2.0, float(3))]}, EVIL, {EVIL: 1.5}),
        curves("one point", {"a": [(1.0, 2.0)]}),
        intervals(EVIL, {EVIL: (0.25, [IntervalBar(EVIL, 0.5, 0.4, 0.6)])}),
        bars(EVIL, {EVIL: 1.0}, {EVIL: EVIL}),
        graph(EVIL, [Box("a", 0, 0, [EVIL], []), Box("b", 1, 1, [EVIL], ["a"])]),
    ],
)
def test_pictures_are_well_formed_whatever_they_are_told(picture: str) -> None:
    assert {element.tag for element in ElementTree.fromstring(picture).iter()}.isdisjoint({"script"})
    assert "<script" not in picture
