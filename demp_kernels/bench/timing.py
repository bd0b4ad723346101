"""Timing of alternatives against each other: interleaved, so that ratios hold on a machine that is not quiet.

Times of two programs that are measured one after the other on a shared machine cannot be compared: the machine changes
in between. Here all alternatives of a case take turns (A B C A B C ...), so each of them sees the same good and bad moments.
"""
from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch

__all__ = ["Timing", "block_seconds", "calls_a_block", "measure", "peak_bytes"]

Call = Callable[[], Any]

SHORTEST_BLOCK = 2e-4
"""Seconds. Calls that are shorter are timed several at a time: a clock reading costs about 1e-7 s."""
ROUNDS = 40
"""Turns of each alternative, at most."""
FLUSH = 1e-3
"""Seconds of a GPU's time before every call: a forward and backward in eager PyTorch takes the host 0.15 ms to issue."""
FEWEST = 5
"""Turns of each alternative, at least, however slow it is."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile of the samples."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        if not seconds:
            raise ValueError("Timing: at least one sample is required, got none")
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        tenths = quantiles(seconds, n=10, method="inclusive")
        return cls(tenths[4], tenths[1], tenths[7], len(seconds))


def measure(calls: Mapping[str, Call], *, seconds: float, device: torch.device, cold: bool = True) -> dict[str, Timing]:
    """Time the calls in turns.

    Args:
        calls: name -> function without arguments. What it returns is freed at once, so an output's allocation is part of
            the time, as it is for a user.
        seconds: about how long all of it may take, warm-up left aside. Every call is timed `FEWEST` times whatever that
            takes; slow ones sit some rounds out, spread evenly.
        device: on a CUDA device the time is the device's, between events.
        cold: on a CUDA device the second-level cache is overwritten before every call, outside its time.
    """
    flush = _cache_flush(device) if cold and device.type == "cuda" else None
    counts = {name: calls_a_block(call, device, flush) for name, call in calls.items()}
    once = {name: block_seconds(call, counts[name], device, flush) for name, call in calls.items()}
    share = seconds / len(calls)
    turns = {name: max(FEWEST, min(ROUNDS, int(share / max(time, 1e-9)))) for name, time in once.items()}
    rounds = max(turns.values())
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with _no_collection():
        for turn in range(rounds):
            for name, call in calls.items():
                if (turn + 1) * turns[name] // rounds > turn * turns[name] // rounds:
                    samples[name].append(block_seconds(call, counts[name], device, flush) / counts[name])
    return {name: Timing.of(times) for name, times in samples.items()}


def calls_a_block(call: Call, device: torch.device, flush: Call | None = None) -> int:
    """How many calls to time at once, so that a block is no shorter than `SHORTEST_BLOCK`. Warms the call up: compiles what
    compiles lazily, loads what loads lazily."""
    block_seconds(call, 1, device, flush)
    once = block_seconds(call, 1, device, flush)
    if once < SHORTEST_BLOCK:  # short enough for a second opinion
        once = min(once, block_seconds(call, 1, device, flush))
    most = 10_000 if flush is None else 8  # each of these has events of its own, and takes a flush's time besides
    return max(1, min(most, round(SHORTEST_BLOCK / max(once, 1e-9))))


def block_seconds(call: Call, count: int, device: torch.device, flush: Call | None = None) -> float:
    """Seconds of `count` calls, one after the other; on a CUDA device with `flush` before each of them, outside the time."""
    if device.type == "cuda":
        return _device_seconds(call, count, flush)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _device_seconds(call: Call, count: int, flush: Call | None) -> float:
    """Between events. With a flush each call has two of its own: the device is still busy with the flush while the host
    issues the call, so that the host's time is not in it."""
    stretches, length = (1, count) if flush is None else (count, 1)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(stretches)]
    torch.cuda.synchronize()
    for begin, end in pairs:
        if flush is not None:
            flush()
        begin.record()
        for _ in range(length):
            call()
        end.record()
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def _cache_flush(device: torch.device) -> Call:
    """Writes twice the second-level cache, 256 MiB at least, again and again for `FLUSH`: once is 0.1 ms of an H100's time."""
    size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
    write = torch.empty(size, dtype=torch.uint8, device=device).zero_
    write()
    times = math.ceil(FLUSH / (_device_seconds(write, 10, None) / 10))

    def flush() -> None:
        for _ in range(times):
            write()

    return flush


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector off, as in `timeit`."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory that one call holds on top of what was there before it, outputs included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at its first use; else it writes three lines for every call
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in _memory_events(profile):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _memory_events(profile: torch.profiler.profile) -> list[Any]:
    """Every allocation (positive) and release (negative) that the profiler saw, in order."""
    events = profile.profiler.kineto_results.events()
    return sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
