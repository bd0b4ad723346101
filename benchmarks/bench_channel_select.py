"""channel_select: the cases of `demp_kernels.bench.suites.channel_select`, one benchmark each."""
from __future__ import annotations

from collections.abc import Callable

from demp_kernels.bench.cases import Case


def bench_channel_select(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
