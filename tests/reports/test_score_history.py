"""The scores of a model over time: the chart, and the same chart in a page, an image and Markdown."""

import base64
import re
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

from flows.reports.plots import INKS
from flows.reports.score_history import as_image, as_markdown, history_chart, history_page
from flows.tracking.registry import Result
from vectorclm.evaluation.statistics import Figure

EVIL = "</svg><script>alert(1)</script>"
TITLE = f"vectorclm-chat@candidate on small {EVIL}"
NOW = datetime(2026, 3, 30, 3, tzinfo=UTC)


def result(days: int, **scores: float) -> Result:
    figures = {name.replace("__", "."): Figure(value, 0.1) for name, value in scores.items()}
    return Result(f"vectorclm-chat {9 - days} {EVIL}", NOW - timedelta(days=days), "f" * 64, figures)


RESULTS = [result(0, acc__world=0.95, bits_per_byte__web=1.5), result(1, acc__world=0.5), result(2, acc__world=0.4)]


def titles(picture: str) -> list[str]:
    every = ElementTree.fromstring(picture).iter()
    return [element.text or "" for element in every if element.tag.rpartition("}")[2] == "title"]


def test_the_chart_has_each_score_with_its_interval() -> None:
    found = titles(history_chart(TITLE, RESULTS))
    assert len({*found}) == 4  # 3 of acc.world, 1 of bits_per_byte.web
    assert any(text.endswith("2026-03-30 03:00: 0.9500, 95% from 0.7540 to 1.0000") for text in found)
    assert any(text.endswith("2026-03-30 03:00: 1.5000, 95% from 1.3040 to 1.6960") for text in found)


def test_the_image_is_a_file_of_its_own_with_the_colours_of_the_page() -> None:
    image = as_image(history_chart(TITLE, RESULTS))
    root = ElementTree.fromstring(image)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(root.attrib["width"]) > 500 and float(root.attrib["height"]) > 300  # else it is drawn as an icon
    style = root.findtext("{http://www.w3.org/2000/svg}style") or ""
    used = {name for name in INKS if f"var(--{name})" in image}
    assert used and all(re.search(rf"--{name}: #", style) for name in used)
    assert "<script" not in image and "http" not in image.replace("http://www.w3.org/2000/svg", "")


def test_the_page_has_the_chart_and_every_result() -> None:
    page = history_page(TITLE, RESULTS)
    assert page.count("<svg") == 1 and page.count("<tr>") == 4 and "0.7540 to 1.0000" in page
    assert "<script" not in page and not re.search(r"(src|href)=|url\((?!#)|@import", page)


def test_the_markdown_holds_the_same_image_and_links_the_page() -> None:
    text = as_markdown("vectorclm-chat@candidate on small", RESULTS, "http://here/reports/f.html")
    (inside,) = re.findall(r"!\[.*\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", text)
    assert titles(base64.b64decode(inside).decode()) == titles(history_chart("", RESULTS))
    assert "[3 results as a page](http://here/reports/f.html)" in text
    assert "| acc.world | 0.9500 | 0.7540 to 1.0000 | 0.5000 |" in text
    assert "as a page" not in as_markdown("a", RESULTS[:1], None)


def test_a_first_result_is_one_and_has_none_before_it() -> None:
    text = as_markdown("a", RESULTS[:1], "http://here")
    assert "[1 result as a page]" in text and "before" not in text and "before |" in as_markdown("a", RESULTS, None)
    assert "1 result of equal settings" in history_page(TITLE, RESULTS[:1])
