"""The plots of the report: what they show, in the page's colours, and a stranger's text stays text."""

import math
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import pytest

from flows.reports.lineage_graph import Box, graph
from flows.reports.plots import INKS, POINTS, IntervalBar, TimedScore, bars, curves, intervals, short, thinned, timeline

EVIL = '</svg><script>alert(1)</script>"&$\\frac{$\n\x00\x1b\ud800 你好'


def texts(picture: str) -> list[str]:
    """The texts of a plot."""
    return [element.text or "" for element in ElementTree.fromstring(picture).iter("text")]


def drawn(picture: str, kind: str) -> Iterator[tuple[list[tuple[float, float]], str]]:
    """The corners and the style of each line or area of a kind."""
    for group in ElementTree.fromstring(picture).iter("g"):
        if group.get("class") == kind:
            for path in group.iter("path"):
                parts = [float(part) for part in path.attrib["d"].split() if part not in "MLz"]
                yield list(zip(parts[::2], parts[1::2], strict=True)), path.attrib["style"]


def test_numbers_are_short_and_ticks_are_round() -> None:
    assert [short(value) for value in (3.5e9, 650_000, 0.02, 0, -1200)] == ["3.5B", "650k", "0.02", "0", "-1.2k"]
    assert texts(curves("loss", {"a": [(0.0, 1.0), (1.0, 0.0)]})) == [
        "0", "0.2", "0.4", "0.6", "0.8", "1", "0", "0.2", "0.4", "0.6", "0.8", "1", "tokens"
    ]  # fmt: skip
    assert texts(curves("loss", {"a": [(2e9, 3.0)]}, "steps"))[:5] == ["0", "500M", "1B", "1.5B", "2B"]


def test_a_long_curve_is_drawn_by_means() -> None:
    points = [(float(x), float(x % 2)) for x in range(10 * POINTS)]
    means = thinned(points)
    assert len(means) == POINTS and {y for _, y in means} == {0.5}
    assert thinned(points[:5]) == points[:5]


def test_curves_have_a_colour_of_the_page_each_and_marks_their_labels() -> None:
    falling, flat = [(0.0, 4.0), (50.0, 3.0), (100.0, 2.0)], [(0.0, 2.5), (100.0, 2.5)]
    picture = curves("loss", {"falling": falling, "none": [], "flat": flat}, marks={"phase 2": 50.0})
    (first, blue), (second, orange) = drawn(picture, "curve")
    assert [x for x, _ in first] == [52, 230, 408] and first[0][1] < first[-1][
        1
    ]  # from the left to the right, downwards
    assert second[0][1] == second[-1][1] and "var(--series-0)" in blue and "var(--series-1)" in orange
    (mark,) = (line for line, _ in drawn(picture, "mark"))
    assert {x for x, _ in mark} == {230} and "phase 2" in texts(picture)


def test_a_value_that_is_not_a_number_leaves_the_rest_of_a_curve() -> None:
    points = [(0.0, 2.0), (1.0, math.nan), (2.0, math.inf), (3.0, 1.0)]
    (whole,) = drawn(curves("loss", {"a": points}), "curve")
    assert len(whole[0]) == 2
    assert curves("loss", {"a": points[1:3]}) == "" == curves("loss", {})
    (dot,) = drawn(curves("loss", {"a": [(1.0, 2.0)]}), "curve")  # a line of no length with round ends
    assert dot[0][0] == dot[0][1] and "stroke-linecap: round" in dot[1]


def test_scores_stand_between_0_and_100_percent_with_their_interval_as_a_title() -> None:
    both = [IntervalBar("base model", 0.25, -0.1, 0.5), IntervalBar("chat model", 1.0, 0.75, 1.2)]
    picture = intervals("benchmarks", {"arc": (0.25, both), "piqa": (0.5, both[1:])})
    root = ElementTree.fromstring(picture)
    base = [group for group in root.iter("g") if (group.findtext("title") or "").startswith("base model: 25.0%, 95%")]
    assert [path.attrib["d"].split()[1::3] for group in base for path in group.iter("path")] == [
        ["52", "230"], ["141", "141"]
    ]  # fmt: skip
    assert len(list(root.iter("title"))) == 6 and {"arc", "piqa", "0%", "100%"} <= set(texts(picture))
    assert [{x for x, _ in line} for line, _ in drawn(picture, "mark")] == [{141}, {230}]


def scored(day: int, value: float, stderr: float = 0.1, who: str = "model 1") -> TimedScore:
    return TimedScore(datetime(2026, 3, day, 3, tzinfo=UTC), value, value - stderr, value + stderr, who)


def test_a_timeline_has_a_row_for_each_score_and_places_points_by_time() -> None:
    scores = [scored(11, 0.4, who="model 2"), scored(1, 0.5), scored(3, 0.6)]  # in any order
    picture = timeline("scores", {"acc.world": scores, "bits_per_byte.web": [scored(11, 1.5)]})
    first, second = [line for line, _ in drawn(picture, "curve")]
    xs = [x for x, _ in first]
    assert math.isclose((xs[1] - xs[0]) / (xs[2] - xs[0]), 0.2, abs_tol=0.01) and second[0][0] == xs[2]
    assert first[1][1] < first[0][1] < first[2][1] < second[0][1]  # the higher score above; the second row below
    labels = texts(picture)
    assert {"acc.world", "bits_per_byte.web", "2026-03-01", "2026-03-11"} <= set(labels)
    hints = {group.findtext("title") for group in ElementTree.fromstring(picture).iter("g")}
    assert "model 2, 2026-03-11 03:00: 0.4000, 95% from 0.3000 to 0.5000" in hints
    bars_of = [
        [float(part) for part in path.attrib["d"].split() if part not in "MLz"]
        for group in ElementTree.fromstring(picture).iter("g")
        if (group.findtext("title") or "").startswith("model 2")
        for path in group.iter("path")
    ]
    assert bars_of[0][0] == bars_of[0][2] == xs[2] and bars_of[0][1] > bars_of[0][3]  # the interval, from low to high


def test_a_timeline_of_one_day_shows_hours_and_of_nothing_is_empty() -> None:
    one = scored(1, 0.5, 0.0)
    later = TimedScore(one.when + timedelta(hours=5), 0.5, 0.5, 0.5, "model 2")
    assert {"2026-03-01 03:00 UTC", "2026-03-01 08:00 UTC"} <= set(texts(timeline("scores", {"a": [one, later]})))
    assert "2026-03-01 03:00 UTC" in texts(timeline("scores", {"a": [one]}))
    assert timeline("scores", {"a": []}) == "" == timeline("scores", {})


def test_bars_are_as_long_as_their_shares() -> None:
    picture = bars("data mix", {"stories": 3.0, "web": 1.5, "none": 0.0}, {"stories": "3", "web": "1.5", "none": "0"})
    lengths = [max(x for x, _ in area) - min(x for x, _ in area) for area, _ in drawn(picture, "bar")]
    assert lengths == [420, 210, 4] and texts(picture) == ["stories", "3", "web", "1.5", "none", "0"]
    assert ElementTree.fromstring(bars("data mix", {}, {})).tag == "svg"


PICTURES = [
    curves(EVIL, {EVIL: [(1.0, 2.0), (2.0, float(3))]}, EVIL, {EVIL: 1.5}),
    curves("one point", {"a": [(1.0, 2.0)]}),
    intervals(EVIL, {EVIL: (0.25, [IntervalBar(EVIL, 0.5, 0.4, 0.6)])}),
    bars(EVIL, {EVIL: 1.0}, {EVIL: EVIL}),
    timeline(EVIL, {EVIL: [scored(1, 0.5, who=EVIL), scored(2, 0.6)]}),
    graph(EVIL, [Box("a", 0, 0, [EVIL], []), Box("b", 1, 1, [EVIL], ["a"])]),
]


@pytest.mark.parametrize("picture", PICTURES)
def test_pictures_are_well_formed_whatever_their_text(picture: str) -> None:
    root = ElementTree.fromstring(picture)
    assert {element.tag for element in root.iter()}.isdisjoint({"script", "style", "use", "image", "metadata"})
    assert "<script" not in picture and root.get("role") == "img"
    assert root.get("aria-label") == "one point" or (root.get("aria-label") or "").startswith("</svg><script>")


@pytest.mark.parametrize("picture", PICTURES[:5])
def test_plots_have_only_colours_of_the_page_and_no_ids(picture: str) -> None:
    styles = " ".join(element.get("style", "") for element in ElementTree.fromstring(picture).iter())
    assert "#" not in styles and "font" not in styles and " id=" not in picture
    assert all(part.split(")")[0] in INKS for part in styles.split("var(--")[1:])


def test_the_same_data_gives_the_same_bytes_in_another_process() -> None:
    source = "from tests.reports.test_plots import PICTURES; import sys; sys.stdout.write('\\n'.join(PICTURES))"
    again = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout
    assert again == "\n".join(PICTURES)


def test_a_command_that_draws_nothing_does_not_load_matplotlib() -> None:
    source = "import sys, flows.cli, flows.reports.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True)
