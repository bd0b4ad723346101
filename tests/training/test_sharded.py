"""Checkpoints through torch.distributed.checkpoint: saved by one or two processes, loaded by as many or the other number."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import demp_kernels as dk

needs_distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")

SCRIPT = """
import gc, sys, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
import demp_kernels as dk
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, world, (what, folder, result) = dist.get_rank(), dist.get_world_size(), sys.argv[1:]
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
inner = dk.prepare(net, torch.randn(2, 6))
model = DistributedDataParallel(inner) if world > 1 else inner
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
average = torch.optim.swa_utils.AveragedModel(inner)
demp = dk.DemP(model, optimizer, total_steps=12, prune_every=4, peak_penalty=1e-3, peak_noise=1e-3, seed=1, followers=average)
x, y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3

def train(steps):
    for _ in range(steps):
        (F.cross_entropy(model(x), y) + demp.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        demp.step()

if what == "save":
    with torch.no_grad():
        inner.get_submodule("2").bias[[1, 3]] = -50
    train(6)
    import os
    import torch.distributed.checkpoint as dcp
    dk.save_sharded(folder, model, optimizer, demp)
    save = dcp.save
    def killed(*arguments, **options):
        raise KeyboardInterrupt
    dcp.save = killed
    try:
        dk.save_sharded(folder, model, optimizer, demp)
    except KeyboardInterrupt:
        pass
    assert not os.path.exists(os.path.join(folder, "demp.pt")), "a half-written folder passes for a checkpoint"
    dcp.save = save
    from demp_kernels.training import sharded
    write = sharded.write_file
    def full(*_):
        raise OSError(28, "No space left on device")
    sharded.write_file = full  # of rank 0 alone: all ranks must hear of it
    try:
        dk.save_sharded(folder, model, optimizer, demp)
        raise AssertionError("a failed save went unnoticed")
    except OSError:
        pass
    sharded.write_file = write
    dk.save_sharded(folder, model, optimizer, demp, extra={"mine": 3})
else:
    assert dk.load_sharded(folder, model, optimizer, demp) == {"mine": 3}
    assert demp.steps_done == 6 and inner.get_submodule("2").weight.shape[0] <= 14
with torch.no_grad():
    inner.get_submodule("2").bias[[0]] = -50
train(6)
assert demp.report().live_units != demp.total_units
assert [p.shape for p in average.module.parameters()] == [p.shape for p in inner.parameters()]
torch.save([p.detach() for p in inner.parameters()], f"{result}.{rank}.pt")
del model, demp, optimizer
gc.collect()  # a wrapper that lives on keeps gloo's threads, which may then run into the interpreter's end: SIGABRT
dist.destroy_process_group()
"""


def run(processes: int, folder: Path, *arguments: object) -> None:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


@needs_distributed
def test_a_resumed_run_ends_as_the_one_that_saved(tmp_path: Path) -> None:
    run(2, tmp_path, "save", tmp_path / "checkpoint", tmp_path / "whole")
    whole = torch.load(tmp_path / "whole.0.pt")
    for processes, (rtol, atol) in ((2, (0, 0)), (1, (1e-4, 1e-5))):
        run(processes, tmp_path, "load", tmp_path / "checkpoint", tmp_path / "resumed")
        # every rank sees the same batch, so that the mean over the ranks is the one rank's gradient, up to rounding
        torch.testing.assert_close(torch.load(tmp_path / "resumed.0.pt"), whole, rtol=rtol, atol=atol)


def one_process(make_optimizer: Callable[..., torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer, dk.DemP]:
    torch.manual_seed(0)
    model = dk.prepare(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)), torch.randn(2, 6))
    optimizer = make_optimizer(model.parameters(), lr=0.01)
    return model, optimizer, dk.DemP(model, optimizer, total_steps=8, prune_every=2, peak_penalty=0.0, seed=1)


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


@needs_distributed
@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
@pytest.mark.parametrize("change", ["optimizer", "metadata", "no metadata"])
def test_what_does_not_fit_is_refused_before_the_model_is_cut(change: str, tmp_path: Path) -> None:
    model, optimizer, demp = one_process(torch.optim.AdamW)
    with torch.no_grad():
        model.get_submodule("0").bias[:5] = -50
    for _ in range(2):
        model(torch.randn(8, 6)).sum().backward()
        optimizer.step()
        demp.step()
    assert sum(demp.live_units.values()) <= 19
    dk.save_sharded(tmp_path, model, optimizer, demp)

    if change == "metadata":
        (tmp_path / ".metadata").write_bytes((tmp_path / ".metadata").read_bytes()[:40])
    elif change == "no metadata":
        (tmp_path / ".metadata").unlink()
    model, optimizer, demp = one_process(momentum if change == "optimizer" else torch.optim.AdamW)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(dk.CheckpointError, match="momentum_buffer" if change == "optimizer" else "metadata"):
        dk.load_sharded(tmp_path, model, optimizer, demp)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not optimizer.state and demp.steps_done == 0 and demp.live_units == demp.total_units

    if change == "optimizer":
        model, optimizer, demp = one_process(torch.optim.AdamW)
        dk.load_sharded(tmp_path, model, optimizer, demp)
        assert demp.steps_done == 2 and sum(demp.live_units.values()) <= 19


@needs_distributed
@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_a_layer_that_is_frozen_at_the_resume_needs_no_state(tmp_path: Path) -> None:
    model, optimizer, demp = one_process(torch.optim.AdamW)
    model(torch.randn(8, 6)).sum().backward()
    optimizer.step()
    demp.step()
    dk.save_sharded(tmp_path, model, optimizer, demp)
    other, optimizer, demp = one_process(torch.optim.AdamW)
    other.get_submodule("0").requires_grad_(False)
    dk.load_sharded(tmp_path, other, optimizer, demp)
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert len(optimizer.state) == 2 and demp.steps_done == 1
