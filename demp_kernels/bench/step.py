"""`demp bench step`: a dense training step of a CIFAR-style ResNet-18, plain and with DemP, and DemP's own share of it.

The allocator's setting belongs to a process, so two processes are kept, one with each, and take turns with single steps:
all alternatives are measured interleaved, as everywhere here.
"""
from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from ..recipes.errors import RecipeError
from .machine import Machine, OthersMeter
from .rows import Row, row_of
from .step_worker import COMPILED, PRUNE_EVERY, SETUPS, StepSpec, serve
from .timing import Timing

__all__ = ["OWN", "step_rows"]

OWN = ("own_penalty", "own_counts", "own_noise", "own_decision")
"""Parts of DemP's own work in a step; `own_work` is their sum."""
WARM_UP = 2


def step_rows(
    width: int, machine: Machine, *, batch: int = 128, side: int = 28, rounds: int = 10, compile: bool = False
) -> list[Row]:
    """Rows of one network: every setup of `SETUPS`, plain and with "_tuned" for the tuned allocator, those of `COMPILED` with the
    tuned one, `own_work`, its parts.

    Raises RecipeError if a process fails.
    """
    spec = StepSpec(width, (batch, 1, side, side), torch.get_num_threads())
    samples: dict[str, list[float]] = {}
    with _worker(spec, tuned=False) as default, _worker(replace(spec, compile=compile), tuned=True) as tuned:
        turns = [(default, name, name) for name in SETUPS]
        turns += [(tuned, name, f"{name}_tuned") for name in SETUPS]
        turns += [(tuned, name, f"{name}_tuned" if name in COMPILED else name) for name in tuned.names if name not in SETUPS]
        for turn in range(rounds + WARM_UP):
            if turn == WARM_UP:
                meter, before = OthersMeter(), default.cpu_seconds + tuned.cpu_seconds
            for worker, name, label in turns:
                seconds = worker.run(name)
                if turn >= WARM_UP:
                    samples.setdefault(label, []).append(seconds)
        others = meter.share(spec.threads, default.cpu_seconds + tuned.cpu_seconds - before)
    timings = {name: Timing.of(seconds) for name, seconds in samples.items() if not name.startswith("sites_")}
    timings |= _own_work(samples)
    machine = replace(machine, allocator="default and tuned")
    return [_row(spec, name, timing, machine, others) for name, timing in timings.items()]


def _own_work(samples: dict[str, list[float]]) -> dict[str, Timing]:
    """Each round's sum of what DemP adds to a step.

    The counts are the difference between counting and plain activations on the same inputs; where counting is the faster
    of the two, they count as nothing, not as a gain. A decision is made once in `PRUNE_EVERY` steps.
    """
    counts = [max(a - b, 0.0) for a, b in zip(samples["sites_counted"], samples["sites_plain"])]
    decisions = [seconds / PRUNE_EVERY for seconds in samples["own_decision"]]
    total = [sum(parts) for parts in zip(samples["own_penalty"], counts, samples["own_noise"], decisions)]
    return {"own_counts": Timing.of(counts), "own_decision": Timing.of(decisions), "own_work": Timing.of(total)}


def _row(spec: StepSpec, variant: str, timing: Timing, machine: Machine, others: float | None) -> Row:
    return row_of(
        timing, machine, op="step", function=f"resnet18-w{spec.width}", noise=True, layout="channels_last", dtype="float32",
        shape="x".join(map(str, spec.shape)), direction="step", variant=variant, peak_bytes=None, others=others,
        threads=spec.threads,
    )


class _Worker:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.names, self.tuned = self._receive()
        self.cpu_seconds = 0.0

    def run(self, name: str) -> float:
        """Seconds of one call."""
        self._connection.send(name)
        seconds, self.cpu_seconds = self._receive()
        return seconds

    def _receive(self):
        try:
            answer = self._connection.recv()
        except EOFError:
            answer = "it ended without a word"
        if isinstance(answer, str):
            raise RecipeError(f"step: a process that trains must answer, got {answer}")
        return answer


@contextmanager
def _worker(spec: StepSpec, *, tuned: bool) -> Iterator[_Worker]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, spec, tuned), daemon=True)
    process.start()
    there.close()
    try:
        yield _Worker(here)
        here.send(None)
        process.join(10)
    finally:
        process.terminate()
        process.join()
