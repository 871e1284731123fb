"""Filters: what they keep, and that nothing else than a comparison of columns is one."""

import pyarrow as pa
import pytest

from vectorclm.corpus.filters import Filter

TABLE = pa.table({
    "n": [1, 2, 3, None],
    "word": ["a", "b", None, "b"],
    "good": [True, False, True, True],
    "meta": [{"score": 0.5}, {"score": 1.5}, {"score": 2.5}, {"score": None}],
})  # fmt: skip


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("n >= 2", [1, 2]),
        ("1 < n <= 3 and word == 'b'", [1]),
        ("n == 1 or word == 'b'", [0, 1, 3]),
        ("not n == 1", [1, 2]),
        ("n in [1, 3]", [0, 2]),
        ("word not in ('a',)", [1, 2, 3]),
        ("n is None or word is None", [2, 3]),
        ("n is not None and good", [0, 2]),
        ("meta.score * 2 > n + 1.5", [2]),
        ("n > -1", [0, 1, 2]),
    ],
)
def test_rows_that_are_kept(text: str, rows: list[int]) -> None:
    assert Filter(text).holds(TABLE) == rows


def test_columns_are_named_once_in_order() -> None:
    assert Filter("word == 'b' and meta.score > n and n > 1").columns == ["word", "meta", "n"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true')", "is not allowed"),
        ("n.__class__()", "is not allowed"),
        ("open('x').read", "is not a column"),
        ("[n for n in (1, 2)]", "is not allowed"),
        ("lambda: n", "is not allowed"),
        ("n ** 2 > 1", r"'n \*\* 2' is not allowed"),
        ("n in [m]", "must be numbers or texts"),
        ("n >", "invalid syntax at character"),
        ("1 < 2", "names no column"),
        ("(" * 300 + "n" + ")" * 300, "not a filter"),
    ],
)
def test_what_is_no_filter_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Filter(text)
