"""policy="when_it_pays": what is weighed, what happens to units that stay, and that all ranks decide alike."""
from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import demp_kernels as dk
from demp_kernels.compaction.report import Payoff
from demp_kernels.training import policy
from demp_kernels.training.budget import flops_cost

STEPS, LOOK = 40, 5


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(policy, "time", clock)
    monkeypatch.setattr(policy, "width_step", lambda model: 16)
    return clock


def build(**options: Any) -> tuple[Any, torch.optim.Optimizer, dk.DemP]:
    torch.manual_seed(0)
    model = dk.prepare(nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16)), torch.randn(4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings: dict[str, Any] = {"total_steps": STEPS, "prune_every": LOOK, "seed": 7, "policy": "when_it_pays"} | options
    return model, optimizer, dk.DemP(model, optimizer, **settings)


def silence(model: Any, units: range) -> None:
    with torch.no_grad():
        norm = model.get_submodule("1")
        norm.weight[units.start : units.stop] = 0
        norm.bias[units.start : units.stop] = -50


def train(
    run: tuple[Any, Any, dk.DemP], steps: int, clock: Clock | None = None, seconds: float = 1.0, first: float | None = None
) -> dk.CompactionReport | None:
    """Steps that take so many seconds, the first one perhaps others. Returns the last one's report."""
    model, optimizer, demp = run
    report = None
    for number in range(steps):
        generator = torch.Generator().manual_seed(demp.steps_done)
        x = torch.randn(8, 16, generator=generator)
        (F.mse_loss(model(x), x) + demp.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if clock is not None:
            clock.now += first if first is not None and number == 0 else seconds
        report = demp.step()
    return report


def test_long_runs_of_slow_steps_are_those_of_always(clock: Clock) -> None:
    states = []
    for name in ("always", "when_it_pays"):
        run = build(policy=name)
        silence(run[0], range(20))
        train(run, STEPS, clock)
        states.append((dict(run[0].state_dict()), run[2].live_units, [e.step for e in run[2].report().history]))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert states[1][2][0] == LOOK and states[1][1]["2"] <= 44


def test_what_does_not_pay_stays_until_it_does_or_the_run_ends(clock: Clock) -> None:
    run = build()
    model, _, demp = run
    demp._weighing.removal_seconds = 10.0  # type: ignore[union-attr]
    silence(model, range(16))
    report = train(run, LOOK, clock)
    # a quarter of the units is a quarter of both layers, and the first step has no beginning
    assert report is not None and report.payoff == Payoff(LOOK, 1.0, 0.25, STEPS - LOOK, 10.0)
    assert not report.payoff.pays and not report.changed and report.found == {"2": 16}
    assert demp.live_units == {"2": 64} and model.get_submodule("0").weight.shape[0] == 64
    assert "removal after step 5 does not pay: 250 of 1e+03 ms a step saved in 35 steps, 8.75 s, for 10 s" in str(report)
    assert demp.report().decisions == [report.payoff] and str(report.payoff) in str(demp.report())
    assert all(int(m.seen) == 0 for m in model.modules() if isinstance(m, dk.DemPActivation))

    silence(model, range(32))
    report = train(run, LOOK, clock)
    assert report is not None and report.payoff == Payoff(2 * LOOK, 1.0, 0.5, STEPS - 2 * LOOK, 10.0)
    assert report.payoff.pays and report.changed and demp.live_units == {"2": 32}
    assert [d.pays for d in demp.report().decisions] == [False, True]

    silence(model, range(16))
    demp._weighing.removal_seconds = 1e6  # type: ignore[union-attr]
    report = train(run, STEPS - 3 * LOOK, clock)
    assert report is not None and not report.changed and report.found == {"2": 16}
    report = train(run, LOOK, clock)
    assert report is not None and report.payoff is None, "the last look removes whatever it costs"
    assert demp.live_units == {"2": 16}


def test_units_short_of_the_kernels_next_step_save_nothing(clock: Clock) -> None:
    run = build()
    silence(run[0], range(15))
    report = train(run, LOOK, clock, seconds=1e6)
    assert report is not None and report.payoff is not None and report.payoff.saved == 0 and not report.changed
    silence(run[0], range(16))
    report = train(run, LOOK, clock, seconds=1e6)
    assert report is not None and report.changed and run[2].live_units == {"2": 48}


def test_nothing_is_weighed_where_nothing_would_go(clock: Clock) -> None:
    run = build(round_to=64)
    silence(run[0], range(15))
    report = train(run, LOOK, clock)
    assert report is not None and report.payoff is None and "2" in report.kept and run[2].report().decisions == []


def test_before_a_step_was_measured_units_stay(clock: Clock) -> None:
    run = build(prune_every=1)
    silence(run[0], range(32))
    report = train(run, 1, clock)
    assert report is not None and report.payoff is not None and report.payoff.step_seconds == 0 and not report.changed
    report = train(run, 1, clock)
    assert report is not None and report.changed


def test_the_first_removal_is_guessed_and_later_ones_cost_what_was_measured(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build()
    model, optimizer, _ = run
    silence(model, range(16))
    report = train(run, LOOK, clock)
    tensors = [*model.parameters(), *model.buffers(), *(t for state in optimizer.state.values() for t in state.values())]
    assert report is not None and report.payoff is not None
    assert report.payoff.cost > policy.TENSOR_SECONDS * len(tensors) > report.payoff.cost * 0.9
    assert report.changed

    silence(model, range(16))
    report = train(run, LOOK, clock, first=31.0)
    took = run[2].report().history[0].seconds
    assert report is not None and report.payoff is not None
    # the step behind the removal took 31 s, the others 1 s
    assert 30 + took < report.payoff.cost < 30 + took + 0.5 and not report.changed

    report = train(run, LOOK, clock, first=21.0)
    assert report is not None and report.payoff is not None and report.payoff.cost > 30, "that one followed no removal"


def test_an_evaluation_behind_every_look_is_no_warm_up(clock: Clock) -> None:
    run = build(total_steps=1000)
    train(run, LOOK, clock)
    train(run, LOOK, clock, first=100.0)
    silence(run[0], range(16))
    report = train(run, LOOK, clock, first=100.0)
    assert report is not None and report.changed
    silence(run[0], range(16))
    report = train(run, LOOK, clock, first=103.0)
    assert report is not None and report.payoff is not None and 3 <= report.payoff.cost < 4


@pytest.mark.parametrize("way", ["function", "method"])
def test_compiled_models_cost_a_compilation(clock: Clock, way: str) -> None:
    torch._dynamo.reset()
    model, optimizer, _ = build()
    compiled = model
    if way == "function":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    demp = dk.DemP(compiled, optimizer, total_steps=STEPS, prune_every=LOOK, policy="when_it_pays")
    silence(model, range(32))
    report = train((compiled, optimizer, demp), LOOK, clock)
    assert report is not None and report.payoff is not None and not report.payoff.pays
    assert policy.COMPILE_SECONDS < report.payoff.cost < policy.COMPILE_SECONDS + 1


def test_a_resumed_run_knows_its_decisions_and_measures_anew(clock: Clock, tmp_path: Path) -> None:
    run = build()
    run[2]._weighing.removal_seconds = 10.0  # type: ignore[union-attr]
    silence(run[0], range(16))
    train(run, LOOK, clock)
    dk.save_checkpoint(tmp_path / "run.pt", *run)
    again = build()
    dk.load_checkpoint(tmp_path / "run.pt", *again)
    assert again[2].report() == run[2].report()
    report = train(again, LOOK, clock)
    assert report is not None and report.payoff is not None and report.payoff.step_seconds == 1.0 and report.changed


def test_states_of_other_decisions_are_refused() -> None:
    _, _, demp = build()
    for decisions, text in (
        ({}, "decisions must be a list, got dict"),
        ([{"step": 0}], "a decision of DemP must have 'step_seconds', of type float, got NoneType"),
        ([{"step": 9, "step_seconds": 1.0, "saved": 1.0, "steps_left": 3, "cost": 1.0}], "between 0 and 0, got 9"),
    ):
        with pytest.raises(ValueError, match=text):
            demp.load_state_dict({**demp.state_dict(), "decisions": decisions})


def test_settings_that_contradict() -> None:
    with pytest.raises(ValueError, match="policy must be one of always, when_it_pays, got 'never'"):
        build(policy="never")
    with pytest.raises(ValueError, match="policy='when_it_pays' requires on_dead='remove', got 'report'"):
        build(on_dead="report")


def test_widths_count_in_blocks() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 17, 3, padding=1), nn.Conv2d(17, 34, 1, groups=17), nn.ConvTranspose2d(34, 8, 1), nn.Flatten(), nn.Linear(128, 5)
    )
    inputs = (torch.empty(1, 3, 4, 4, device="meta"),)
    assert flops_cost(model, inputs)({}) == 16 * (3 * 17 * 9 + 34 + 34 * 8) + 128 * 5
    assert flops_cost(model, inputs, 16)({}) == 16 * (16 * 32 * 9 + 48 + 48 * 16) + 128 * 16


def test_a_network_without_layers_is_weighed_by_its_parameters(clock: Clock) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Parameter(torch.randn(64, 16)), nn.Parameter(torch.randn(16, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(F.relu(F.linear(x, self.into)), self.out)

    model = dk.prepare(Plain(), torch.randn(2, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = dk.DemP(model, optimizer, total_steps=9, prune_every=3, penalty_on="weights", peak_penalty=0.0, peak_noise=0.0,
                   policy="when_it_pays")
    with torch.no_grad():
        model.get_parameter("into")[:32] = 0
    report = train((model, optimizer, demp), 3, clock)
    assert report is not None and report.payoff is not None and report.payoff.saved > 0.4 and report.changed


def test_a_gpu_is_not_made_to_wait_before_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []

    class Event:
        count = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            self.at = Event.count = Event.count + 1

        def synchronize(self) -> None:
            waits.append(self.at)

        def elapsed_time(self, other: Any) -> float:
            return 1000.0 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    pace = policy.Pace(torch.device("cuda"))
    for _ in range(4):
        pace.ends()
        pace.begins(None)
    assert not waits
    assert pace.seconds() == 1.0 and waits == [2, 4, 6]


SCRIPT = """
import gc, sys, time, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
import demp_kernels as dk
from demp_kernels.training import policy
from torch.nn.parallel import DistributedDataParallel

rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}.store", rank=rank, world_size=2)
torch.set_num_threads(1)
torch.manual_seed(0)

class Clock:
    now = 0.0
    def perf_counter(self):
        return self.now

clock = policy.time = Clock()
inner = dk.prepare(nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16)), torch.randn(4, 16))
model = DistributedDataParallel(inner)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
demp = dk.DemP(model, optimizer, total_steps=40, prune_every=5, seed=1, policy="when_it_pays")
demp._weighing.removal_seconds = 10.0 if rank == 0 else 0.0
with torch.no_grad():
    inner.get_submodule("1").weight[:32] = 0
    inner.get_submodule("1").bias[:32] = -50
for step in range(10):
    x = torch.randn(8, 16)
    F.mse_loss(model(x), x).backward()
    optimizer.step()
    optimizer.zero_grad()
    # one rank alone would remove at the first look and the other at none
    clock.now += (1e-3 if step < 5 else 1.0) if rank else 1e-6
    demp.step()
torch.save({"decisions": demp.report().decisions, "live": demp.live_units}, f"{sys.argv[1]}.{rank}.pt")
del model, demp, optimizer
gc.collect()  # see tests/test_distributed.py
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_ranks_with_other_clocks_decide_alike(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def launch(rank: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(tmp_path / "result"), str(rank)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(launch, (0, 1)):
            assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"result.{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first == second
    slow, fast = first["decisions"]
    assert slow.step_seconds == pytest.approx(1e-3) and not slow.pays and slow.cost == 10.0
    assert fast.step_seconds == pytest.approx(1.0) and fast.pays and fast.saving == pytest.approx(15.0) and first["live"] == {"2": 32}
