"""The scores of a model on a suite over time: one chart with intervals, as a page, an image and Markdown."""

import base64
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flows.reports.plots import TimedScore, timeline
from vectorclm.evaluation.statistics import Figure, score_interval

if TYPE_CHECKING:  # MLflow takes seconds to import
    from flows.tracking.registry import Result

SCALE = 1.5  # pixels of an image for each unit of a plot
MARGIN = 12  # units around the plot of an image
TEXT_STYLE = (
    "svg { background: var(--card); } text { font: 12px system-ui, sans-serif; } .strong text { font-weight: 600; }"
)

_templates = Environment(
    loader=PackageLoader("flows.reports", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def history_chart(title: str, results: "Sequence[Result]") -> Markup:
    """The chart of results, the newest of which is the first and decides which scores are shown."""
    names = results[0].figures if results else {}
    rows = {
        name: [
            TimedScore(result.when, figure.value, *score_interval(name, figure), result.title)
            for result in results
            if (figure := result.figures.get(name)) is not None
        ]
        for name in names
    }
    return timeline(f"{title}: scores over time", rows)


def as_image(picture: Markup) -> str:
    """A plot of a page as an SVG file of its own, with the colours of the page."""
    palette = _templates.get_template("palette.css.jinja").render()
    style = f"<style>{palette}{TEXT_STYLE}</style>"
    head, _, rest = str(picture).partition(">")
    head = re.sub(r'viewBox="0 0 (\S+) (\S+)"', _framed, head)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}'


def _framed(found: re.Match[str]) -> str:
    """The part of an image that is seen, with a margin, and its size; else a browser draws it as small as an icon."""
    width, height = (float(found[number]) + 2 * MARGIN for number in (1, 2))
    view = f'viewBox="-{MARGIN} -{MARGIN} {width:g} {height:g}"'
    return f'{view} width="{SCALE * width:.0f}" height="{SCALE * height:.0f}"'


def history_page(title: str, results: "Sequence[Result]") -> str:
    """The history as an HTML page without scripts or network."""
    names = list(results[0].figures)
    content = {
        "title": title,
        "results": results,
        "names": names,
        "count": _count(results),
        "picture": history_chart(title, results),
    }
    return _templates.get_template("score_history.html.jinja").render(content, interval=score_interval)


def as_markdown(title: str, results: "Sequence[Result]", link: str | None) -> str:
    """The history as Markdown with the chart inside, a table of the newest scores, and a link to the page."""
    image = base64.b64encode(as_image(history_chart(title, results)).encode()).decode()
    lines = [f"## {title}: scores over time", ""]
    if link is not None:
        lines += [f"[{_count(results)} as a page]({link})", ""]
    lines += [f"![{title}: scores over time](data:image/svg+xml;base64,{image})", ""]
    before: Mapping[str, Figure] = results[1].figures if len(results) > 1 else {}
    head, rule = f"| score | {results[0].title} | 95 % interval |", "|---|---:|---:|"
    lines += [f"{head} before |", f"{rule}---:|"] if before else [head, rule]
    for name, figure in results[0].figures.items():
        low, high = score_interval(name, figure)
        earlier = f"{before[name].value:.4f}" if name in before else ""
        line = f"| {name} | {figure.value:.4f} | {low:.4f} to {high:.4f} |"
        lines.append(f"{line} {earlier} |" if before else line)
    return "\n".join(lines)


def _count(results: "Sequence[Result]") -> str:
    return f"{len(results)} result{'' if len(results) == 1 else 's'}"
