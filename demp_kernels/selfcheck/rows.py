"""What the checks found, in a file that outlives them, and as a table."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..bench.marked import check_markers, replace_between
from ..recipes.errors import RecipeError

__all__ = ["CheckRow", "check_readme", "markdown", "merge", "read_rows", "update_readme", "write_rows"]

FILE = "selfcheck.json"


@dataclass(frozen=True)
class CheckRow:
    """check: its name. passed: whether it found nothing wrong. figures: what was done and found. seconds: how long it took. short:
    whether it was the short form. torch, commit, date, machine: where and when."""

    check: str
    passed: bool
    figures: str
    seconds: float
    short: bool
    torch: str
    commit: str
    date: str
    machine: str


def read_rows(folder: Path) -> list[CheckRow]:
    """Rows of an earlier run; none where there was none. Raises RecipeError for something else in their place."""
    file = folder / FILE
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"out must be a folder, got the file {folder}")
    if not file.is_file():
        return []
    try:
        return [CheckRow(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{file} is no file of demp selfcheck: {' '.join(str(error).split())}") from error


def write_rows(folder: Path, rows: Sequence[CheckRow]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def merge(before: Sequence[CheckRow], now: Sequence[CheckRow], order: Sequence[str]) -> list[CheckRow]:
    """A row a check, the newer one, in `order`."""
    newest = {row.check: row for row in [*before, *now]}
    return sorted(newest.values(), key=lambda row: order.index(row.check) if row.check in order else len(order))


def markdown(rows: Sequence[CheckRow], what: dict[str, str]) -> str:
    """what: a sentence a check."""
    lines = ["| check | what is done | figures | verdict |", "| --- | --- | --- | --- |"]
    for row in rows:
        verdict = ("passed" if row.passed else "**failed**") + (", short form" if row.short else "")
        figures = row.figures.replace("|", "/").replace("\n", "<br>")
        lines.append(f"| `{row.check}` | {what.get(row.check, '')} | {figures} | {verdict} |")
    if rows:
        facts = {f"{row.machine}, torch {row.torch}, {row.date}" for row in rows}
        lines += ["", f"Measured on: {'; '.join(sorted(facts))}; commits {', '.join(dict.fromkeys(row.commit for row in rows))}."]
    return "\n".join(lines)


def check_readme(path: Path) -> None:
    """Raises RecipeError if `update_readme` would not find its place."""
    check_markers(path, "selfcheck")


def update_readme(path: Path, rows: Sequence[CheckRow], what: dict[str, str]) -> bool:
    """Put the table between the markers `selfcheck` of a file. Returns whether the file changed."""
    return replace_between(path, "selfcheck", markdown(rows, what))
