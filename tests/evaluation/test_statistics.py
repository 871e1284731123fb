"""Standard errors and intervals of shares, against the figures of other programs."""

import pytest

from vectorclm.evaluation.statistics import (
    CONFIDENCE,
    Change,
    Figure,
    figures,
    mean_figure,
    share_error,
    share_stderr,
    wilson_interval,
)


def test_intervals_hold_at_the_ends() -> None:
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # statsmodels' proportion_confint, "wilson"
    low, high = wilson_interval(1.0, 480)
    assert high == 1.0 and low == pytest.approx(0.99206, abs=1e-5)
    low, high = wilson_interval(0.0, 480)
    assert low == 0.0 and high == pytest.approx(1 - 0.99206, abs=1e-5)
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
    share = 7 / 49  # not a whole number when multiplied back
    assert wilson_interval(share, 49)[0] < share < wilson_interval(share, 49)[1]


def test_errors_of_shares_and_of_their_mean() -> None:
    assert share_stderr(0.5, 101) == pytest.approx(0.05) and share_stderr(1.0, 5) == share_stderr(0.0, 1) == 0
    assert share_error(0.0, 98) == pytest.approx(share_error(1.0, 98))
    for right, items in ((0, 1), (1, 1), (2, 2), (1, 3), (50, 100), (480, 480), (3, 10_000)):
        share = right / items
        low, high = wilson_interval(share, items)
        reach = CONFIDENCE * share_error(share, items) + 1e-9
        assert share - reach <= low and share + reach >= high
        assert share_error(share, items) >= share_stderr(share, items)
    assert mean_figure([Figure(0.2, 0.03), Figure(0.4, 0.04)]) == pytest.approx(Figure(0.3, 0.025))


def test_few_items_decide_nothing() -> None:
    def result(right: int, items: int) -> dict[str, Figure]:
        share = right / items
        task = {"acc": share, "stderr": share_stderr(share, items), "items": items}
        chat = {"prompts": items, "answered_in_template": right}
        asked = {"followed_content": {"share": share, "stderr": share_stderr(share, items), "items": items}}
        return figures({"tasks": {"world": task}, "text": {}, "chat": chat, "instructions": asked})

    for name, one in result(1, 1).items():
        assert one.stderr > 0.4, name
        assert not Change(name, one, result(0, 1)[name]).beyond_noise
        assert not Change(name, result(5, 5)[name], result(0, 5)[name]).beyond_noise
        assert Change(name, result(8, 8)[name], result(0, 8)[name]).beyond_noise
