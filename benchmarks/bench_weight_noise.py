"""weight_noise: the cases of `demp_kernels.bench.suites.weight_noise`, one benchmark each."""
from __future__ import annotations

from collections.abc import Callable

from demp_kernels.bench.cases import Case


def bench_weight_noise(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
