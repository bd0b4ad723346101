"""`demp train`, killed (SIGKILL) at random moments and resumed: does it end with the bits of the run that nobody disturbed?

The training has no hooks for this: the moments are taken from its log, and from the temporary file of a save.
"""
from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..training.checkpoint_file import SUFFIX, read_file

__all__ = ["AIMS", "KillFigures", "survive_kills"]

STEPS, PRUNE_EVERY = 32, 4
TRAIN: tuple[object, ...] = (
    "--width", 4, "--image-size", 8, "--train-size", 256, "--batch-size", 32, "--epochs", 4, "--lr", 0.2,
    "--warm-up", 0.02, "--peak-penalty", 0.3, "--peak-noise", 1e-3, "--round-to", 1, "--prune-every", PRUNE_EVERY, "--save-every", 3,
    "--threads", 1, "--device", "cpu",
)
"""A learning rate at which the network learns little and half of its units die, in five removals."""
AIMS = ("step", "save", "compaction", "start")
"""At what a kill is aimed: any moment of the training; while a checkpoint is being written; when units are removed (the
moments behind the last step before a removal); while the process starts, reads its checkpoint and analyses the network."""
A_ROUND = 5
"""Kills of one run, each of what the one before left, until it may end."""
TIMES = {"seconds", "seconds_per_step"}
PATIENCE = 300.0


@dataclass
class KillFigures:
    """kills: made. survived: of runs that ended with the undisturbed run's bits, weights, optimiser and log. in_save: kills
    that left a half-written file. aimed: kills by aim."""

    kills: int = 0
    survived: int = 0
    in_save: int = 0
    aimed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AIMS, 0))
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        aimed = ", ".join(f"{count} at {aim}" for aim, count in self.aimed.items())
        lines = [f"{self.survived} of {self.kills} kills survived bit for bit ({aimed}; {self.in_save} left half a file)"]
        return "\n".join([*lines, *self.failures])


def survive_kills(kills: int = 50, *, seed: int = 0, say: Callable[[str], None] = lambda text: None) -> KillFigures:
    """Kill runs `kills` times in all and compare what they end with. About 7 s a kill on one core.

    Args:
        seed: of the moments. say: told how it goes, a line a run.
    """
    figures, chance = KillFigures(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        _finish(_start(whole))
        number = 0
        while figures.kills < kills:
            out = Path(folder) / f"run-{number}"
            wanted = min(A_ROUND, kills - figures.kills)
            made = _killed(out, wanted, chance, figures, first=number)
            _finish(_start(out))
            wrong = _differences(whole, out)
            figures.survived += 0 if wrong else made
            figures.failures += [f"run {number}: {text}" for text in wrong]
            say(f"run {number}: {made} kills, {'; '.join(wrong) or 'the same bits'}")
            number += 1
    return figures


def _killed(out: Path, wanted: int, chance: random.Random, figures: KillFigures, first: int) -> int:
    """Kill the run in `out` so often. Returns how often it came to it: a run may end before its last kills."""
    rows = sorted(chance.randrange(2 * STEPS) for _ in range(wanted))
    made = 0
    for number, row in enumerate(rows):
        aim = AIMS[(first + number) % len(AIMS)]
        process = _start(out)
        _await_moment(aim, row, out, process, chance)
        process.kill()
        process.communicate()
        if process.returncode != -9:
            if process.returncode != 0:
                raise RuntimeError(f"demp train ended with code {process.returncode} before it was killed")
            break
        made += 1
        figures.kills += 1
        figures.aimed[aim] += 1
        figures.in_save += bool(_half_written(out))
    return made


def _await_moment(aim: str, row: int, out: Path, process: subprocess.Popen[str], chance: random.Random) -> None:
    """Come back when it is time to kill, or when the process has ended."""
    if aim == "start":
        time.sleep(chance.uniform(0.0, 4.0))
        return
    if aim == "compaction":
        removal = max(1, (row % STEPS) // PRUNE_EVERY) * PRUNE_EVERY
        row = STEPS + removal - 2  # rows are counted from 0: behind this one, the step that ends with the removal begins
    _poll(lambda: _rows(out) > row, process)
    if aim == "save":
        before = _half_written(out)
        _poll(lambda: bool(_half_written(out) - before), process, pause=0.0)
        time.sleep(chance.uniform(0.0, 0.01))
    else:
        time.sleep(chance.uniform(0.0, 0.1))


def _poll(come: Callable[[], bool], process: subprocess.Popen[str], pause: float = 0.002) -> None:
    deadline = time.monotonic() + PATIENCE
    while not come() and process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"demp train did not come to the moment of its kill within {PATIENCE:g} s")
        time.sleep(pause)


def _start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "demp_kernels", "train", "--resume", "--out", str(out), *map(str, TRAIN)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=PATIENCE)
    if process.returncode != 0:
        raise RuntimeError(f"demp train ended with code {process.returncode}: {errors.strip()[-1000:]}")


def _rows(out: Path) -> int:
    log = out / "metrics.csv"
    return log.read_bytes().count(b"\n") - 1 if log.is_file() else 0


def _half_written(out: Path) -> set[str]:
    return {file.name for file in out.glob(f".*{SUFFIX}")}


def _differences(whole: Path, out: Path) -> list[str]:
    """In what two finished runs differ, times apart."""
    wrong = []
    for name in ("checkpoint-dense.pt", "checkpoint.pt"):
        first, second = read_file(whole / name), read_file(out / name)
        for part in ("model", "optimizers", "demp", "units"):
            if not _same(first[part], second[part]):
                wrong.append(f"{part} of {name}")
        if not _same(first["rng"]["torch"], second["rng"]["torch"]):
            wrong.append(f"random state of {name}")
    if _log(whole) != _log(out):
        wrong.append("metrics.csv")
    return wrong


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a if k not in TIMES)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _log(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
