"""norm_act's CUDA kernels, run on the CPU by the grid emulator: the table of every implementation, other schedules, other
devices, memory that is not aligned, every access checked throughout."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulated import SCHEDULES
from emulated_ops import EmulatedOps
from norm_act_table import (  # noqa: F401
    EPS,
    check_norm_act,
    sample,
    test_norm_act,
    test_norm_act_float64,
    test_norm_act_noise,
    test_norm_act_of_nan_counts_as_active,
    test_norm_act_other_activations,
    test_norm_act_refuses,
    test_norm_act_statistics_far_from_zero,
    test_norm_act_without_parameters,
)

# One case for each kernel and each way through it.
WAYS = ["planes", "14x14", "7x7", "channels last", "channels last, 13"]


@pytest.fixture(scope="module")
def library() -> EmulatedOps:
    return EmulatedOps.load()


@pytest.fixture
def ops(library: EmulatedOps) -> Iterator[EmulatedOps]:
    yield library
    library.offset = 0
    library.emulator.set_schedule(0)
    library.emulator.set_multiprocessors(3)


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
@pytest.mark.parametrize("case", WAYS)
def test_other_schedules(ops: EmulatedOps, case: str, schedule: int) -> None:
    ops.emulator.set_schedule(schedule)
    check_norm_act(ops, *sample(ops, case, torch.float32, True), "relu", 0.0)


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("case", WAYS)
def test_other_devices(ops: EmulatedOps, case: str, multiprocessors: int) -> None:
    """One multiprocessor makes every thread loop; 132 leave some without work."""
    ops.emulator.set_multiprocessors(multiprocessors)
    check_norm_act(ops, *sample(ops, case, torch.bfloat16, True), "silu", 0.0)


@pytest.mark.parametrize("case", WAYS)
def test_memory_that_is_not_aligned(ops: EmulatedOps, case: str) -> None:
    ops.offset = 1
    for dtype in (torch.float32, torch.bfloat16):
        check_norm_act(ops, *sample(ops, case, dtype, True), "leaky_relu", 0.0)


def test_the_order_of_blocks_changes_no_bit(ops: EmulatedOps) -> None:
    x, weight, bias, _, grad = sample(ops, "linear", torch.float32, False)
    results = []
    for schedule in SCHEDULES:
        ops.emulator.set_schedule(schedule)
        y, _, mean, var, mask = ops.norm_act_forward(x, weight, bias, None, "gelu", 0.0, EPS, 0.0, None)
        results.append((y, *ops.norm_act_backward(grad, x, weight, bias, None, mean, var, mask, "gelu", 0.0, EPS, False)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
