"""norm_act: the cases of `demp_kernels.bench.suites.norm_act`, one benchmark each."""
from __future__ import annotations

from collections.abc import Callable

from demp_kernels.bench.cases import Case


def bench_norm_act(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
