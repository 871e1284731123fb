"""Plots as inline SVG, drawn by matplotlib: curves, confidence intervals, timelines and bars.

The page sets their colours.

Each is 420 units wide with a font size of 12, so that it is readable on a telephone. The same data gives the same
bytes. Labels are never parsed as formulas or markup.
"""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:  # matplotlib takes a second to import, and most commands draw nothing
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30  # margins of the plotting area
POINTS = 300  # of a curve; longer ones are drawn by means
COLOURS = 6  # the page defines them as --series-0 and so on
INKS = (*(f"series-{number}" for number in range(COLOURS)), "quiet", "line", "text")  # colours of the page
DASHES = (0, (3, 3))
DOT: Mapping[str, Any] = {"solid_capstyle": "round", "clip_on": False}  # a line of no length with round ends
UNITS_PER_INCH = 72
TIMELINE_ROW = 100  # height of one score of a timeline
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Point = tuple[float, float]


def short(value: float) -> str:
    """A number in short form: `3.5B`, `650k`, `0.02`."""
    size = abs(value)
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """Reduce a curve to at most POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(points) / POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), max(1, size))]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def curves(
    title: str, series: Mapping[str, Sequence[Point]], unit: str = "tokens", marks: Mapping[str, float] | None = None
) -> Markup:
    """A line plot; `marks` are labelled positions on the x-axis. Empty if no series has a finite point."""
    finite = [[point for point in points if all(map(math.isfinite, point))] for points in series.values()]
    drawn = [thinned(points) for points in finite if points]
    every = [point for points in drawn for point in points]
    if not every:
        return Markup()
    figure, axes = _canvas(HEIGHT, (LEFT, BOTTOM, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM))
    _scale(axes, every)
    figure.text(1 - RIGHT / WIDTH, 3 / HEIGHT, plain(unit), ha="right", color=_ink("quiet"), parse_math=False)
    for label, place in (marks or {}).items():
        axes.axvline(place, color=_ink("quiet"), linewidth=1, linestyle=DASHES, clip_on=False, gid="mark")
        at: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "top"}
        axes.annotate(plain(label), (place, 1), (4, 0), color=_ink("quiet"), fontsize=11, parse_math=False, **at)
    for number, points in enumerate(drawn):
        xs, ys = zip(*points, strict=True)
        colour = _ink(f"series-{number % COLOURS}")
        if len(points) == 1:
            axes.plot(xs * 2, ys * 2, linewidth=6, color=colour, gid="curve", **DOT)
        else:
            axes.plot(xs, ys, linewidth=1.8, color=colour, gid="curve", clip_on=False)
    return _svg(figure, title)


def _scale(axes: "Axes", points: Sequence[Point]) -> None:
    """Scale the axes to the points, and draw horizontal grid lines and short numbers at round values."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = min(y for _, y in points), max(y for _, y in points)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    axes.set_xlim(0.0, max(x for x, _ in points) or 1.0)
    axes.set_ylim(max(0.0, low - room) if low >= 0 else low - room, high + room)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.tick_params(length=0, pad=6, labelcolor=_ink("quiet"), labelsize=12)
    axes.grid(axis="y", color=_ink("line"), linewidth=1, clip_on=False)
    axes.set_axisbelow(True)


@dataclass(frozen=True)
class IntervalBar:
    """One score with its confidence interval and its model."""

    who: str
    value: float
    low: float
    high: float


def intervals(title: str, rows: Mapping[str, tuple[float, Sequence[IntervalBar]]]) -> Markup:
    """A row for each task: chance as a line, scores as points with confidence intervals, from 0 to 100 %."""
    heights = [22 + 14 * len(items) for _, items in rows.values()]
    figure, axes = _canvas(TOP + sum(heights) + 24, (LEFT, 0, WIDTH - LEFT - RIGHT, TOP + sum(heights) + 24))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    people = list(dict.fromkeys(item.who for _, items in rows.values() for item in items))
    hints: dict[str, str] = {}
    top = TOP
    for (task, (chance, items)), height in zip(rows.items(), heights, strict=True):
        axes.text(0, top + 10, plain(task), color=_ink("text"), gid="strong", parse_math=False)
        sides = [min(1.0, max(0.0, chance))] * 2
        ends = [top + 14, top + height - 4]
        axes.plot(sides, ends, color=_ink("quiet"), linewidth=1, linestyle=DASHES, clip_on=False, gid="mark")
        for number, item in enumerate(items):
            y, colour = top + 24 + 14 * number, _ink(f"series-{people.index(item.who) % COLOURS}")
            name = f"item-{len(hints)}"
            hints[name] = f"{item.who}: {item.value:.1%}, 95% from {item.low:.1%} to {item.high:.1%}"
            low, value, high = (min(1.0, max(0.0, share)) for share in (item.low, item.value, item.high))
            axes.plot([0, 1], [y, y], color=_ink("line"), linewidth=1, clip_on=False)
            axes.plot([low, high], [y, y], linewidth=2.5, alpha=0.65, color=colour, gid=name, **DOT)
            axes.plot([value, value], [y, y], linewidth=8, color=colour, gid=name, **DOT)
        top += height
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        axes.text(share, top + 16, f"{share:.0%}", ha="right" if share == 1 else "center", color=_ink("quiet"))
    return _svg(figure, title, hints)


@dataclass(frozen=True)
class TimedScore:
    """A score with its confidence interval, at the time of its measurement."""

    when: datetime
    value: float
    low: float
    high: float
    who: str


def timeline(title: str, rows: Mapping[str, Sequence[TimedScore]]) -> Markup:
    """A row for each score over the same time: points with confidence intervals, joined by a line. Empty without any.

    Each row has a scale of its own, as scores differ in kind.
    """
    times = [_seconds(score.when) for scores in rows.values() for score in scores]
    if not times:
        return Markup()
    height = TOP + TIMELINE_ROW * len(rows) + BOTTOM
    figure, names = _canvas(height, (0, 0, WIDTH, height))
    names.set_axis_off()
    names.set_xlim(0, WIDTH)
    first, last = min(times), max(times)
    room = (last - first) * 0.04 or 1.0
    hints: dict[str, str] = {}
    for number, (name, scores) in enumerate(rows.items()):
        top = TOP + TIMELINE_ROW * number
        names.text(0, top + 10, plain(name), color=_ink("text"), gid="strong", parse_math=False)
        bottom, width, high = height - top - TIMELINE_ROW + 12, WIDTH - LEFT - RIGHT, TIMELINE_ROW - 34
        axes = figure.add_axes((LEFT / WIDTH, bottom / height, width / WIDTH, high / height), frame_on=False)
        axes.set_xlim(first - room, last + room)
        _draw_scores(axes, scores, number, hints)
    for place, align in ((first, "left"), (last, "right")) if last > first else ((first, "center"),):
        x = LEFT + (place - first + room) / (last - first + 2 * room) * (WIDTH - LEFT - RIGHT)
        shown = _date(place, last - first)
        names.text(x, height - 8, shown, ha=align, color=_ink("quiet"), parse_math=False)
    return _svg(figure, title, hints)


def _draw_scores(axes: "Axes", scores: Sequence[TimedScore], number: int, hints: dict[str, str]) -> None:
    """Draw one row of a timeline; the titles of its points are added to `hints`."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_autoscale_on(False)
    low, high = min(score.low for score in scores), max(score.high for score in scores)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    axes.set_ylim(low - room, high + room)
    axes.xaxis.set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.tick_params(length=0, pad=6, labelcolor=_ink("quiet"), labelsize=12)
    axes.grid(axis="y", color=_ink("line"), linewidth=1, clip_on=False)
    axes.set_axisbelow(True)
    colour = _ink(f"series-{number % COLOURS}")
    ordered = sorted(scores, key=lambda score: score.when)
    xs = [_seconds(score.when) for score in ordered]
    axes.plot(
        xs, [score.value for score in ordered], linewidth=1.2, alpha=0.5, color=colour, gid="curve", clip_on=False
    )
    for x, score in zip(xs, ordered, strict=True):
        name = f"item-{len(hints)}"
        hints[name] = (
            f"{score.who}, {score.when:%Y-%m-%d %H:%M}: {score.value:.4f}, 95% from {score.low:.4f} to {score.high:.4f}"
        )
        axes.plot([x, x], [score.low, score.high], linewidth=2.5, alpha=0.65, color=colour, gid=name, **DOT)
        axes.plot([x, x], [score.value, score.value], linewidth=7, color=colour, gid=name, **DOT)


def _seconds(when: datetime) -> float:
    return (when - EPOCH) / timedelta(seconds=1)


def _date(seconds: float, span: float) -> str:
    """A time of an axis that covers `span` seconds: the day, and where they are few the hour."""
    when = EPOCH + timedelta(seconds=seconds)
    return f"{when:%Y-%m-%d}" if span > 3 * 86_400 else f"{when:%Y-%m-%d %H:%M} UTC"


def bars(title: str, shares: Mapping[str, float], labels: Mapping[str, str]) -> Markup:
    """A horizontal bar for each share, with its label."""
    height, most = TOP + 40 * len(shares), max([*shares.values(), 1e-9])
    figure, axes = _canvas(height, (0, 0, WIDTH, height))
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    for number, (name, share) in enumerate(shares.items()):
        y, width = TOP + 40 * number, max(4.0, share / most * WIDTH)
        axes.text(0, y + 10, plain(name), color=_ink("text"), gid="strong", parse_math=False)
        axes.text(WIDTH, y + 10, plain(labels[name]), ha="right", color=_ink("quiet"), parse_math=False)
        axes.barh(y + 21, WIDTH, 10, color=_ink("line"), alpha=0.55, clip_on=False)
        axes.barh(y + 21, width, 10, color=_ink(f"series-{number % COLOURS}"), clip_on=False, gid="bar")
    axes.set_ylim(height, 0)
    return _svg(figure, title)


def _canvas(height: float, place: tuple[float, float, float, float]) -> "tuple[Figure, Axes]":
    """A figure without a background, and its axes at left, bottom, width and height in units.

    Until they are scaled, the axes count units downwards from the top.
    """
    from matplotlib.figure import Figure

    figure = Figure((WIDTH / UNITS_PER_INCH, height / UNITS_PER_INCH), UNITS_PER_INCH)
    figure.patch.set_visible(False)
    left, bottom, width, high = place
    axes = figure.add_axes((left / WIDTH, bottom / height, width / WIDTH, high / height), frame_on=False)
    axes.set_ylim(height, 0)
    axes.set_autoscale_on(False)
    return figure, axes


def _ink(name: str) -> str:
    """The colour that stands for a colour of the page until the plot is written."""
    return f"#0000{INKS.index(name) + 1:02x}"


def plain(text: str) -> str:
    """A label without the characters that XML or a line of text cannot contain."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _svg(figure: "Figure", title: str, hints: Mapping[str, str] | None = None) -> Markup:
    """Write a figure as inline SVG; `hints` are the titles of the groups that matplotlib gave these ids.

    Removed are ids, which would exist twice on the page, and style sheets, which would apply to all of it.
    """
    from matplotlib import rc_context

    written = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "vectorclm", "font.size": 12}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser chooses the font
        figure.savefig(written, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(written.getvalue())
    for parent in root.iter():
        parent.tag = parent.tag.rpartition("}")[2]
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}defs")):
                parent.remove(child)
        _page_style(parent, hints or {})
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": plain(title)}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _page_style(element: ElementTree.Element, hints: Mapping[str, str]) -> None:
    """Give an element of a plot the page's colours and font, and its title."""
    name = element.attrib.pop("id", "")
    if name in hints:
        title = ElementTree.Element("title")
        title.text = plain(hints[name])
        element.insert(0, title)
    elif name in ("mark", "curve", "strong", "bar"):
        element.set("class", name)
    style = re.sub(
        r"#0000([0-9a-f]{2})", lambda found: f"var(--{INKS[int(found[1], 16) - 1]})", element.get("style", "")
    )
    if element.tag == "text":  # the page chooses the font
        style = "; ".join(part.strip() for part in style.split(";") if not part.strip().startswith("font"))
    if style:
        element.set("style", style)
