"""Schedules against values worked out from the formula, and against the library that the authors used."""
from __future__ import annotations

import math

import pytest

from demp_kernels.training.schedule import SCHEDULES, constant, cosine_decay, linear_warmup, one_cycle


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        # ramp 1000, peak 0.05: s0 = 0.002, s2 = 2e-7, t1 = 300
        (0, 0.002),
        (75, 0.002 + 0.048 * 0.5 * (1 - math.sqrt(0.5))),  # cos(pi/4)
        (150, 0.026),
        (300, 0.05),
        (475, 2e-7 + (0.05 - 2e-7) * 0.5 * (1 + math.sqrt(0.5))),
        (650, 2e-7 + (0.05 - 2e-7) * 0.5),
        (1000, 2e-7),
        (5000, 2e-7),
    ],
)
def test_one_cycle_values(step: int, expected: float) -> None:
    assert one_cycle(step, 1000, 0.05) == pytest.approx(expected, rel=1e-12)


def test_one_cycle_rises_then_falls_and_meets_at_the_top() -> None:
    values = [one_cycle(t, 997, 1.0) for t in range(1100)]
    top = int(0.3 * 997)
    assert values.index(max(values)) == top and max(values) == 1.0
    assert all(a < b for a, b in zip(values[:top], values[1 : top + 1]))
    assert all(a > b for a, b in zip(values[top:996], values[top + 1 : 997]))
    assert set(values[997:]) == {1.0 / 25 / 1e4}


@pytest.mark.parametrize("ramp", [1, 2, 3, 4])
def test_one_cycle_of_a_very_short_run_is_finite(ramp: int) -> None:
    assert all(0 <= one_cycle(t, ramp, 0.1) <= 0.1 for t in range(6))


def test_alternatives() -> None:
    assert [constant(t, 10, 2.0) for t in (0, 5, 50)] == [2.0, 2.0, 2.0]
    assert cosine_decay(0, 10, 2.0) == 2.0 and cosine_decay(5, 10, 2.0) == pytest.approx(1.0)
    assert cosine_decay(10, 10, 2.0) == pytest.approx(0.0) and cosine_decay(99, 10, 2.0) == pytest.approx(0.0)
    assert [linear_warmup(t, 10, 2.0) for t in (0, 5, 10, 20)] == [0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_zero_peak_is_zero_everywhere(name: str) -> None:
    assert all(SCHEDULES[name](t, 10, 0.0) == 0.0 for t in range(15))
