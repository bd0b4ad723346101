"""`demp bench`: flags, order of work, what is printed and written."""
from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..build_info import tune_allocator
from ..recipes.errors import RecipeError
from ..recipes.settings import resolve_device
from . import compaction, plots
from .cases import Case, Scope
from .machine import Machine, last_level_cache
from .report import all_sheets, rich_table, update_readme, write_tables
from .rows import Row, append_rows, latest, read_rows
from .runner import Budget, ProgressLines, run_case, thread_counts, threads
from .sheets import LEGEND, headline, losses, reasons
from .step import step_rows
from .suites import SUITES

__all__ = ["add_parser"]

PROGRAMS = ("step", "compaction", "report")
ROWS, TABLES = "rows.csv", "tables.md"
STEP_WIDTHS = (16, 32)

DESCRIPTION = """\
Measures every op beside eager PyTorch, torch.compile and a plain copy of the same bytes, all taking turns in one run, so
that ratios hold on a machine that is not quiet. Prints tables and the goals; appends rows to OUT/rows.csv; writes
OUT/tables.md and figures from the newest rows of each case."""
EPILOG = f"""\
what: {', '.join(SUITES)} (default: all of them);
  step        a training step of a ResNet-18 of widths {', '.join(map(str, STEP_WIDTHS))}, plain and prepared, and DemP's own share of it
  compaction  removing half of the units of torchvision's models (--models), beside a copy of what is kept
  report      measures nothing: tables, goals and figures from the rows in OUT"""


@dataclass(frozen=True)
class Settings:
    """The flags, checked."""

    what: list[str]
    only: list[str]
    device: torch.device
    threads: list[int]
    scope: Scope
    budget: Budget
    tune: bool
    out: Path
    models: list[str]
    widths: list[int]
    readme: Path | None

    @classmethod
    def of(cls, chosen: argparse.Namespace) -> Settings:
        """Raises RecipeError for a value that cannot be."""
        what = list(dict.fromkeys(chosen.what or SUITES))
        for name in what:
            if name not in SUITES and name not in PROGRAMS:
                raise RecipeError(f"what must be among {', '.join((*SUITES, *PROGRAMS))}, got {name!r}")
        if not 0 < chosen.seconds < float("inf"):
            raise RecipeError(f"seconds must be above 0 and finite, got {chosen.seconds}")
        if chosen.out.exists() and not chosen.out.is_dir():
            raise RecipeError(f"out must be a folder, got the file {chosen.out}")
        device = resolve_device(chosen.device)
        if device.type == "cuda" and {"step", "compaction"} & set(what):
            raise RecipeError(f"step and compaction are measured on the CPU, got device {device}")
        if min(chosen.widths) < 1:
            raise RecipeError(f"widths must be at least 1, got {min(chosen.widths)}")
        models = compaction.known(chosen.models) if "compaction" in what else []
        scope = Scope(last_level_cache(device), on_gpu=device.type == "cuda", full=chosen.full, quick=chosen.quick)
        seconds = min(chosen.seconds, 0.1) if chosen.quick else chosen.seconds
        budget = Budget(seconds, compile=chosen.compile and not chosen.quick, memory=not chosen.quick)
        return cls(
            what, chosen.only, device, _threads(chosen.threads), scope, budget, chosen.tune, chosen.out, models, chosen.widths, chosen.readme
        )


def _threads(text: str | None) -> list[int]:
    """ "1,2,4" as numbers; none for torch's own choice."""
    if text is None:
        return []
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(f"threads must be whole numbers above 0 separated by commas, got {text!r}")
    return [int(part) for part in parts]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench", help="measure the kernels beside PyTorch and a copy", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", metavar="what", help="ops or programs, see below")
    parser.add_argument("--quick", action="store_true", help="a few small cases without torch.compile: seconds")
    parser.add_argument("--full", action="store_true", help="every layout x dtype x size: hours with torch.compile")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="those cases of ops whose name has one of these in it, such as noise-forward-nchw")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="X", help="measuring time of a case, about (default: 1)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="leave the C library's allocator as it is (default: tune_allocator(), as demp train does)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    parser.add_argument("--threads", metavar="N[,N...]", help="CPU threads; several measure each case with each (default: torch's choice, and 1, 2, 4, ... for one case an op)")
    parser.add_argument("--models", nargs="+", default=list(compaction.MODELS), metavar="NAME", help=f"for compaction (default: {' '.join(compaction.MODELS)})")
    parser.add_argument("--widths", nargs="+", type=int, default=list(STEP_WIDTHS), metavar="N", help=f"for step (default: {' '.join(map(str, STEP_WIDTHS))})")
    parser.add_argument("--out", type=Path, default=Path("demp-bench"), metavar="DIR", help="folder for rows and figures (default: demp-bench)")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the table into FILE, between the lines <!-- bench:begin --> and <!-- bench:end -->")
    parser.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> None:
    settings, console = Settings.of(chosen), _console()
    path = settings.out / ROWS
    before = read_rows(path) if path.exists() else []
    if settings.what == ["report"]:
        if not before:
            raise RecipeError(f"report needs rows in {path}, found none")
        shown = latest(before)
    else:
        tuned = settings.tune and settings.device.type == "cpu" and bool(tune_allocator())
        machine = Machine.here(settings.device, tuned=tuned)
        console.print(_opening(machine, settings), highlight=False, soft_wrap=True)
        shown = []
        for rows in _measure(settings, machine, console):
            append_rows(path, rows)
            shown += rows
    _show(shown, console)
    there = read_rows(path)
    write_tables(settings.out / TABLES, latest(there))
    drawn = plots.draw_all(there, settings.out)
    names = ", ".join([TABLES, *(file.name for file in drawn)])
    console.print(f"rows: {path}; made from all of them: {names}", highlight=False, soft_wrap=True)
    if settings.readme is not None:
        update_readme(settings.readme, there)


def _console() -> Console:
    """A log file has no width to keep to."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _opening(machine: Machine, settings: Settings) -> str:
    text = f"{machine.machine} {machine.simd}, {torch.get_num_threads()} threads, kernels {machine.backend}, allocator {machine.allocator}"
    busy = os.getloadavg()[0]
    # load of its own threads cannot be there yet
    return text + (f"; load {busy:.1f}: the machine is not quiet, only ratios will hold" if busy > 0.5 else "")


def _measure(settings: Settings, machine: Machine, console: Console) -> Iterator[list[Row]]:
    """Rows as they come, so that an interrupted run keeps what it has."""
    work = _work(settings)
    with ProgressLines(console, len(work)) as progress:
        for job in work:
            progress.begin(job.text)
            rows = job.run(settings, machine)
            progress.end(job.text, rows)
            yield rows


@dataclass(frozen=True)
class Job:
    """One case of an op with a number of threads, or one network of a program."""

    program: str
    case: Case | None = None
    name: str = ""
    threads: int = 0
    compile: bool = True

    @property
    def text(self) -> str:
        what = self.case.key if self.case else f"{self.program} {self.name}"
        return f"{what} ({self.threads} threads)" if self.case else what

    def run(self, settings: Settings, machine: Machine) -> list[Row]:
        with threads(self.threads):
            if self.program == "step":
                size = {"batch": 8, "rounds": 3} if settings.scope.quick else {}
                return step_rows(int(self.name), machine, compile=settings.budget.compile, **size)
            if self.program == "compaction":
                return compaction.compaction_rows(self.name, machine)
            budget = settings.budget
            if not self.compile:
                budget = Budget(budget.seconds, compile=False, memory=False)
            return run_case(self.case, machine, settings.device, budget)


def _work(settings: Settings) -> list[Job]:
    usual = torch.get_num_threads()
    counts = settings.threads or [usual]
    jobs = []
    for program in settings.what:
        if program == "step":
            widths = settings.widths[:1] if settings.scope.quick else settings.widths
            jobs += [Job(program, name=str(width), threads=count) for count in counts for width in widths]
        elif program == "compaction":
            jobs += [Job(program, name=name, threads=count) for count in counts for name in settings.models]
        elif program in SUITES:
            cases = [case for case in SUITES[program](settings.scope) if not settings.only or any(t in case.key for t in settings.only)]
            jobs += [Job(program, case, threads=count) for case in cases for count in counts]
            if not settings.threads and not settings.scope.quick and settings.device.type == "cpu":
                jobs += [
                    Job(program, case, threads=count, compile=False)
                    for case in _scaling(cases, settings.scope) for count in thread_counts(usual) if count != usual
                ]
    if not jobs:
        raise RecipeError(f"only must be part of a case's name (see the first column of rows), got {' '.join(settings.only)}")
    return jobs


def _scaling(cases: list[Case], scope: Scope) -> list[Case]:
    """The cases that are measured with fewer threads too: float32 NCHW beyond the last cache."""
    return [
        case for case in cases
        if case.input_bytes >= scope.large and case.dtype == torch.float32 and case.layout == "nchw"
        and case.function in ("relu", "bn+relu") and case.direction != "in_place"
    ]


def _show(rows: list[Row], console: Console) -> None:
    if not rows:
        return
    console.print(headline(rows), highlight=False, soft_wrap=True)
    for sheet in all_sheets(rows, wide=console.width >= 130):
        console.print(rich_table(sheet))
    console.print(LEGEND, highlight=False)
    why = reasons(rows)
    if why:
        console.print("not met, and why (numbers in benchmarks/README.md):", highlight=False)
        for text in why:
            console.print(f"  {text}", highlight=False, soft_wrap=True, markup=False)
    lost = losses(rows)
    if lost:
        console.print(f"slower than PyTorch in {len(lost)} comparisons:", highlight=False)
        for text in lost:
            console.print(f"  {text}", highlight=False, soft_wrap=True, markup=False)
