"""The emulator finds what it is there to find: every kind of mistake, planted in a small kernel, is an error or a wrong
result, and the kernel without it is right under every schedule."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulated import EMULATOR, SCHEDULES, EmulationError, Emulator, build, guarded

NONE, DROPPED_BARRIER, WRONG_TREE, LOAD_PAST_END, MISALIGNED, DROPPED_WARP_SYNC, PLAIN_COUNT, DIVERGENT, WRONG_MASK = range(9)


@pytest.fixture(scope="module")
def sample() -> Emulator:
    return Emulator(build([EMULATOR / "sample_kernels.cpp"]))


@pytest.fixture(params=SCHEDULES)
def emulator(sample: Emulator, request: pytest.FixtureRequest) -> Iterator[Emulator]:
    sample.set_schedule(request.param)
    yield sample
    sample.set_schedule(0)


def _sum_and_count(emulator: Emulator, mistake: int, watch: bool) -> tuple[float, int]:
    x = guarded(torch.randn(201, generator=torch.Generator().manual_seed(3)))
    total, positive = guarded(torch.zeros(1)), guarded(torch.zeros(1, dtype=torch.int32))
    with emulator.watching(*[x, total, positive] if watch else []):
        emulator.call("sample_sum_and_count", x, 201, total, positive, mistake)
    return abs(total.item() - x.sum().item()) < 1e-4, positive.item() == (x > 0).sum().item()


@pytest.mark.parametrize("watch", [False, True])
def test_right_kernel_passes(emulator: Emulator, watch: bool) -> None:
    assert _sum_and_count(emulator, NONE, watch) == (True, True)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [(DROPPED_BARRIER, "race|unwritten"), (LOAD_PAST_END, "out-of-bounds read"), (PLAIN_COUNT, "race")],
)
def test_mistake_is_an_error_under_every_schedule(emulator: Emulator, mistake: int, words: str) -> None:
    with pytest.raises(EmulationError, match=words):
        _sum_and_count(emulator, mistake, watch=True)


def test_wrong_reduction_tree_gives_a_wrong_sum(emulator: Emulator) -> None:
    assert _sum_and_count(emulator, WRONG_TREE, watch=True) == (False, True)


def test_schedules_alone_show_races(sample: Emulator) -> None:
    """Without access checks too: a dropped barrier reads poison, a plain count loses increments when preempted."""

    def outcomes(mistake: int) -> list[tuple[bool, bool]]:
        found = []
        for schedule in SCHEDULES:
            sample.set_schedule(schedule)
            found.append(_sum_and_count(sample, mistake, watch=False))
        return found

    assert (False, True) in outcomes(DROPPED_BARRIER)
    assert (True, False) in outcomes(PLAIN_COUNT)
    assert (False, True) in outcomes(LOAD_PAST_END)  # the room around the tensor holds NaN


def test_warp_exchange_needs_a_warp_barrier(emulator: Emulator) -> None:
    x, y = guarded(torch.arange(32.0)), guarded(torch.zeros(32))
    with emulator.watching(x, y):
        emulator.call("sample_rotate_warp", x, y, NONE)
        assert torch.equal(y, x.roll(-1))
        with pytest.raises(EmulationError, match="race|unwritten"):
            emulator.call("sample_rotate_warp", x, y, DROPPED_WARP_SYNC)


def test_misaligned_words_are_refused(emulator: Emulator) -> None:
    x, y = guarded(torch.arange(68.0)), guarded(torch.zeros(64))
    with emulator.watching(x, y):
        emulator.call("sample_copy_words", x, y, 16, NONE)
        assert torch.equal(y, x[:64])
        with pytest.raises(EmulationError, match="misaligned access of 16 bytes"):
            emulator.call("sample_copy_words", x, y, 16, MISALIGNED)


@pytest.mark.parametrize(("mistake", "words"), [(DIVERGENT, "deadlock"), (WRONG_MASK, "leaves out the calling lane")])
def test_warp_operations_that_cannot_end(emulator: Emulator, mistake: int, words: str) -> None:
    x, y = guarded(torch.ones(32)), guarded(torch.zeros(1))
    emulator.call("sample_sum_warp", x, y, NONE)
    assert y.item() == 32
    with pytest.raises(EmulationError, match=words):
        emulator.call("sample_sum_warp", x, y, mistake)
    emulator.call("sample_sum_warp", x, y, NONE)  # an error leaves the emulator usable
    assert y.item() == 32
