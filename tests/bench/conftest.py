"""Rows made up for the tests of the bench's machinery."""
from __future__ import annotations

from collections.abc import Callable

import pytest

from demp_kernels.bench.machine import Machine
from demp_kernels.bench.rows import Row, row_of
from demp_kernels.bench.timing import Timing

MACHINE = Machine(
    device="cpu", machine="a machine", simd="avx2", cache_bytes=2**25, allocator="tuned", backend="native", torch="2.14.1",
    commit="abc", date="2026-01-02T03:04:05Z",
)


@pytest.fixture
def machine() -> Machine:
    return MACHINE


@pytest.fixture
def make_rows() -> Callable[..., list[Row]]:
    """make_rows(copy=2.0, demp=2.1, ...): the rows of one quiet case from milliseconds; other fields by name."""

    def make(*, machine: Machine = MACHINE, spread: float = 0.01, others: float | None = 0.0, factor: float = 1.0, **given) -> list[Row]:
        facts = {
            "op": "activation", "function": "relu", "noise": False, "layout": "nchw", "dtype": "float32",
            "shape": "512x64x32x32", "direction": "forward", "peak_bytes": None, "threads": 2,
        }
        facts |= {name: given.pop(name) for name in list(given) if name in facts}
        moved = given.pop("bytes", 2**28)
        rows = []
        for variant, milliseconds in given.items():
            seconds = milliseconds / 1e3
            timing = Timing(seconds, seconds * (1 - spread), seconds * (1 + spread), 9)
            size = moved if variant in ("copy", "copy_into") else int(moved * factor)
            rows.append(row_of(timing, machine, moved=size, variant=variant, others=others, **facts))
        return rows

    return make
