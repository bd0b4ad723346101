"""Rows: what is kept of a measurement, one for each alternative of each case, appended to a CSV."""
from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..recipes.errors import RecipeError
from .machine import Machine
from .timing import Timing

__all__ = ["Group", "Row", "append_rows", "groups", "latest", "read_rows", "row_of"]


@dataclass(frozen=True)
class Row:
    """One alternative of one case.

    op: stem. function: what of it (relu, bn+relu, resnet18, ...). layout: nchw, channels_last, nc, ntc, list. shape: 128x64x32x32.
    direction: forward, backward, both, in_place, step, .... variant: see `VARIANTS` in `cases`.
    *_ms: milliseconds of one call over `samples` samples. bytes: read and written by the op as it should be done, the copy:
    by the copy. gb_per_s: bytes / median. peak_bytes: most memory held by one call on top of its inputs; empty if unknown.
    others: share of the time of the cores that the threads need, taken by other processes meanwhile; empty if unknown.
    allocator: tuned (by `tune_allocator`), default or caching (CUDA). date: when the run began; rows that share it were
    measured together.
    """

    op: str
    function: str
    noise: bool
    layout: str
    dtype: str
    shape: str
    direction: str
    variant: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    bytes: int
    gb_per_s: float
    peak_bytes: int | None
    others: float | None
    threads: int
    device: str
    machine: str
    simd: str
    cache_bytes: int
    allocator: str
    backend: str
    torch: str
    commit: str
    date: str

    @property
    def spread(self) -> float:
        return self.p80_ms / self.p20_ms if self.p20_ms > 0 else float("inf")


def row_of(timing: Timing, machine: Machine, *, moved: int = 0, **facts: Any) -> Row:
    """A row from a timing, the machine's facts, the bytes moved (0: they say nothing here) and the remaining fields."""
    return Row(
        median_ms=timing.median * 1e3, p20_ms=timing.p20 * 1e3, p80_ms=timing.p80 * 1e3, samples=timing.samples, bytes=moved,
        gb_per_s=moved / timing.median / 1e9 if moved else 0.0, **asdict(machine), **facts,
    )


_READERS: dict[str, Callable[[str], Any]] = {
    "bool": lambda text: text == "1", "int": int, "float": float, "str": str,
    "int | None": lambda text: int(text) if text else None, "float | None": lambda text: float(text) if text else None,
}
COLUMNS = tuple(field.name for field in fields(Row))


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of a CSV; a new file gets the header. Raises RecipeError if the file has other columns."""
    rows = list(rows)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_header(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({name: _text(value) for name, value in asdict(row).items()} for row in rows)


def read_rows(path: Path) -> list[Row]:
    """All rows of a CSV. Raises RecipeError if there is no such file or it is no file of ours."""
    if not path.is_file():
        raise RecipeError(f"rows: {path} must be a CSV written by `demp bench`, found no file")
    _check_header(path)
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, values in enumerate(csv.DictReader(file), start=2):
            try:
                rows.append(Row(**{field.name: _READERS[str(field.type)](values[field.name]) for field in fields(Row)}))
            except (TypeError, ValueError) as error:
                raise RecipeError(f"rows: line {number} of {path} cannot be read: {error}") from error
    return rows


def _check_header(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != COLUMNS:
        odd = sorted(set(header) ^ set(COLUMNS)) or ["their order"]
        raise RecipeError(f"rows: {path} must have the columns of this version, differs in {', '.join(odd)}")


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Group:
    """The rows of one case, by variant: what was measured in turns, so what can be compared."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {row.variant: row for row in rows}
        self.case = rows[0]
        """Any row of the group, for what they have in common."""

    def time(self, variant: str) -> float | None:
        """Median milliseconds, or None if the case has no such variant."""
        return self.rows[variant].median_ms if variant in self.rows else None

    def ratio(self, variant: str, base: str) -> float | None:
        """Time of `variant` over that of `base`: below 1 it is faster. None if one of them was not measured."""
        a, b = self.time(variant), self.time(base)
        return None if a is None or not b else a / b

    def ratio_per_byte(self, variant: str, base: str) -> float | None:
        """The same for the time of a byte: what is fair where an op has to move more than the copy does."""
        a, b = self.rows.get(variant), self.rows.get(base)
        return None if a is None or b is None or not a.gb_per_s else b.gb_per_s / a.gb_per_s

    @property
    def quiet(self) -> bool:
        """Whether other processes left the machine alone and a copy (or, without one, the op) took the same time again and
        again."""
        if any(row.others is not None and row.others > OTHERS for row in self.rows.values()):
            return False
        known = [self.rows[name].spread for name in ("copy_into", "copy", "demp") if name in self.rows]
        return not known or min(known) <= SPREAD


SPREAD = 1.25
"""p80 / p20 of a copy up to which the machine counts as quiet."""
OTHERS = 0.05
"""What `others` may be on a quiet machine. Every parallel op waits for its slowest
thread, so one busy core in the way costs a time slice (milliseconds), whatever the op."""

_CASE = ("date", "device", "allocator", "threads", "op", "function", "noise", "layout", "dtype", "shape", "direction")


def groups(rows: Iterable[Row]) -> list[Group]:
    """The rows by case, in the order of their first appearance."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name) for name in _CASE), []).append(row)
    return [Group(members) for members in found.values()]


def latest(rows: Sequence[Row], *, device: str | None = None) -> list[Row]:
    """The newest rows of each case on the newest row's machine: what tables and figures show of a file with many runs."""
    rows = [row for row in rows if device is None or row.device == device]
    if not rows:
        return []
    newest = max(rows, key=lambda row: row.date)
    here = [row for row in rows if (row.machine, row.device) == (newest.machine, newest.device)]
    runs: dict[tuple, str] = {}
    for row in here:
        key = tuple(getattr(row, name) for name in _CASE[1:])
        runs[key] = max(runs.get(key, ""), row.date)
    return [row for row in here if runs[tuple(getattr(row, name) for name in _CASE[1:])] == row.date]
