"""What a run leaves behind while it goes: metrics.csv and, by flag, TensorBoard."""
from __future__ import annotations

import csv
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from .errors import RecipeError, need
from .loop import RunResult

__all__ = ["COLUMNS", "CsvLog", "TensorBoardLog", "write_units"]

COLUMNS = (
    "run", "step", "epoch", "seconds", "seconds_per_step", "loss", "accuracy", "lr", "penalty_weight", "noise_std",
    "live_units", "params", "flops",
)
"""Columns of metrics.csv. seconds: of training since the run's start; seconds_per_step: median since the row before;
loss: mean of the task loss since the row before; accuracy: on the test images, at the ends of epochs that are evaluated."""


class CsvLog:
    """Rows of all runs in one file, on disk as soon as they are known. Raises RecipeError if they cannot be written.

    What the file holds is replaced when there is a new row, not before: a resumed run whose checkpoint cannot be read leaves it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._restored: list[dict[str, Any]] = []

    def row(self, result: RunResult, row: dict[str, Any]) -> None:
        try:
            if self._file is None:
                self._file = self._path.open("w", newline="")
                csv.DictWriter(self._file, COLUMNS).writeheader()
            writer = csv.DictWriter(self._file, COLUMNS)
            for each in (*self._restored, row):
                writer.writerow({name: _short(value) for name, value in each.items()})
            self._restored.clear()
            self._file.flush()
        except OSError as error:
            raise RecipeError(f"{self._path} cannot be written: {error.strerror}") from error

    def restored(self, result: RunResult) -> None:
        self._restored += result.rows

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a row that could not be written is still in the buffer, and was reported
                self._file.close()


class TensorBoardLog:
    """The same rows as TensorBoard scalars, a folder a run, and the live units of every layer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._make = need("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writers: dict[str, Any] = {}

    def row(self, result: RunResult, row: dict[str, Any]) -> None:
        writer = self._writer(result.name)
        for name, value in row.items():
            if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                writer.add_scalar(name, value, row["step"])
        for layer, live in result.live.items():
            writer.add_scalar(f"live_units/{layer}", live, row["step"])

    def restored(self, result: RunResult) -> None:
        # what the stopped process logged behind its last checkpoint comes again: TensorBoard drops the old points
        self._writer(result.name, purge_step=result.steps + 1)

    def _writer(self, name: str, **options: Any) -> Any:
        if name not in self._writers:
            self._writers[name] = self._make(str(self._folder / name), **options)
        return self._writers[name]

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def write_units(path: Path, result: RunResult) -> None:
    """units.csv: live units of every layer at the start and after every removal."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "layer", "live", "total"))
        for step, live in result.units:
            writer.writerows((step, layer, count, result.total[layer]) for layer, count in live.items())


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
