"""Standard errors and intervals of shares, against the figures of other programs."""

import pytest

from vectorclm.evaluation.statistics import Figure, adjusted_stderr, mean_figure, share_stderr, wilson_interval


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
    assert adjusted_stderr(1.0, 98) == pytest.approx((0.99 * 0.01 / 100) ** 0.5)
    assert adjusted_stderr(0.0, 98) == pytest.approx(adjusted_stderr(1.0, 98))
    assert mean_figure([Figure(0.2, 0.03), Figure(0.4, 0.04)]) == pytest.approx(Figure(0.3, 0.025))
