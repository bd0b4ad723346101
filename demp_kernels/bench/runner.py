"""Cases in, rows out: one case at a time, all its alternatives in turns, with progress shown."""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .cases import Case, retained_graphs
from .machine import Machine, OthersMeter
from .rows import Row, row_of
from .timing import Timing, measure, peak_bytes

__all__ = ["Budget", "ProgressLines", "run_case", "thread_counts"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """seconds: of measuring a case, about. compile: with torch.compile among the alternatives. memory: with peak memory."""

    seconds: float = 1.0
    compile: bool = True
    memory: bool = True


def run_case(case: Case, machine: Machine, device: torch.device, budget: Budget) -> list[Row]:
    """The rows of one case on the threads that torch has now. Alternatives that fail are logged and left out."""
    with_compile = budget.compile and case.compile
    try:
        with retained_graphs():
            calls = _working(case, case.variants(device, compile=with_compile))
            meter = OthersMeter()
            timings = measure(calls, seconds=budget.seconds, device=device, cold=case.cold)
            others = meter.share(torch.get_num_threads())
            peaks = {name: peak_bytes(call, device) for name, call in calls.items()} if budget.memory else {}
    finally:
        if with_compile:
            # every case is a new shape; after eight of one function torch.compile would go on without compiling
            torch.compiler.reset()
    return [_row(case, name, timing, machine, peaks.get(name), others) for name, timing in timings.items()]


def _working(case: Case, calls: Mapping[str, object]) -> dict:
    """The calls that run. A compiler that is not there must not cost the other rows."""
    working = {}
    for name, call in calls.items():
        try:
            call()  # type: ignore[operator]
        except Exception as error:
            if name not in ("compile", "demp_compile"):
                raise
            log.warning("%s: no row for %s: %s", case.key, name, " ".join(str(error).split())[:200])
        else:
            working[name] = call
    return working


def _row(case: Case, variant: str, timing: Timing, machine: Machine, peak: int | None, others: float | None) -> Row:
    moved = case.copy_bytes if variant in ("copy", "copy_into") else case.bytes
    return row_of(
        timing, machine, moved=moved, op=case.op, function=case.function, noise=case.noise, layout=case.layout,
        dtype=case.dtype_text, shape=case.shape_text, direction=case.direction, variant=variant, peak_bytes=peak, others=others,
        threads=torch.get_num_threads(),
    )


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, and `most` itself."""
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == most else [*counts, most]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads within an operator, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ProgressLines:
    """A bar in a terminal, a line a case anywhere else. A context manager."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._bar = Progress(
            BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
            console=console, disable=not console.is_terminal, transient=True,
        )

    def __enter__(self) -> ProgressLines:
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def end(self, what: str, rows: Sequence[Row]) -> None:
        self._done += 1
        self._bar.advance(self._task)
        if not self._console.is_terminal:
            times = "  ".join(f"{row.variant} {row.median_ms:.3g}" for row in rows)
            self._console.print(f"[{self._done}/{self._total}] {what}: {times} ms", highlight=False, soft_wrap=True, markup=False)
