"""compact: the cases of `demp_kernels.bench.suites.compact`, one benchmark each."""
from __future__ import annotations

from collections.abc import Callable

from demp_kernels.bench.cases import Case


def bench_compact(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
