"""Plots as inline SVG: curves, confidence intervals, bars and graphs. The page sets their colours.

Each is 420 units wide with a font size of 12, so that it is readable on a telephone. All text is escaped.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30  # margins of the plotting area
POINTS = 300  # of a curve; longer ones are drawn by means
COLOURS = 6  # the page defines them as --series-0 and so on

Point = tuple[float, float]


def short(value: float) -> str:
    """A number in short form: `3.5B`, `650k`, `0.02`."""
    size = abs(value)
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, `about` of them, for the ticks of an axis."""
    rough = (high - low) / about
    if not rough > 0:
        return [low]
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Reduce a curve to at most POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(points) / POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), max(1, size))]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


@dataclass(frozen=True)
class _Plane:
    """The mapping from values to coordinates of the picture."""

    low: Point
    high: Point

    def at(self, x: float, y: float) -> str:
        across = (x - self.low[0]) / ((self.high[0] - self.low[0]) or 1)
        up = (y - self.low[1]) / ((self.high[1] - self.low[1]) or 1)
        return f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f},{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    def frame(self, unit: str) -> Iterator[str]:
        """Grid lines and tick labels."""
        for y in ticks(self.low[1], self.high[1]):
            left, height = self.at(self.low[0], y).split(",")
            yield f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>'
            yield _text(LEFT - 6, float(height) + 4, short(y), "end")
        for x in ticks(self.low[0], self.high[0]):
            across = float(self.at(x, self.low[1]).split(",")[0])
            yield _text(across, HEIGHT - BOTTOM + 16, short(x), "middle")
        yield _text(WIDTH - RIGHT, HEIGHT - 2, unit, "end")


def curves(
    title: str, series: Mapping[str, Sequence[Point]], unit: str = "tokens", marks: Mapping[str, float] | None = None
) -> Markup:
    """A line plot; `marks` are labelled positions on the x-axis. Empty if no series has a point."""
    drawn = {label: thinned(points) for label, points in series.items() if points}
    every = [point for points in drawn.values() for point in points]
    if not every:
        return Markup()
    low, high = min(y for _, y in every), max(y for _, y in every)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    plane = _Plane((0.0, max(0.0, low - room) if low >= 0 else low - room), (max(x for x, _ in every), high + room))
    parts = list(plane.frame(unit))
    for label, place in (marks or {}).items():
        across = float(plane.at(place, plane.low[1]).split(",")[0])
        parts.append(f'<line class="mark" x1="{across}" x2="{across}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_text(across + 4, TOP + 10, label, "start", "marked"))
    for number, points in enumerate(drawn.values()):
        path = " ".join(plane.at(*point) for point in points)
        parts.append(f'<polyline class="curve" style="stroke:var(--series-{number % COLOURS})" points="{path}"/>')
        if len(points) == 1:
            x, y = path.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" style="fill:var(--series-{number % COLOURS})"/>')
    return _svg(title, parts, HEIGHT)


@dataclass(frozen=True)
class IntervalBar:
    """One score with its confidence interval and its model."""

    who: str
    value: float
    low: float
    high: float


def intervals(title: str, rows: Mapping[str, tuple[float, Sequence[IntervalBar]]]) -> Markup:
    """A row for each task: chance as a line, scores as points with confidence intervals, from 0 to 100 %."""
    parts: list[str] = []
    top = TOP
    people = list(dict.fromkeys(item.who for _, items in rows.values() for item in items))
    across = [LEFT + share * (WIDTH - LEFT - RIGHT) for share in (0.0, 1.0)]

    def at(share: float) -> float:
        return across[0] + max(0.0, min(1.0, share)) * (across[1] - across[0])

    for task, (chance, items) in rows.items():
        height = 22 + 14 * len(items)
        parts.append(_text(LEFT, top + 10, task, "start", "strong"))
        parts.append(
            f'<line class="mark" x1="{at(chance)}" x2="{at(chance)}" y1="{top + 14}" y2="{top + height - 4}"/>'
        )
        for number, item in enumerate(items):
            y = top + 24 + 14 * number
            colour = f"var(--series-{people.index(item.who) % COLOURS})"
            parts.append(f'<line class="grid" x1="{across[0]}" x2="{across[1]}" y1="{y}" y2="{y}"/>')
            parts.append(
                f"<g><title>{escape(item.who)}: {item.value:.1%}, 95% from {item.low:.1%} to {item.high:.1%}</title>"
                f'<line class="whisker" style="stroke:{colour}" x1="{at(item.low):.1f}" x2="{at(item.high):.1f}" '
                f'y1="{y}" y2="{y}"/><circle cx="{at(item.value):.1f}" cy="{y}" r="4" style="fill:{colour}"/></g>'
            )
        top += height
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_text(at(share), top + 16, f"{share:.0%}", "end" if share == 1 else "middle"))
    return _svg(title, parts, top + 24)


def bars(title: str, shares: Mapping[str, float], labels: Mapping[str, str]) -> Markup:
    """A horizontal bar for each share, with its label."""
    parts, most = [], max([*shares.values(), 1e-9])
    for number, (name, share) in enumerate(shares.items()):
        y = TOP + 40 * number
        parts.append(_text(0, y + 10, name, "start", "strong"))
        parts.append(_text(WIDTH, y + 10, labels[name], "end"))
        parts.append(f'<rect class="track" x="0" y="{y + 16}" width="{WIDTH}" height="10" rx="5"/>')
        colour = f"var(--series-{number % COLOURS})"
        width = max(4.0, share / most * WIDTH)
        parts.append(f'<rect x="0" y="{y + 16}" width="{width:.1f}" height="10" rx="5" style="fill:{colour}"/>')
    return _svg(title, parts, TOP + 40 * len(shares))


@dataclass(frozen=True)
class Box:
    """A box of a graph: its position, its lines of text, and the boxes that lead to it."""

    name: str
    column: int
    level: int
    lines: Sequence[str]  # the first is its heading
    after: Sequence[str]


def graph(title: str, boxes: Sequence[Box]) -> Markup:
    """A directed graph: boxes in two columns, one level below the other, with arrows."""
    wide, gap, line = 198, 26, 15
    heights: dict[int, int] = {}
    for box in boxes:
        heights[box.level] = max(heights.get(box.level, 0), 14 + line * len(box.lines))
    tops: dict[int, int] = {}
    top = TOP
    for level in sorted(heights):
        tops[level] = top
        top += heights[level] + gap
    parts: list[str] = []
    places: dict[str, tuple[float, float, float]] = {}
    for box in boxes:
        x, y, height = box.column * (WIDTH - wide), tops[box.level], 14 + line * len(box.lines)
        places[box.name] = (x + wide / 2, y, y + height)
        parts.append(f'<rect class="box" x="{x + 0.5}" y="{y}" width="{wide - 1}" height="{height}" rx="6"/>')
        for number, text in enumerate(box.lines):
            kind = "strong" if number == 0 else ""
            parts.append(_text(x + 10, y + 18 + line * number, _cut(text, 27), "start", kind))
    arrows = []
    for box in boxes:
        to_x, above, _ = places[box.name]
        for name in box.after:
            if name in places:
                from_x, _, below = places[name]
                bend = min(30.0, (above - below) / 2)
                path = f"M{from_x},{below} C{from_x},{below + bend} {to_x},{above - bend} {to_x},{above - 3}"
                arrows.append(f'<path class="arrow" marker-end="url(#tip)" d="{path}"/>')
    tip = '<marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
    head = [f'<defs>{tip}<path class="tip" d="M0,0 L6,3 L0,6 z"/></marker></defs>']
    return _svg(title, [*head, *arrows, *parts], top - gap + 4)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _svg(title: str, parts: Sequence[str], height: float) -> Markup:
    box = f"0 0 {WIDTH} {height:.0f}"
    return Markup(f'<svg viewBox="{box}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>')
