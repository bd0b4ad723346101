"""Rows as sheets: titles and cells, the same for the terminal and for Markdown."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.text import Text

from .goals import CLOCK, Verdict, describe, judge, number
from .rows import Group, Row, groups

__all__ = [
    "COMPACTION_NAMES", "LEGEND", "OWN_NAMES", "STEP_NAMES", "Sheet", "case_text", "goals_sheet", "headline", "losses",
    "milliseconds", "op_sheets", "program_sheets", "reasons",
]

BASES = ("plain", "eager", "compile")
DIRECTIONS = {"both": "forward + backward", "in_place": "in place"}
STEP_NAMES = {
    "plain_nchw": "plain, NCHW", "plain_channels_last": "plain, channels_last",
    "plain_fused_optimizer_tuned": "plain, channels_last, fused AdamW, allocator tuned",
    "plain_compile_tuned": "plain, the same under torch.compile",
    "demp_unfused": "prepared with fuse=False, fused AdamW", "demp": "prepared, fused AdamW",
    "demp_tuned": "prepared, fused AdamW, allocator tuned", "demp_compile_tuned": "that under torch.compile",
}
OWN_NAMES = {
    "own_work": "DemP's own work a step", "own_penalty": "of it the penalty", "own_counts": "of it the counts",
    "own_noise": "of it the noise", "own_decision": "of it the decisions",
}
COMPACTION_NAMES = {
    "copy_into": "warm copy of what is kept", "plan": "plan", "commit": "commit", "demp": "all", "torch_pruning": "Torch-Pruning",
    "torch_kirigami": "torch-kirigami",
}
LEGEND = (
    "ms: of one call; copy: GB/s of an allocated copy in the same turns; of copy: share of its GB/s; vs: how many times faster "
    "than PyTorch without counting and noise (plain), the same work in eager PyTorch, and under torch.compile; compiled: ms of "
    "this op inside torch.compile, where it stays opaque; peak: memory of one call; ~: the machine was not quiet"
)


@dataclass(frozen=True)
class Sheet:
    """A table. The first column holds text, the others numbers, unless `text_columns` says more."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Text | str, ...]]
    text_columns: tuple[str, ...] = ()


def headline(rows: Sequence[Row]) -> str:
    """One line: where and with what the rows were measured."""
    row = rows[0]
    simd = f", {row.simd}" if row.simd else ""
    threads = sorted({r.threads for r in rows})
    return (
        f"{row.machine}{simd}, {_listed(threads)} thread{'s' if threads != [1] else ''}, allocator "
        f"{_listed(sorted({r.allocator for r in rows}))}, kernels {row.backend}, torch {row.torch}, commit "
        f"{_listed(sorted({r.commit for r in rows}))}, {row.date[:10]}"
    )


def _listed(values: Iterable[object]) -> str:
    return "/".join(map(str, values))


# --- ops -------------------------------------------------------------------------------------------------------------


def op_sheets(rows: Iterable[Row], *, wide: bool = True) -> list[Sheet]:
    """One sheet an op. Times are medians; a case that loses to PyTorch is red and stays in. Not `wide`: without the less
    important columns."""
    by_op: dict[str, list[Group]] = {}
    for group in groups(rows):
        if "demp" in group.rows and "copy" in group.rows:
            by_op.setdefault(group.case.op, []).append(group)
    return [_op_sheet(op, cases, wide) for op, cases in by_op.items()]


def _op_sheet(op: str, cases: list[Group], wide: bool) -> Sheet:
    rows = [_op_cells(group) for group in cases]
    dropped = set() if len({group.case.threads for group in cases}) > 1 else {"threads"}
    if not wide:
        dropped |= {"p20-p80", "copy", "compiled", "peak"}
    # columns that nothing was measured for
    dropped |= {name for name in rows[0] if not any(str(cells[name]) for cells in rows)}
    columns = tuple(name for name in rows[0] if name not in dropped)
    return Sheet(op, columns, [tuple(cells[name] for name in columns) for cells in rows])


def _op_cells(group: Group) -> dict[str, Text | str]:
    demp, copy = group.rows["demp"], group.rows["copy"]
    share = demp.gb_per_s / copy.gb_per_s if copy.gb_per_s else 0.0
    return {
        "case": case_text(group) + ("" if group.quiet else " ~"), "threads": str(demp.threads),
        "ms": milliseconds(demp.median_ms), "p20-p80": f"{milliseconds(demp.p20_ms)}-{milliseconds(demp.p80_ms)}",
        "GB/s": f"{demp.gb_per_s:.1f}", "copy": f"{copy.gb_per_s:.1f}", "of copy": f"{100 * share:.0f}%",
        **{f"vs {base}": _times(group.ratio(base, "demp")) for base in BASES},
        "compiled": "" if (compiled := group.time("demp_compile")) is None else milliseconds(compiled),
        "peak": "" if demp.peak_bytes is None else f"{demp.peak_bytes / 2**20:.1f} MiB",
    }


def case_text(group: Group) -> str:
    case = group.case
    noise = " + noise" if case.noise else ""
    return f"{case.function}{noise} {DIRECTIONS.get(case.direction, case.direction)} {case.layout} {case.dtype} {case.shape}"


def _times(ratio: float | None) -> Text | str:
    if ratio is None:
        return ""
    return Text(f"{ratio:.2f}x", style="red" if ratio < 1 / CLOCK else "green" if ratio > CLOCK else "")


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def losses(rows: Iterable[Row]) -> list[str]:
    """Cases in which PyTorch was faster than the op, in words: nobody should have to look for them. Noise is compared with
    noise only."""
    found = []
    for group in groups(rows):
        for base in BASES:
            ratio = group.ratio(base, "demp")
            if ratio is not None and ratio < 1 / CLOCK and not (base == "plain" and group.case.noise):
                found.append(f"{group.case.op} {describe(group)}: {1 / ratio:.2f}x the time of {base}")
    return found


# --- programs and goals ----------------------------------------------------------------------------------------------


def program_sheets(rows: Iterable[Row]) -> list[Sheet]:
    """Training steps (a column each) and compactions (a line each), where there are rows of them; p20-p80 behind the median."""
    rows = list(rows)
    sheets = []
    steps = [group for group in groups(rows) if group.case.op == "step"]
    if steps:
        shown = _shown(STEP_NAMES | OWN_NAMES, steps)
        lines = [(title, *(_with_spread(group.rows.get(name)) for group in steps)) for name, title in shown.items()]
        sheets.append(Sheet("step, ms", ("", *(_program_title(group) for group in steps)), lines))
    removals = [group for group in groups(rows) if group.case.op == "compaction"]
    if removals:
        shown = _shown(COMPACTION_NAMES, removals)
        lines = [
            (_program_title(group), str(group.case.threads), *(_with_spread(group.rows.get(name)) for name in shown))
            for group in removals
        ]
        sheets.append(Sheet("compaction, ms", ("half of the units removed", "threads", *shown.values()), lines))
    return sheets


def _shown(names: dict[str, str], cases: list[Group]) -> dict[str, str]:
    return {name: title for name, title in names.items() if any(name in group.rows for group in cases)}


def _program_title(group: Group) -> str:
    return f"{group.case.function} {group.case.shape}" + ("" if group.quiet else " ~")


def _with_spread(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{milliseconds(row.median_ms)} ({milliseconds(row.p20_ms)}-{milliseconds(row.p80_ms)})"


def goals_sheet(rows: Iterable[Row]) -> Sheet:
    """The goals that something was measured for; the title says how many were not."""
    verdicts = judge(rows)
    measured = [verdict for verdict in verdicts if verdict.cases or verdict.noisy]
    others = len(verdicts) - len(measured)
    title = "goals" + (f" ({others} more need other rows)" if others else "")
    columns = ("goal", "wanted", "median", "worst", "cases", "verdict", "worst case")
    return Sheet(title, columns, [_goal_cells(verdict) for verdict in measured], ("wanted", "verdict", "worst case"))


def reasons(rows: Iterable[Row]) -> list[str]:
    """What stands in the way of the goals that are not met, in words."""
    unmet: dict[str, list[str]] = {}
    for verdict in judge(rows):
        if verdict.met is False:
            unmet.setdefault(verdict.goal.why, []).append(verdict.goal.text)
    return [f"{'; '.join(texts)}: {why}" for why, texts in unmet.items()]


def _goal_cells(verdict: Verdict) -> tuple[Text | str, ...]:
    style = {None: "yellow", True: "green", False: "red"}[verdict.met]
    unit = verdict.goal.unit
    values = ("", "")
    if verdict.median is not None and verdict.worst is not None:
        values = (number(verdict.median, unit), number(verdict.worst, unit))
    noisy = f" (+{verdict.noisy} ~)" if verdict.noisy else ""
    return (
        verdict.goal.text, verdict.goal.limit_text, *values, f"{verdict.reached}/{verdict.cases}{noisy}",
        Text(verdict.word, style=style), verdict.where if verdict.met is False else "",
    )
