"""Checkpoints through torch.distributed.checkpoint: saved by one or two processes, loaded by as many or the other number."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_a_resumed_run_ends_as_the_one_that_saved(tmp_path: Path) -> None:
    run(2, tmp_path, "save", tmp_path / "checkpoint", tmp_path / "whole")
    whole = torch.load(tmp_path / "whole.0.pt")
    for processes, (rtol, atol) in ((2, (0, 0)), (1, (1e-4, 1e-5))):
        run(processes, tmp_path, "load", tmp_path / "checkpoint", tmp_path / "resumed")
        # every rank sees the same batch, so that the mean over the ranks is the one rank's gradient, up to rounding
        torch.testing.assert_close(torch.load(tmp_path / "resumed.0.pt"), whole, rtol=rtol, atol=atol)
