"""Sheets in the terminal, in a Markdown file of all of them, and between two markers of a README."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from ..recipes.errors import RecipeError
from .marked import markers, replace_between
from .rows import Group, Row, groups, latest
from .sheets import (
    LEGEND,
    STEP_NAMES,
    Sheet,
    case_text,
    goals_sheet,
    headline,
    losses,
    milliseconds,
    op_sheets,
    program_sheets,
    reasons,
)

__all__ = ["BEGIN", "END", "all_sheets", "readme_table", "rich_table", "update_readme", "write_tables"]

BEGIN, END = markers("bench")


def all_sheets(rows: Sequence[Row], *, wide: bool = True) -> list[Sheet]:
    return [*op_sheets(rows, wide=wide), *program_sheets(rows), goals_sheet(rows)]


def rich_table(sheet: Sheet) -> Table:
    table = Table(
        title=sheet.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for place, name in enumerate(sheet.columns):
        text = place == 0 or name in sheet.text_columns
        table.add_column(name, justify="left" if text else "right", min_width=24 if place == 0 else None, overflow="fold")
    for cells in sheet.rows:
        table.add_row(*cells)
    return table


def markdown_table(sheet: Sheet) -> str:
    marks = ["---" if place == 0 or name in sheet.text_columns else "--:" for place, name in enumerate(sheet.columns)]
    lines = [sheet.columns, marks, *([str(cell) for cell in cells] for cells in sheet.rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_tables(path: Path, rows: Sequence[Row]) -> None:
    """All sheets of the newest rows as a Markdown file, losing cases listed."""
    parts = ["# Measured by `demp bench`", LEGEND + "."]
    for allocator in sorted({row.allocator for row in rows}, reverse=True):
        chosen = [row for row in rows if row.allocator == allocator]
        parts.append(f"## Allocator {allocator}\n\n{headline(chosen)}")
        for sheet in [*op_sheets(chosen), *program_sheets(chosen)]:
            parts.append(f"### {sheet.title}\n\n{markdown_table(sheet)}")
        lost = losses(chosen)
        if lost:
            parts.append("### slower than PyTorch\n\n" + "\n".join(f"- {text}" for text in lost))
    parts.append("## Goals\n\n" + markdown_table(goals_sheet(rows)))
    if why := reasons(rows):
        parts.append("Not met, and why:\n\n" + "\n".join(f"- {text}" for text in why))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# --- README ----------------------------------------------------------------------------------------------------------


def readme_table(rows: Sequence[Row]) -> str:
    """Markdown: the ops on float32 data that fit no cache, a training step, compaction, and the goals, from the newest rows.

    Raises RecipeError if there are no rows.
    """
    rows = latest(rows, device="cpu") or latest(rows)
    if not rows:
        raise RecipeError("rows: at least one row is required for the table, found none")
    tuned = [row for row in rows if row.allocator != "default"] or rows
    sheets = [sheet for sheet in (_op_summary(tuned), _step_summary(rows), *_compactions(rows), goals_sheet(rows)) if sheet]
    opening = (
        f"Measured by `demp bench`: {headline(tuned)}. Times are medians in ms; all columns of a line were measured in turns. "
        "~: the machine was not quiet."
    )
    return "\n\n".join([opening, *(markdown_table(sheet) for sheet in sheets)])


def _op_summary(rows: Sequence[Row]) -> Sheet | None:
    most = max(row.threads for row in rows)
    shown = [group for group in groups(row for row in rows if row.threads == most) if _in_summary(group)]
    others = {"copy": "copy", "plain": "PyTorch, no count", "eager": "eager", "compile": "torch.compile"}
    others = {name: title for name, title in others.items() if any(name in group.rows for group in shown)}
    lines = []
    for group in shown:
        demp = group.rows["demp"]
        times = [_ms(group, name) for name in others]
        lines.append((case_text(group) + ("" if group.quiet else " ~"), *times, f"**{milliseconds(demp.median_ms)}**", f"{demp.gb_per_s:.1f}"))
    columns = ("op, data beyond the last cache", *others.values(), "this package", "GB/s")
    return Sheet("ops", columns, lines) if lines else None


def _in_summary(group: Group) -> bool:
    case = group.case
    if not {"copy", "demp", "eager"} <= group.rows.keys() or case.dtype != "float32":
        return False
    if case.op == "weight_noise":
        return case.function == "resnet18-w64"
    beyond = group.rows["copy"].bytes // 2 > case.cache_bytes and case.layout in ("nchw", "channels_last")
    if case.op == "activation":
        return beyond and case.function == "relu" and case.direction in ("forward", "backward")
    return beyond and case.op == "norm_act" and case.direction == "both"


def _step_summary(rows: Sequence[Row]) -> Sheet | None:
    steps = [group for group in groups(rows) if group.case.op == "step"]
    names = {name: title for name, title in STEP_NAMES.items() if any(name in group.rows for group in steps)}
    lines = []
    for group in steps:
        share = group.ratio("own_work", "demp_tuned")
        times = [_ms(group, name) for name in names]
        lines.append((f"{group.case.function} {group.case.shape}", *times, "" if share is None else f"{100 * share:.1f}%"))
    return Sheet("step", ("training step, nothing pruned", *names.values(), "DemP's own work"), lines) if lines else None


def _compactions(rows: Sequence[Row]) -> list[Sheet]:
    return program_sheets([row for row in rows if row.op == "compaction"])


def _ms(group: Group, variant: str) -> str:
    time = group.time(variant)
    return "" if time is None else milliseconds(time)


def update_readme(path: Path, rows: Sequence[Row]) -> bool:
    """Put the table between the markers of a file; see `replace_between`."""
    return replace_between(path, "bench", readme_table(rows))
