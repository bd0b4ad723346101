"""activation: the cases of `demp_kernels.bench.suites.activation`, one benchmark each."""
from __future__ import annotations

from collections.abc import Callable

from demp_kernels.bench.cases import Case


def bench_activation(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
