"""`demp selfcheck`: the flags, progress and files of the reliability table."""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..bench.machine import commit
from ..recipes.errors import RecipeError, need
from ..recipes.machine import processor
from .checks import CHECKS, Outcome, Size
from .rows import CheckRow, check_readme, markdown, merge, read_rows, update_readme, write_rows

__all__ = ["add_parser"]

WHAT = {name: check.what for name, check in CHECKS.items()}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "selfcheck", help="how reliable it is here: kills survived, wrong calls refused, random networks and inputs, memory, ...",
        description="Checks what the test suite checks, at length, in a checkout of the repository with its [test] requirements.",
        epilog="checks: " + "; ".join(f"{name}: {text}" for name, text in WHAT.items()),
    )
    parser.add_argument("checks", nargs="*", metavar="check", help=f"default: {', '.join(n for n, c in CHECKS.items() if c.default)}")
    parser.add_argument("--short", action="store_true", help="the short form of each: minutes instead of hours in all")
    parser.add_argument("--minutes", type=float, default=None, metavar="M", help="length of the soak (default: 120; short: half a minute)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for selfcheck.json; a row there is replaced by a new one of its check")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the table into FILE, between the lines <!-- selfcheck:begin --> and <!-- selfcheck:end -->")
    parser.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> int:
    names, size = _checks(chosen.checks), _size(chosen)
    if chosen.readme is not None and chosen.out is None:
        raise RecipeError("--readme needs --out, the folder with the rows of all checks, got none")
    before = [] if chosen.out is None else read_rows(chosen.out)
    if chosen.readme is not None:
        check_readme(chosen.readme)
    need("rich", "demp selfcheck", "test")
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    rows: list[CheckRow] = []
    for name in names:
        with console.status(name) as status:
            row, details = _checked(name, size, lambda text: status.update(f"{name}: {text}"))
        rows.append(row)
        console.print(f"{'passed' if row.passed else 'FAILED'}  {name} ({row.seconds:.0f} s): {row.figures}", highlight=False, soft_wrap=True)
        if details:
            console.print(details, highlight=False, markup=False, soft_wrap=True)
        if chosen.out is not None:
            write_rows(chosen.out, merge(before, rows, list(CHECKS)))
    console.print(Markdown(markdown(rows, WHAT)))
    if chosen.readme is not None:
        update_readme(chosen.readme, merge(before, rows, list(CHECKS)), WHAT)
    return 0 if all(row.passed for row in rows) else 1


def _checks(names: list[str]) -> list[str]:
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise RecipeError(f"check must be one of {', '.join(CHECKS)}, got {unknown[0]!r}")
    return names or [name for name, check in CHECKS.items() if check.default]


def _size(chosen: argparse.Namespace) -> Size:
    minutes = chosen.minutes if chosen.minutes is not None else 0.5 if chosen.short else 120.0
    if not 0 < minutes < float("inf"):
        raise RecipeError(f"--minutes must be a number above 0, got {chosen.minutes}")
    return Size(chosen.short, minutes)


def _checked(name: str, size: Size, say: Callable[[str], None]) -> tuple[CheckRow, str]:
    began, at = time.monotonic(), commit()  # what runs for hours may see others commit meanwhile
    try:
        outcome = CHECKS[name].run(size, say)
    except RecipeError:
        raise
    except Exception as error:
        # a check that breaks off found something: the others go on, and its row says so
        outcome = Outcome(False, f"broke off with {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    row = CheckRow(
        name, outcome.passed, outcome.figures, round(time.monotonic() - began, 1), size.short, torch.__version__, at,
        date.today().isoformat(), processor(),
    )
    return row, outcome.details
