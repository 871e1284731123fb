"""The lineage of a model as inline SVG: a box for each artifact, arrows from its inputs. The page sets the colours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from flows.reports.plots import plain, short
from vectorclm.lineage.chain import Lineage, Node, facts

WIDTH, TOP = 420, 12  # units
FACTS = 3  # figures shown of an artifact


def draw_lineage(found: Lineage) -> Markup:
    """Draw a lineage as a graph of its artifacts, inputs above the artifacts that read them."""
    nodes = list(found.nodes.values())
    places = placed({node.stage: [part.stage for part in node.inputs] for node in nodes})
    return graph("lineage", [_box(node, *places[node.stage]) for node in nodes])


def _box(node: Node, column: int, level: int) -> "Box":
    lines = [node.title, node.fingerprint[:16]]
    lines += [f"{short(value)} {key.replace('_', ' ')}" for key, value in list(facts(node).items())[:FACTS]]
    lines += [f"← {source.label} {source.revision.removeprefix('sha256:')[:10]}" for source in node.sources]
    return Box(node.stage, column, level, lines, [part.stage for part in node.inputs])


def placed(inputs: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, int]]:
    """Column (0 or 1) and level of each stage of a DAG, given the inputs of each, inputs first.

    A stage stands below its inputs, in the column of its farthest input, unless that place is taken or a line to a
    lower stage passes it. A level has two places; a third stage moves one level down.
    """
    depths: dict[str, int] = {}
    for name, parts in inputs.items():
        depths[name] = max((depths[part] + 1 for part in parts), default=0)
    places: dict[str, tuple[int, int]] = {}
    for name, parts in inputs.items():
        level = max((places[part][1] + 1 for part in parts), default=0)
        while {(0, level), (1, level)} <= set(places.values()):
            level += 1
        passing = {
            places[part][0]
            for other, others in inputs.items()
            for part in others
            if other != name and part in places and places[part][1] < level < depths[other]
        }
        farthest = min((places[part][::-1] for part in parts), default=(0, 0))[1]
        columns = sorted((0, 1), key=lambda column: (column in passing, column != farthest))
        places[name] = next((column, level) for column in columns if (column, level) not in places.values())
    return places


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
            parts.append(_text(x + 10, y + 18 + line * number, _cut(text, 27), kind))
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


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(plain(text))}</text>'


def _svg(title: str, parts: Sequence[str], height: float) -> Markup:
    box = f"0 0 {WIDTH} {height:.0f}"
    return Markup(f'<svg viewBox="{box}" role="img" aria-label="{escape(plain(title))}">{"".join(parts)}</svg>')
