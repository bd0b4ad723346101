"""dispatch: the cases of `demp_kernels.bench.suites.dispatch`, one benchmark each."""
from __future__ import annotations

from collections.abc import Callable

from demp_kernels.bench.cases import Case


def bench_dispatch(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
