"""Two data-parallel processes make the same decisions, and the same losses, as one process on the same global batch."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Run by every rank. Normalisation is per sample and the optimiser linear in the gradient, so that splitting the batch
# changes nothing but rounding (Adam would blow up the rounding of gradients that are nearly zero).
SCRIPT = """
import sys, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
import demp_kernels as dk
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
model = dk.prepare(net, torch.randn(2, 6))
inner = model
model = DistributedDataParallel(model) if world > 1 else model
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
demp = dk.DemP(model, optimizer, total_steps=12, prune_every=4, peak_penalty=1e-3, peak_noise=1e-3, seed=100 + rank if world > 1 else 100)
generator = torch.Generator().manual_seed(1)

def silence(name, units):
    with torch.no_grad():
        inner.get_submodule(name).bias[units] = -50

losses, live = [], []
for step in range(12):
    if step in (0, 5):
        silence("2", [1, 3] if step == 0 else [0])
        silence("4", [2] if step == 0 else [4, 5])
    x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    task = F.cross_entropy(model(x[share]), y[share])
    (task + demp.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()
    demp.step()
    shown = task.detach().clone()
    dist.all_reduce(shown)
    losses.append(shown.item() / world)
    live.append(list(demp.live_units.values()))
flat = torch.cat([p.detach().flatten() for p in inner.parameters()])
torch.save({"losses": losses, "live": live, "weights": flat}, f"{sys.argv[1]}.{world}.{rank}.pt")
dist.destroy_process_group()
"""


def run(processes: int, folder: Path) -> list[dict[str, object]]:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        str(script), str(folder / "result"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"result.{processes}.{rank}.pt") for rank in range(processes)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    (one,) = run(1, tmp_path)
    first, second = run(2, tmp_path)
    assert torch.equal(first["weights"], second["weights"])
    assert first["live"] == second["live"] == one["live"]
    assert one["live"][0] == [16, 12] and one["live"][3] == [14, 11]  # and then whatever died by itself
    assert sum(one["live"][7]) < 25
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(one["losses"]), rtol=0, atol=1e-5)
