"""Statistics, turns, peak memory, and what other processes take."""
from __future__ import annotations

import gc
import os
import random
import time

import numpy as np
import pytest
import torch

from demp_kernels.bench import timing
from demp_kernels.bench.machine import Machine, OthersMeter, _largest_cache, commit, last_level_cache
from demp_kernels.bench.timing import Timing, calls_a_block, measure, peak_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(count: int) -> None:
    samples = [random.Random(count).lognormvariate(0, 1) for _ in range(count)]
    found = Timing.of(samples)
    assert (found.p20, found.median, found.p80) == pytest.approx(tuple(np.percentile(samples, [20, 50, 80])))
    assert found.samples == count


def test_no_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample is required, got none"):
        Timing.of([])


def test_alternatives_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    cost = {"a": 0.002, "b": 0.002, "slow": 0.03}

    def fake_clock(call, count: int, device: torch.device, flush: object) -> float:
        call()
        return cost[order[-1]] * count

    monkeypatch.setattr(timing, "block_seconds", fake_clock)
    found = measure({name: lambda n=name: order.append(n) for name in cost}, seconds=0.12, device=CPU)
    assert {name: found[name].samples for name in cost} == {"a": 20, "b": 20, "slow": timing.FEWEST}
    assert found["a"].median == 0.002 and found["slow"].median == 0.03
    turns = order[-sum(t.samples for t in found.values()):]
    fast = [name for name in turns if name != "slow"]
    assert fast[::2] == ["a"] * 20 and fast[1::2] == ["b"] * 20
    places = [place for place, name in enumerate(turns) if name == "slow"]
    assert max(np.diff(places)) <= min(np.diff(places)) + 1, "slow calls must be spread evenly"


def test_short_calls_are_timed_in_blocks() -> None:
    assert calls_a_block(lambda: None, CPU) > 50
    assert calls_a_block(lambda: time.sleep(0.001), CPU) == 1


def test_collector_is_off_while_timing_and_on_after() -> None:
    states: list[bool] = []
    measure({"a": lambda: states.append(gc.isenabled())}, seconds=0.001, device=CPU)
    assert states[-1] is False
    assert gc.isenabled()


def test_peak_memory_counts_what_is_held_at_once() -> None:
    x = torch.randn(1 << 16)
    spare = torch.empty_like(x)
    assert peak_bytes(lambda: spare.copy_(x), CPU) == 0
    assert peak_bytes(lambda: x.clone(), CPU) == x.nbytes
    assert peak_bytes(lambda: (x.clone().clone(), None)[1], CPU) == 2 * x.nbytes
    assert peak_bytes(lambda: [x.clone() for _ in range(3)], CPU) == 3 * x.nbytes


def test_others_meter_does_not_count_this_process() -> None:
    meter = OthersMeter()
    assert meter.share(1) is None, "too short to tell"
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        pass
    share = meter.share(os.cpu_count() or 1)
    assert share is None or 0 <= share <= 1.05


def test_machine_facts() -> None:
    machine = Machine.here(CPU, tuned=False)
    assert machine.device == "cpu" and machine.allocator == "default" and machine.machine
    assert machine.backend in ("native", "reference")
    assert machine.date.endswith("Z") and len(machine.date) == 20
    assert machine.cache_bytes == last_level_cache(CPU) > 0
    assert commit().rstrip("+")


def test_cache_size_is_read(tmp_path) -> None:
    for number, text in enumerate(("32K", "1024K", "36M")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{text}\n")
    assert _largest_cache(tmp_path) == 36 * 2**20
    assert _largest_cache(tmp_path / "nothing") > 0


def test_a_gpu_s_cache_is_flushed_before_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for the device: what is issued, in which order, and whose time it is."""
    issued: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.place = len(issued)

        def elapsed_time(self, end: Event) -> float:
            assert issued[self.place : end.place] == ["call"] * (end.place - self.place), "nothing else between the events"
            return float(end.place - self.place)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    device = torch.device("cuda")
    seconds = timing.block_seconds(lambda: issued.append("call"), 3, device, lambda: issued.append("flush"))
    assert issued == ["flush", "call"] * 3 and seconds == pytest.approx(3e-3)
    issued.clear()
    assert timing.block_seconds(lambda: issued.append("call"), 3, device) == pytest.approx(3e-3) and issued == ["call"] * 3
