"""Learning-rate schedules: the factor at every corner."""

from typing import Any, get_args

import pytest

from vectorclm.training.schedule import SCHEDULES, ScheduleConfig, ScheduleKind, schedule


def test_cosine_warms_up_peaks_and_ends_at_the_floor() -> None:
    config = ScheduleConfig(kind="cosine", warmup=0.1, floor=0.2)
    factors = [schedule(config, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_warmup_stable_decay_is_flat_then_falls_to_the_floor() -> None:
    config = ScheduleConfig(kind="warmup_stable_decay", warmup=0.1, floor=0.0, decay=0.2)
    factors = [schedule(config, step, 100) for step in range(100)]
    assert factors[10:79] == [1.0] * 69
    assert factors[-1] == 0.0
    assert factors[80:] == sorted(factors[80:], reverse=True)


@pytest.mark.parametrize(
    ("changes", "corners"),
    [  # the factor in these of 100 steps: the first, both sides of every corner, the last
        ({"kind": "cosine"}, {0: 0.1, 8: 0.9, 9: 1.0, 10: 1.0, 54: 0.6071, 55: 0.5929, 98: 0.2002, 99: 0.2}),
        ({"kind": "cosine", "warmup": 0.0, "floor": 0.0}, {0: 1.0, 1: 1.0, 50: 0.5, 99: 0.0}),
        ({"kind": "warmup_stable_decay"}, {0: 0.1, 8: 0.9, 9: 1.0, 10: 1.0, 79: 1.0, 80: 0.96, 98: 0.24, 99: 0.2}),
        ({"kind": "warmup_stable_decay", "warmup": 0.0, "decay": 1.0, "floor": 0.5}, {0: 1.0, 1: 0.99, 99: 0.5}),
        ({"kind": "warmup_stable_decay", "warmup": 0.5, "decay": 0.5}, {49: 1.0, 50: 0.984, 98: 0.216, 99: 0.2}),
        ({"kind": "cosine", "floor": 1.0}, {0: 0.1, 9: 1.0, 50: 1.0, 99: 1.0}),
    ],
)
def test_the_corners_of_a_schedule(changes: dict[str, Any], corners: dict[int, float]) -> None:
    config = ScheduleConfig.model_validate({"warmup": 0.1, "floor": 0.2, **changes})
    assert {step: schedule(config, step, 100) for step in corners} == pytest.approx(corners, abs=5e-4)


def test_a_decay_that_would_begin_in_the_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup \(0\.5\) and decay \(0\.6\) are more than all steps"):
        ScheduleConfig(kind="warmup_stable_decay", warmup=0.5, decay=0.6)
    ScheduleConfig(kind="cosine", warmup=0.9)  # whose decay nobody asks for


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_schedules_stay_finite(kind: str, steps: int) -> None:
    config = ScheduleConfig.model_validate({"kind": kind})
    assert all(0 <= schedule(config, step, steps) <= 1 for step in range(steps))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_warms_up_to_the_peak_and_ends_at_the_floor(kind: ScheduleKind) -> None:
    config = ScheduleConfig(kind=kind, warmup=0.1, floor=0.2)
    factors = [schedule(config, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == pytest.approx(1.0) and factors[-1] == pytest.approx(0.2)


def test_every_schedule_that_the_setting_allows_has_a_function_of_its_own() -> None:
    assert set(get_args(ScheduleKind)) == set(SCHEDULES)
    assert len({*SCHEDULES.values()}) == len(SCHEDULES)
