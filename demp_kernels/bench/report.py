"""Rows as tables: in the terminal, and as Markdown between two markers of a README."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from ..recipes.errors import RecipeError
from .goals import CLOCK, Verdict, describe, judge, number
from .rows import Group, Row, groups, latest

__all__ = ["BEGIN", "END", "LEGEND", "goals_table", "headline", "losses", "op_tables", "readme_table", "special_tables", "update_readme"]

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
BASES = {"plain": "plain", "eager": "eager", "compile": "compile"}
DIRECTIONS = {"both": "forward + backward", "in_place": "in place"}


def headline(rows: Sequence[Row]) -> str:
    """One line: where and with what the rows were measured."""
    row = rows[0]
    simd = f", {row.simd}" if row.simd else ""
    threads = sorted({r.threads for r in rows})
    return (
        f"{row.machine}{simd}, {_listed(threads)} thread{'s' if threads != [1] else ''}, allocator "
        f"{_listed(sorted({r.allocator for r in rows}))}, kernels {row.backend}, torch {row.torch}, commit {row.commit}, {row.date[:10]}"
    )


def _listed(values: Iterable[object]) -> str:
    return "/".join(map(str, values))


# --- terminal --------------------------------------------------------------------------------------------------------


def op_tables(rows: Iterable[Row], width: int = 200) -> list[Table]:
    """One table an op. Times are medians; a case that loses to PyTorch is red and stays in. Below a width of 130 characters
    the less important columns are left out."""
    by_op: dict[str, list[Group]] = {}
    for group in groups(rows):
        if "demp" in group.rows and "copy" in group.rows:
            by_op.setdefault(group.case.op, []).append(group)
    return [_op_table(op, cases, wide=width >= 130) for op, cases in by_op.items()]


LEGEND = (
    "ms: of one call; copy: GB/s of an allocated copy in the same turns; of copy: share of its GB/s; vs: how many times faster "
    "than PyTorch without counting and noise (plain), the same work in eager PyTorch, and under torch.compile; peak: memory of "
    "one call; ~: the machine was not quiet"
)


def _op_table(op: str, cases: list[Group], *, wide: bool) -> Table:
    several = len({group.case.threads for group in cases}) > 1
    rows = [_op_cells(group) for group in cases]
    dropped = set() if several else {"threads"}
    if not wide:
        dropped |= {"p20-p80", "copy", "peak"}
    # columns that nothing was measured for
    dropped |= {name for name in rows[0] if not any(str(cells[name]) for cells in rows)}
    table = _table(op)
    for name in rows[0]:
        if name not in dropped:
            table.add_column(name, justify="left" if name == "case" else "right", min_width=24 if name == "case" else None, overflow="fold")
    for cells in rows:
        table.add_row(*(cell for name, cell in cells.items() if name not in dropped))
    return table


def _op_cells(group: Group) -> dict[str, Text | str]:
    demp, copy = group.rows["demp"], group.rows["copy"]
    share = demp.gb_per_s / copy.gb_per_s if copy.gb_per_s else 0.0
    return {
        "case": _case_text(group) + ("" if group.quiet else " ~"), "threads": str(demp.threads),
        "ms": milliseconds(demp.median_ms), "p20-p80": f"{milliseconds(demp.p20_ms)}-{milliseconds(demp.p80_ms)}",
        "GB/s": f"{demp.gb_per_s:.1f}", "copy": f"{copy.gb_per_s:.1f}", "of copy": f"{100 * share:.0f}%",
        **{f"vs {name}": _times(group.ratio(base, "demp")) for base, name in BASES.items()},
        "peak": "" if demp.peak_bytes is None else f"{demp.peak_bytes / 2**20:.1f} MiB",
    }


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _case_text(group: Group) -> str:
    case = group.case
    noise = " + noise" if case.noise else ""
    return f"{case.function}{noise} {DIRECTIONS.get(case.direction, case.direction)} {case.layout} {case.dtype} {case.shape}"


def _times(ratio: float | None) -> Text:
    if ratio is None:
        return Text("")
    return Text(f"{ratio:.2f}x", style="red" if ratio < 1 / CLOCK else "green" if ratio > CLOCK else "")


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def losses(rows: Iterable[Row]) -> list[str]:
    """Cases in which PyTorch was faster than the op, in words: nobody should have to look for them. Noise is compared with
    noise only."""
    found = []
    for group in groups(rows):
        for base, name in BASES.items():
            ratio = group.ratio(base, "demp")
            if ratio is not None and ratio < 1 / CLOCK and not (base == "plain" and group.case.noise):
                found.append(f"{group.case.op} {describe(group)}: {1 / ratio:.2f}x the time of {name}")
    return found


def goals_table(verdicts: Sequence[Verdict]) -> Table:
    """The goals that something was measured for; the title says how many were not."""
    measured = [verdict for verdict in verdicts if verdict.cases or verdict.noisy]
    others = len(verdicts) - len(measured)
    table = _table("goals" + (f" ({others} more need other rows)" if others else ""))
    for name, right in (("goal", 0), ("wanted", 0), ("median", 1), ("worst", 1), ("cases", 1), ("", 0), ("worst case", 0)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for verdict in measured:
        style = {None: "yellow", True: "green", False: "red"}[verdict.met]
        noisy = f" (+{verdict.noisy} ~)" if verdict.noisy else ""
        table.add_row(
            verdict.goal.text, verdict.goal.limit_text, *_values(verdict), f"{verdict.reached}/{verdict.cases}{noisy}",
            Text(verdict.word, style=style), verdict.where if verdict.met is False else "",
        )
    return table


def _values(verdict: Verdict) -> tuple[str, str]:
    """Median and worst value as text."""
    if verdict.median is None or verdict.worst is None:
        return "", ""
    return number(verdict.median, verdict.goal.unit), number(verdict.worst, verdict.goal.unit)


# --- README ----------------------------------------------------------------------------------------------------------


def readme_table(rows: Sequence[Row]) -> str:
    """Markdown: the ops on data that fit no cache, a training step, compaction, and the goals, from the newest rows."""
    rows = latest(rows, device="cpu") or latest(rows)
    if not rows:
        raise RecipeError("rows: at least one row is required for the table, found none")
    tuned = [row for row in rows if row.allocator != "default"] or rows
    parts = [f"Measured by `demp bench` on {headline(tuned)}. Times are medians in ms; all columns of a line were measured in turns."]
    parts += [text for text in (_op_markdown(tuned), _step_markdown(rows), _compaction_markdown(rows), _goals_markdown(rows)) if text]
    return "\n\n".join(parts)


def _op_markdown(rows: Sequence[Row]) -> str:
    most = max(row.threads for row in rows)
    lines = []
    for group in groups(row for row in rows if row.threads == most):
        case = group.case
        if {"copy", "demp", "eager"} - group.rows.keys() or case.op not in ("activation", "norm_act", "weight_noise"):
            continue
        if case.op != "weight_noise" and (group.rows["copy"].bytes // 2 <= case.cache_bytes):
            continue
        demp = group.rows["demp"]
        cells = [_case_text(group), *(_ms(group.time(name)) for name in ("copy", "plain", "eager", "compile")), f"**{_ms(demp.median_ms)}**", f"{demp.gb_per_s:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return ""
    head = "| op and data beyond the last cache | copy | PyTorch, no count | eager | torch.compile | this | GB/s |\n|---|---|---|---|---|---|---|"
    return "\n".join([head, *lines])


STEP_NAMES = {
    "plain_nchw": "plain, NCHW", "plain_channels_last": "plain, channels_last",
    "plain_fused_optimizer_tuned": "plain, channels_last, fused AdamW, allocator tuned", "demp_unfused": "prepared, not fused",
    "demp": "prepared", "demp_tuned": "prepared, allocator tuned",
}
OWN_NAMES = {
    "own_work": "DemP's own work a step", "own_penalty": "of it the penalty", "own_counts": "of it the counts",
    "own_noise": "of it the noise", "own_decision": "of it the decisions",
}


def special_tables(rows: Sequence[Row]) -> list[Table]:
    """Training steps and compactions, where there are rows of them."""
    tables = []
    for op, names in (("step", STEP_NAMES | OWN_NAMES), ("compaction", COMPACTION_NAMES)):
        cases = [group for group in groups(rows) if group.case.op == op]
        if cases:
            table = _table(f"{op}, ms")
            table.add_column("")
            for group in cases:
                table.add_column(f"{group.case.function} {group.case.shape}", justify="right", overflow="fold")
            for name, title in names.items():
                if any(name in group.rows for group in cases):
                    table.add_row(title, *(_with_spread(group.rows.get(name)) for group in cases))
            tables.append(table)
    return tables


def _with_spread(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{milliseconds(row.median_ms)}  ({milliseconds(row.p20_ms)}-{milliseconds(row.p80_ms)})"


def _step_markdown(rows: Sequence[Row]) -> str:
    cases = [group for group in groups(rows) if group.case.op == "step"]
    if not cases:
        return ""
    lines = [f"| training step, nothing pruned | {' | '.join(STEP_NAMES.values())} | DemP's own work |", "|---" * (len(STEP_NAMES) + 2) + "|"]
    for group in cases:
        share = group.ratio("own_work", "demp_tuned")
        cells = [f"{group.case.function} {group.case.shape}", *(_ms(group.time(name)) for name in STEP_NAMES), "" if share is None else f"{100 * share:.1f}%"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


COMPACTION_NAMES = {
    "copy_into": "warm copy of what is kept", "plan": "plan", "commit": "commit", "demp": "all", "torch_pruning": "Torch-Pruning",
}


def _compaction_markdown(rows: Sequence[Row]) -> str:
    cases = [group for group in groups(rows) if group.case.op == "compaction"]
    if not cases:
        return ""
    names = {name: title for name, title in COMPACTION_NAMES.items() if any(name in group.rows for group in cases)}
    lines = [f"| compaction, half of the units dead | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for group in cases:
        lines.append(f"| {group.case.function} | " + " | ".join(_ms(group.time(name)) for name in names) + " |")
    return "\n".join(lines)


def _goals_markdown(rows: Sequence[Row]) -> str:
    lines = ["| goal | wanted | median | worst | cases | |", "|---|---|---|---|---|---|"]
    for verdict in judge(rows):
        if verdict.cases:
            median, worst = _values(verdict)
            counts = f"{verdict.reached}/{verdict.cases}"
            lines.append(f"| {verdict.goal.text} | {verdict.goal.limit_text} | {median} | {worst} | {counts} | {verdict.word} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _ms(value: float | None) -> str:
    return "" if value is None else milliseconds(value)


def update_readme(path: Path, rows: Sequence[Row]) -> bool:
    """Put the table between the markers of a file. Returns whether the file changed.

    Raises RecipeError if the file is not there or has not each marker once, in order.
    """
    if not path.is_file():
        raise RecipeError(f"readme: {path} must be a file, found none")
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise RecipeError(f"readme: {path} must have the lines {BEGIN} and {END}, each once and in that order")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    changed = f"{before}{BEGIN}\n{readme_table(rows)}\n{END}{after}"
    path.write_text(changed, encoding="utf-8")
    return changed != text
