"""Two data-parallel processes make the same decisions, and the same losses, as one process on the same global batch."""
from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

# Run by every rank. Normalisation is per sample and the optimiser linear in the gradient, so that splitting the batch
# changes nothing but rounding (Adam would blow up the rounding of gradients that are nearly zero).
SCRIPT = """
import gc, sys, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
import demp_kernels as dk
from torch.nn.parallel import DistributedDataParallel

rank, world = int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}.{world}.store", rank=rank, world_size=world)
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
del model, demp, optimizer, task
gc.collect()  # a wrapper that lives on keeps gloo's threads, which may then run into the interpreter's end: SIGABRT
dist.destroy_process_group()
"""


# nn.SyncBatchNorm computes, and DistributedDataParallel accepts it, on GPUs only: on the CPU both are stood in for, by
# the definition (statistics of the global batch, gradients through the collectives).
SYNC_SCRIPT = """
import gc, sys, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
import demp_kernels as dk
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

def forward(self, x):
    if not self.training or dist.get_world_size() == 1:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
    n = x.numel() // x.shape[1] * dist.get_world_size()
    mean = all_reduce(x.sum((0, 2, 3))) / n
    centred = x - mean.view(1, -1, 1, 1)
    var = all_reduce((centred * centred).sum((0, 2, 3))) / n
    with torch.no_grad():
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * n / (n - 1), self.momentum)
    return centred * (torch.rsqrt(var + self.eps) * self.weight).view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

nn.SyncBatchNorm.forward = forward
DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None
rank, world = int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}.{world}.store", rank=rank, world_size=world)
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, bias=False),
    nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
inner = model = dk.prepare(nn.SyncBatchNorm.convert_sync_batchnorm(net), torch.randn(2, 3, 6, 6))
assert type(inner.get_submodule("1")) is nn.SyncBatchNorm  # not fused
model = DistributedDataParallel(model) if world > 1 else model
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
demp = dk.DemP(model, optimizer, total_steps=8, prune_every=4, peak_penalty=1e-3, peak_noise=1e-3, seed=100)
generator = torch.Generator().manual_seed(1)
with torch.no_grad():
    inner.get_submodule("1").bias[[1, 3]] = -50
losses, live = [], []
for step in range(8):
    x, y = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    task = F.cross_entropy(model(x[share]), y[share])
    (task + demp.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 2:
        counts = [module.active.clone() for module in inner.modules() if isinstance(module, dk.DemPReLU)]
        for count in counts:
            dist.all_reduce(count)
    demp.step()
    shown = task.detach().clone()
    dist.all_reduce(shown)
    losses.append(shown.item() / world)
    live.append(list(demp.live_units.values()))
weights = torch.cat([t.detach().flatten() for t in (*inner.parameters(), *inner.buffers()) if t.is_floating_point()])
torch.save({"losses": losses, "live": live, "weights": weights, "counts": torch.cat(counts)}, f"{sys.argv[1]}.{world}.{rank}.pt")
del model, demp, optimizer, task
gc.collect()  # a wrapper that lives on keeps gloo's threads, which may then run into the interpreter's end: SIGABRT
dist.destroy_process_group()
"""


# What a unit did before the checkpoint on the rank that does not write it counts afterwards, too. Unit i is active where input i is.
RESUMED_SCRIPT = """
import gc, sys, torch, torch.distributed as dist, torch.nn as nn
import demp_kernels as dk
from torch.nn.parallel import DistributedDataParallel

rank, world = int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}.{world}.store", rank=rank, world_size=world)
torch.set_num_threads(1)

def fresh():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4))
    model = DistributedDataParallel(dk.prepare(net, torch.randn(2, 4)))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.register_full_backward_hook(lambda *_: calls.append(100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = dk.DemP(model, optimizer, total_steps=8, prune_every=4, peak_penalty=0.0, peak_noise=0.0, seed=1)
    return model, optimizer, demp, calls

def steps(model, demp, units, count):
    for _ in range(count):
        model(torch.eye(4)[units]).sum().backward()
        model.zero_grad()
        demp.step()

model, optimizer, demp, calls = fresh()
steps(model, demp, [0, 1, 2], 4)
first = list(demp.live_units.values())
steps(model, demp, [0, 1] if rank == world - 1 else [0], 2)
demp.pool_counters()
counted = next(m.active for m in model.modules() if isinstance(m, dk.DemPReLU)).tolist()
file = f"{sys.argv[1]}.{world}.checkpoint"
if rank == 0:
    dk.save_checkpoint(file, model, optimizer, demp)
dist.barrier()
steps(model, demp, [0], 2)
other, optimizer, resumed, _ = fresh()
dk.load_checkpoint(file, other, optimizer, resumed)
steps(other, resumed, [0], 2)
live = [first, list(demp.live_units.values()), list(resumed.live_units.values())]
torch.save({"live": live, "counted": counted, "calls": sum(calls)}, f"{sys.argv[1]}.{world}.{rank}.pt")
del model, other, demp, resumed, optimizer
gc.collect()
dist.destroy_process_group()
"""


# PowerSGD keeps an error for each bucket of gradients, in the bucket's length. And a wrapper over some of the ranks is refused.
COMPRESSED_SCRIPT = """
import gc, sys, torch, torch.distributed as dist, torch.nn as nn
import demp_kernels as dk
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

rank, world = int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}.{world}.store", rank=rank, world_size=world)
torch.set_num_threads(1)
torch.manual_seed(0)
inner = dk.prepare(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(2, 16))
model = DistributedDataParallel(inner)  # one bucket: with several the hook blocks gloo's thread
state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1)
model.register_comm_hook(state, powerSGD_hook)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
demp = dk.DemP(model, optimizer, total_steps=12, prune_every=4, peak_penalty=0.0, peak_noise=0.0, seed=1)
kept = []
for step in range(12):
    if step == 4:
        with torch.no_grad():
            inner.get_submodule("0").bias[:9] = -50
    model(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    kept.append(len(state.error_dict))
    demp.step()
refused = ""
some = dist.new_group([0]) if world > 1 else None
if some is not None and rank == 0:
    part = DistributedDataParallel(dk.prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)), process_group=some)
    try:
        dk.DemP(part, torch.optim.SGD(part.parameters(), lr=0.1), total_steps=4)
    except ValueError as error:
        refused = str(error)
    del part
torch.manual_seed(2)
apart = nn.Sequential(nn.Linear(4, 8), dk.DemPReLU(), nn.Linear(8, 8), dk.DemPReLU(), nn.Linear(8, 2))
with torch.no_grad():
    apart.get_submodule("2").bias[:3] = -100
noisy = dk.DemP(apart, torch.optim.SGD(apart.parameters(), lr=0.1), total_steps=8, prune_every=2, peak_penalty=0, peak_noise=1e-2, seed=1, example_inputs=torch.randn(2, 4))
for _ in range(2):
    for layer in "01234"[: 5 if rank == 0 else 2]:  # the second rank calls the first activation alone
        x = apart.get_submodule(layer)(torch.ones(3, 4) if layer == "0" else x)
    noisy.step()
apart = torch.cat([p.detach().flatten() for p in apart.parameters()])

class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.act = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2), dk.DemPReLU()
    def forward(self, x):
        return self.head(self.act(self.b(self.act(self.a(x)))))

shared = Shared()  # one activation of two widths, of which the second rank comes to call the first alone
noisy = dk.DemP(shared, torch.optim.SGD(shared.parameters(), lr=0.1), total_steps=8, prune_every=2, peak_penalty=0, peak_noise=1e-2, seed=1, example_inputs=torch.randn(2, 4))
for step in range(8):
    x = shared.act(shared.a(torch.ones(3, 4)))
    if rank == 0 or step < 2:
        shared.act(shared.b(x))
    noisy.step()
shared = torch.cat([p.detach().flatten() for p in shared.parameters()])
weights = torch.cat([p.detach().flatten() for p in inner.parameters()])
torch.save({"live": list(demp.live_units.values()), "kept": kept, "weights": weights, "refused": refused, "apart": apart, "shared": shared}, f"{sys.argv[1]}.{world}.{rank}.pt")
del model, demp, optimizer, state
gc.collect()
dist.destroy_process_group()
"""


def run(text: str, folder: Path) -> tuple[dict[str, object], dict[str, object], dict[str, object]]:
    """What one process saved, and each of two ranks. All go on at once: most of their time is importing torch. They meet at
    a file, because two runs of torchrun side by side can be given the same port."""
    script = folder / "train.py"
    script.write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def launch(rank: int, processes: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(folder / "result"), str(rank), str(processes)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    with ThreadPoolExecutor(3) as pool:
        for done in pool.map(launch, (0, 0, 1), (1, 2, 2)):
            assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (torch.load(folder / f"result.{name}.pt") for name in ("1.0", "2.0", "2.1"))
    return one, first, second


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    one, first, second = run(SCRIPT, tmp_path)
    assert torch.equal(first["weights"], second["weights"])
    assert first["live"] == second["live"] == one["live"]
    assert one["live"][0] == [16, 12] and one["live"][3] == [14, 11]  # and then whatever died by itself
    assert sum(one["live"][7]) < 25
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(one["losses"]), rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_synchronised_batch_norm_and_counts_are_those_of_the_global_batch(tmp_path: Path) -> None:
    one, first, second = run(SYNC_SCRIPT, tmp_path)
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["counts"], one["counts"]) and int(one["counts"][0]) > 0 == int(one["counts"][1])
    assert first["live"] == second["live"] == one["live"] and one["live"][-1] == [10, 8]
    torch.testing.assert_close(first["weights"], one["weights"], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(one["losses"]), rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_a_checkpoint_of_rank_0_holds_what_all_ranks_have_counted(tmp_path: Path) -> None:
    one, first, second = run(RESUMED_SCRIPT, tmp_path)
    assert one["live"] == first["live"] == second["live"] == [[3], [2], [2]]
    assert first["counted"] == [4, 2, 0] and second["counted"] == [0, 0, 0] and one["counted"] == [2, 2, 0]
    assert one["calls"] == first["calls"] == 808  # hooks on the wrapper outlive the removals


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_compressed_gradients_begin_anew_behind_a_removal(tmp_path: Path) -> None:
    one, first, second = run(COMPRESSED_SCRIPT, tmp_path)
    # in the same processes, to save the start of three more: ranks that have not called the same activations, or
    # one of them at other widths, add the same noise and go on (they waited for each other for good)
    assert torch.equal(first["apart"], second["apart"]) and torch.equal(first["apart"], one["apart"])
    assert torch.equal(first["shared"], second["shared"]) and torch.equal(first["shared"], one["shared"])
    assert first["live"] == second["live"] and first["live"][0] <= 55
    # compression begins in the third step, and once more in the third behind the removal: the first has other buckets
    assert [count > 0 for count in first["kept"]] == [False] * 2 + [True] * 6 + [False] * 2 + [True] * 2
    assert torch.equal(first["weights"], second["weights"])
    assert first["refused"] == "model must be in DistributedDataParallel over all 2 ranks, got a process_group of 1"
