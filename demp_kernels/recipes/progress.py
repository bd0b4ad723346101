"""What a person sees while a run goes on: a bar in a terminal, a line an epoch anywhere else."""
from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .loop import RunResult

__all__ = ["ProgressDisplay"]


class ProgressDisplay:
    """A context manager that watches runs; every run gets a bar of its own, or plain lines without a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, Any] = {}
        self._bars = Progress(
            TextColumn("[bold]{task.description:<6}"), BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[text]}"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )

    def __enter__(self) -> ProgressDisplay:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def row(self, result: RunResult, row: dict[str, Any]) -> None:
        parts = [f"loss {row['loss']:.3f}"]
        at_end = row["step"] % result.steps_per_epoch == 0
        accuracy = row["accuracy"] if at_end else result.accuracy  # between evaluations the last one
        if accuracy is not None:
            parts.append(f"accuracy {accuracy:.1%}")
        if result.total:
            parts.append(f"units {row['live_units']}/{sum(result.total.values())}")
        parts.append(f"{duration(row['seconds_per_step'])}/step")
        if self._console.is_terminal:
            if result.name not in self._tasks:
                self._tasks[result.name] = self._bars.add_task(result.name, total=result.total_steps, text="")
            self._bars.update(self._tasks[result.name], completed=result.steps, text="  ".join(parts))
        elif at_end:
            line = f"{result.name} epoch {row['epoch']}: {', '.join(parts)}"
            self._console.print(line, highlight=False, soft_wrap=True)


    def restored(self, result: RunResult) -> None:
        where = "was finished" if result.finished else f"goes on behind step {result.steps} of {result.total_steps}"
        self._console.print(f"{result.name} {where}", highlight=False)


def duration(seconds: float) -> str:
    """Three digits with a unit: 123 ms, 1.23 s."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
