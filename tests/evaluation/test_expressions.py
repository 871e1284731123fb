"""Expressions of columns compute what tasks need, and nothing that never ends or fills the memory."""

from typing import Any

import pytest
from jinja2 import TemplateError

from vectorclm.evaluation.expressions import compiled

ROW = {"a": "Otter", "n": 3, "rows": ["x", "y"], "long": "x" * 1_000_000, "by": {"k": 1}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a ~ ' ' ~ n", "Otter 3"),
        ("''", ""),
        ("'7' | int", 7),
        ("a.lower().replace('t', 'tt')", "otttter"),
        ("rows | map('upper') | join(', ')", "X, Y"),
        ("', '.join(rows)", "x, y"),
        ("range(3) | list", [0, 1, 2]),
        ("rows.index('y')", 1),
        ("by.get('k') + n * 2 ** 3", 25),
        ("a[1:3] if n % 2 else a", "tt"),
        ("'ab' * n", "ababab"),
        ("rows | length", 2),
        ("long.split('y') | length", 1),
        ("a | replace('t', 'd') | truncate(3, true, '', 0)", "Odd"),
    ],
)
def test_a_column_is_computed(text: str, value: Any) -> None:
    assert compiled(text)(**ROW) == value


@pytest.mark.parametrize(
    "text",
    [
        "range(10**9) | list",
        "range(1000) | map('replace', '', long) | map('upper') | list",
        "'a' * 10**10",
        "10**9 * 'a'",
        "[0] * 10**9",
        "9 ** (9**9)",
        "(2**4000) ** 4000",
        "'%1000000000d' % 1",
        "'%s' | format(a)",
        "'{:1000000000}'.format(1)",
        "a | center(10**9)",
        "a.ljust(10**9)",
        "a.zfill(10**9)",
        "('\\t' * 1000).expandtabs(10**6)",
        "long | replace('x', long)",
        "long.replace('', long)",
        "long | replace('', long)",
        "long.join(long)",
        "long | join(long)",
        "range(10000) | map('replace', '', long) | list",
        "range(10000) | map('center', 10**9) | list",
        "1.5 | round(10**9, 'ceil')",
        "[] | slice(10**9) | list",
        "lipsum(10**6)",
        "a.__class__.__mro__",
        "a.encode().__class__",
        "(a ~ " * 500 + "a" + ")" * 500,
        "cycler(1).next()",
        "dict.fromkeys(long)",
        "rows.append(1)",
        "(" * 900 + "a" + ")" * 900,
    ],
)
def test_what_would_grow_without_bound_or_leave_the_sandbox_is_refused(text: str) -> None:
    with pytest.raises((TemplateError, RecursionError, OverflowError)):
        found = compiled(text)(**ROW)
        assert isinstance(found, str), "no value of a column"
        raise AssertionError(f"{len(found)} characters")
