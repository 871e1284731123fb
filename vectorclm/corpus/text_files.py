"""Plain text files as rows: the column `text` is the whole file, `part` a blank-line-separated part, `page` an article.

`page` is for WikiText's own files, in which each article starts with its title `= Title =`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vectorclm.corpus.filters import Filter
from vectorclm.corpus.lines import LONGEST, lines_of
from vectorclm.corpus.row_batches import RowBatch, row_batches
from vectorclm.errors import DataError

TEXT_COLUMNS = ("text", "part", "page")


def text_columns(path: Path) -> list[str]:
    """The columns of a text file; none for an empty one."""
    return list(TEXT_COLUMNS) if next(lines_of(path, "surrogateescape"), "") else []


def text_rows(path: Path, columns: tuple[str, ...], errors: str = "strict") -> Iterator[dict[str, Any]]:
    """The rows of a text file for one of its columns; without columns, articles of WikiText, or else the whole file."""
    known = [name for name in columns if name in TEXT_COLUMNS]
    if not columns:
        known = ["page" if _is_title(next(_written(path, errors), "")) else "text"]
    if len(known) > 1:
        raise DataError(f"{path}: a text file is read by {' or '.join(known)}, not by both: name one column")
    column = known[0] if known else "text"
    for row in {"text": _whole, "part": _parts, "page": _pages}[column](path, errors):
        yield {**dict.fromkeys(columns), column: row} if known else dict.fromkeys(columns)


def text_batches(path: Path, column: str, condition: Filter | None) -> Iterator[RowBatch]:
    """The texts of one column; see `read_file_batches`."""
    yield from row_batches(text_rows(path, (column,), "surrogateescape"), column, condition, str(path))


def _written(path: Path, errors: str) -> Iterator[str]:
    return (line for line in lines_of(path, errors) if line.strip())


def _whole(path: Path, errors: str) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for line in lines_of(path, errors):
        length += len(line)
        if length > LONGEST:
            raise DataError(f'{path} has more than {LONGEST:,} characters: set text_column = "part", or split the file')
        lines.append(line)
    yield "".join(lines)


def _parts(path: Path, errors: str) -> Iterator[str]:
    lines: list[str] = []
    for line in lines_of(path, errors):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


def _is_title(line: str) -> bool:
    """Whether a line is the title of a WikiText article, `= Title =`, and not of a section, `= = Title = =`."""
    title = line.replace("= = =", "===").replace("= =", "==").strip()
    return title.startswith("= ") and title.endswith(" =")


def _pages(path: Path, errors: str) -> Iterator[str]:
    """The articles of a WikiText file, as in the hub's document-level set."""
    lines: list[str] = []
    for line in lines_of(path, errors):
        if _is_title(line):
            if (page := "".join(lines).removesuffix("\n")).strip():
                yield page
            lines = []
        lines.append(line)
    yield "".join(lines)
