"""Train, compact, save, load, again and again: does the process stay as large as it was?

A round builds a network, trains it with DemP while units are silenced and removed, saves it, loads it into another network
and compares the two bit for bit. Everything of a round is garbage afterwards, so what the process still holds more is a leak.
Two that are torch's own, of some 40 KiB an analysis, are cleared away in each round: see `soak`. What this does not
see: memory on a GPU, and leaks of less than `BOUND` over the time given.
"""
from __future__ import annotations

import contextvars
import copy
import gc
import linecache
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import nn

from ..graph import prepare
from ..training import DemP, load_checkpoint, save_checkpoint

__all__ = ["BOUND", "SoakFigures", "soak"]

BOUND = 16.0
"""MiB that the process may grow by, from the first quarter of the rounds to the last. Memory wanders by a few MiB: arenas of
the C library, code that is run for the first time."""
WARM_UP = 0.25
"""Share of the rounds after which the measure begins: until then caches fill (torch's operators, the analysis, oneDNN)."""
STEPS, PRUNE_EVERY, WIDTH = 12, 3, 24


@dataclass
class SoakFigures:
    """seconds, rounds, steps, removals: what was done. resident: MiB of the process after each round. differences: rounds whose
    network did not come back from its file as it was."""

    seconds: float = 0.0
    rounds: int = 0
    steps: int = 0
    removals: int = 0
    resident: list[float] = field(default_factory=list)
    differences: int = 0

    @property
    def growth(self) -> float:
        """MiB by which the process grew: the median of the last quarter of the rounds behind the warm-up, less the median of the
        first."""
        measured = self.resident[int(WARM_UP * len(self.resident)):]
        quarter = max(len(measured) // 4, 1)
        return median(measured[-quarter:]) - median(measured[:quarter]) if measured else 0.0

    @property
    def passed(self) -> bool:
        return self.rounds > 0 and self.differences == 0 and self.growth <= BOUND

    def __str__(self) -> str:
        last = self.resident[-1] if self.resident else 0.0
        return (
            f"{self.rounds} rounds in {self.seconds / 60:.1f} min: {self.steps} steps, {self.removals} removals, "
            f"{self.differences} of {self.rounds} files read back differently; {self.growth:+.1f} MiB of {last:.0f} (at most {BOUND:g})"
        )


class Residual(nn.Module):
    """One block with a skip, so that removal inserts a selection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH))
        self.act = nn.ReLU()
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.act(self.block(x) + x).mean((2, 3)))


def soak(seconds: float, *, seed: int = 0, say: Callable[[str], None] = lambda text: None) -> SoakFigures:
    """Go round for so long. seed: of networks, data and of which units are silenced. say: told how it goes, about 50 times."""
    figures, start, told = SoakFigures(), time.monotonic(), 0
    chance = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        while figures.seconds < seconds:
            # every `config.patch` of torch leaves a variable in the context that it ran in (torch 2.14): a copy takes it along
            contextvars.copy_context().run(_round, Path(folder) / "checkpoint.pt", chance, figures)
            _forget_sources()
            gc.collect()  # cycles are garbage, not leaks: what is left now is held
            figures.rounds += 1
            figures.resident.append(_resident())
            figures.seconds = time.monotonic() - start
            if figures.seconds >= told * seconds / 50:
                told += 1
                say(str(figures))
    return figures


def _round(path: Path, chance: torch.Generator, figures: SoakFigures) -> None:
    torch.manual_seed(int(torch.randint(2**31, (), generator=chance)))
    x, y = torch.randn(16, 1, 12, 12), torch.randint(10, (16,))
    model, optimizer, demp = _setting(x)
    average = copy.deepcopy(model)
    demp.followers = average
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(x), y) + demp.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _silence(model, chance)
        report = demp.step()
        figures.removals += report is not None and bool(report.removed)
        figures.steps += 1
    save_checkpoint(path, model, optimizer, demp, extra={"average": average.state_dict()})
    again, second_optimizer, second = _setting(x)
    load_checkpoint(path, again, second_optimizer, second)
    same = all(a.equal(b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    figures.differences += not (same and torch.equal(model.eval()(x), again.eval()(x)))


def _setting(x: torch.Tensor) -> tuple[nn.Module, torch.optim.Optimizer, DemP]:
    model = prepare(Residual(), x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, DemP(model, optimizer, total_steps=STEPS, prune_every=PRUNE_EVERY, peak_penalty=0.1, min_units=2)


def _silence(model: nn.Module, chance: torch.Generator) -> None:
    """Give one unit in eight of each normalisation a scale of 0 and a shift below it: dead from the next step on."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            silent = torch.rand(module.num_features, generator=chance) < 0.125
            with torch.no_grad():
                module.weight[silent] = 0.0
                module.bias[silent] = -1.0


def _forget_sources() -> None:
    """Drop the sources of traced graphs, which torch.fx keeps for tracebacks as long as the process lives: 30-80 KiB an
    analysis, which a training run makes once and this one makes thousands of times (torch 2.14)."""
    from torch.fx import graph_module

    graph_module._loader.eval_cache.clear()
    linecache.clearcache()


def _resident() -> float:
    """MiB of physical memory that the process holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status names no VmRSS: resident memory cannot be read on this system")
