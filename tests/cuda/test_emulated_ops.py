"""The CUDA kernels, run on the CPU by the grid emulator: the table of every implementation, then what only an emulator
can ask: other schedules, other devices, memory that is not aligned, and every access checked throughout."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from emulated import SCHEDULES
from emulated_ops import EmulatedOps
from op_table import (  # noqa: F401
    CASES,
    SEED,
    STD,
    check_activation,
    sample,
    test_activation,
    test_activation_float64,
    test_activation_noise_does_not_depend_on_layout_or_seed_sign,
    test_activation_refuses,
    test_channel_select,
    test_compact,
    test_compact_over_a_long_list,
    test_compact_refuses,
    test_relu_of_infinity,
    test_weight_noise,
    test_weight_noise_over_a_long_list,
    test_weight_noise_refuses,
)

from demp_kernels import reference


@pytest.fixture(scope="module")
def library() -> EmulatedOps:
    return EmulatedOps.load()


@pytest.fixture
def ops(library: EmulatedOps) -> Iterator[EmulatedOps]:
    yield library
    library.offset = 0
    library.emulator.set_schedule(0)
    library.emulator.set_multiprocessors(3)


# One case for each kernel and each way through it.
WAYS = ["planes", "7x7", "4x4", "channels last", "channels last, 13"]


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
@pytest.mark.parametrize("noise_std", [0.0, STD], ids=["plain", "noise"])
@pytest.mark.parametrize("case", WAYS)
def test_other_schedules(ops: EmulatedOps, case: str, noise_std: float, schedule: int) -> None:
    ops.emulator.set_schedule(schedule)
    x, channel_dim = sample(ops, case, torch.float32)
    check_activation(ops, x, channel_dim, "relu", noise_std)


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_other_schedules_of_lists(ops: EmulatedOps, schedule: int) -> None:
    ops.emulator.set_schedule(schedule)
    test_weight_noise(ops, masked=True)
    test_compact(ops)


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("noise_std", [0.0, STD], ids=["plain", "noise"])
@pytest.mark.parametrize("case", WAYS)
def test_other_devices(ops: EmulatedOps, case: str, noise_std: float, multiprocessors: int) -> None:
    """One multiprocessor makes every thread loop; 132 leave some without work."""
    ops.emulator.set_multiprocessors(multiprocessors)
    x, channel_dim = sample(ops, case, torch.bfloat16)
    check_activation(ops, torch.cat([x, x, x]) if multiprocessors == 1 else x, channel_dim, "relu", noise_std)


@pytest.mark.parametrize("noise_std", [0.0, STD], ids=["plain", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("case", WAYS)
def test_memory_that_is_not_aligned(ops: EmulatedOps, case: str, dtype: torch.dtype, noise_std: float) -> None:
    ops.offset = 1
    x, channel_dim = sample(ops, case, dtype)
    check_activation(ops, x, channel_dim, "leaky_relu", noise_std)


def test_lists_that_are_not_aligned(ops: EmulatedOps) -> None:
    ops.offset = 1
    test_weight_noise(ops, masked=True)
    test_compact(ops)


def test_channel_select_reads_zero_for_an_index_out_of_range(ops: EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU cannot look at indices without waiting for them; a wrong one must not become a wild read."""
    x = torch.randn(2, 3, 4)
    y = ops.channel_select(x, torch.tensor([0, 3, 2**40, -7]), torch.tensor([0, -1, -1]), 1)
    assert torch.equal(y[:, 0], x[:, 0]) and not y[:, 1:].any()


def test_philox_words(ops: EmulatedOps) -> None:
    """The integers are the reference's, bit for bit, in every word of the counter."""
    for quad, column, stream in [(0, 0, 0), (1, 2, 3), (2**32 - 1, 7, 1), (2**32, 2**32 - 1, 2**32 - 1), (2**61, 5, 0)]:
        got = np.zeros(4, np.uint32)
        words = torch.from_numpy(got.view(np.int32))
        ops.emulator.call("emulated_philox", words, quad, column, stream, SEED)
        counter = [torch.tensor([w]) for w in (quad & 0xFFFFFFFF, quad >> 32, column, stream)]
        key = [torch.tensor([SEED & 0xFFFFFFFF]), torch.tensor([SEED >> 32])]
        assert got.tolist() == [int(w) for w in reference.philox(counter, key)]
