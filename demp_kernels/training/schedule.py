"""Schedules of the penalty weight and of the noise: how strong at which step.

The one-cycle cosine is the authors' (github SimonDufLab/Maxwell_demon; optax.cosine_onecycle_schedule with its
defaults); the others are the alternatives that they ablate.
"""
from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "constant", "cosine_decay", "linear_warmup", "one_cycle"]


def one_cycle(step: int, ramp_steps: int, peak: float) -> float:
    """One cosine up over 30% of `ramp_steps`, one down over the rest, then flat.

    With s0 = peak/25, s2 = s0/1e4 and t1 = int(0.3 * ramp_steps):
        t < t1:             s0 + (peak - s0) * (1 - cos(pi t / t1)) / 2
        t1 <= t < ramp:     s2 + (peak - s2) * (1 + cos(pi (t - t1) / (ramp - t1))) / 2
        t >= ramp:          s2
    """
    start = peak / 25.0
    final = start / 1e4
    top = int(0.3 * ramp_steps)
    if step < top:
        return start + (peak - start) * 0.5 * (1.0 - math.cos(math.pi * step / top))
    if step < ramp_steps:
        return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * (step - top) / (ramp_steps - top)))
    return final


def constant(step: int, ramp_steps: int, peak: float) -> float:
    """The peak at every step."""
    return peak


def cosine_decay(step: int, ramp_steps: int, peak: float) -> float:
    """peak * (1 + cos(pi t / ramp_steps)) / 2, zero from `ramp_steps` on."""
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(step, ramp_steps) / ramp_steps))


def linear_warmup(step: int, ramp_steps: int, peak: float) -> float:
    """peak * t / ramp_steps, the peak from `ramp_steps` on."""
    return peak * min(step, ramp_steps) / ramp_steps


SCHEDULES: dict[str, Callable[[int, int, float], float]] = {
    "one_cycle": one_cycle,
    "constant": constant,
    "cosine_decay": cosine_decay,
    "linear_warmup": linear_warmup,
}
