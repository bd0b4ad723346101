"""A model in FSDP2's shards trains like the whole one, and loses the same units."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import demp_kernels as dk

# Every rank trains its share of a sharded model and, beside it, the whole one on the whole batch. Adam's eps is large, so
# that gradients that are nearly zero stay what they are.
SCRIPT = """
import gc, copy, sys, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
import demp_kernels as dk
import demp_kernels.training.fsdp as fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(
    nn.Linear(6, 23), nn.LayerNorm(23), nn.Linear(23, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
with torch.no_grad():
    net[2].bias[[1, 3, 8]] = -50
    net[4].bias[[2]] = -50
example = torch.randn(2, 6)
plain = dk.prepare(net, example)
graph = dk.UnitGraph.trace(plain, example)
mesh = init_device_mesh("cpu", (world,))

def build(model):
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-2)

whole = copy.deepcopy(plain)
optimizer_of_whole = torch.optim.AdamW(whole.parameters(), lr=0.05, eps=1e-2)
model, optimizer = build(copy.deepcopy(plain))
generator = torch.Generator().manual_seed(1)
losses, expected, live = [], [], []
for step in range(12):
    x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    task = F.cross_entropy(model(x[share]), y[share])
    task.backward()
    optimizer.step(); optimizer.zero_grad()
    reference = F.cross_entropy(whole(x), y)
    reference.backward()
    optimizer_of_whole.step(); optimizer_of_whole.zero_grad()
    shown = task.detach().clone()
    dist.all_reduce(shown)
    losses.append(shown.item() / world)
    expected.append(reference.item())
    if step == 5:
        nothing = {"5": torch.zeros(graph.units["5"], dtype=torch.bool)}
        gathering, fsdp.get_optimizer_state_dict = fsdp.get_optimizer_state_dict, None  # calling it would fail
        same, same_optimizer, report = dk.compact_sharded(model, optimizer, plain, build, graph=graph, dead=nothing)
        assert same is model and same_optimizer is optimizer and not report.changed
        fsdp.get_optimizer_state_dict = gathering
    if step in (3, 7):
        # first what the counters say, then a unit that is taken out although it is alive
        silent = {"5": torch.arange(graph.units["5"]) == 0} if step == 7 else None
        alone = dk.compact(whole, optimizer_of_whole, example, dead=silent)
        model, optimizer, report = dk.compact_sharded(model, optimizer, plain, build, graph=graph, dead=silent)
        live.append((list(report.live_units.values()), list(alone.live_units.values())))
parts = {name: p.full_tensor() for name, p in model.named_parameters()}
moments = {name: optimizer.state[p]["exp_avg"].full_tensor() for name, p in model.named_parameters()}
torch.save({
    "losses": losses, "expected": expected, "live": live, "parts": parts, "moments": moments,
    "whole": {name: p.detach() for name, p in whole.named_parameters()},
    "whole_moments": {name: optimizer_of_whole.state[p]["exp_avg"] for name, p in whole.named_parameters()},
    "sharded": all(p.to_local().numel() < p.numel() for p in model.parameters() if len(p) > 1),
}, f"{sys.argv[1]}.{rank}.pt")
del model, optimizer, task
gc.collect()  # see tests/test_distributed.py
dist.destroy_process_group()
"""


def test_activations_are_found_behind_checkpointing_and_compiled_blocks() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 5), nn.ReLU()), nn.Linear(5, 3))
    plain = dk.prepare(net, torch.randn(2, 6))
    graph = dk.UnitGraph.trace(plain, torch.randn(2, 6))
    blocks = nn.Module()
    blocks.add_module("1", checkpoint_wrapper(plain.get_submodule("1")))
    blocks.add_module("2", torch.compile(plain.get_submodule("2")))
    found = graph.calls_of(blocks)
    assert {call.module for calls in found.values() for call in calls} == {"1", "2.1"}
    assert all(isinstance(module, dk.DemPReLU) for module in found)
    # nor where it was the wrapped model that was analysed
    wrapped = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(6, 8), dk.DemPReLU())), nn.Linear(8, 3))
    assert len(dk.UnitGraph.trace(wrapped, torch.randn(2, 6)).calls_of(wrapped)) == 1


def test_a_graph_of_another_model_is_refused() -> None:
    plain = dk.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 6))
    other = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3))
    graph = dk.UnitGraph.trace(other, torch.randn(2, 6))
    with pytest.raises(ValueError, match="graph must be that of plain"):
        dk.compact_sharded(plain, torch.optim.SGD(plain.parameters()), plain, lambda net: (net, None), graph=graph)


def run(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks saved."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(folder / "result")], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"result.{rank}.pt") for rank in range(2)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_a_sharded_model_trains_like_the_whole_one_through_two_removals(tmp_path: Path) -> None:
    for rank in run(tmp_path):
        (first, alone), (second, alone_again) = rank["live"]
        assert first == alone and second == alone_again and rank["sharded"]
        assert first[0] <= 13 and first[1] <= 11 and second == [first[0], first[1] - 1]
        torch.testing.assert_close(torch.tensor(rank["losses"]), torch.tensor(rank["expected"]), rtol=0, atol=1e-5)
        for name, moment in rank["whole_moments"].items():
            torch.testing.assert_close(rank["moments"][name], moment, rtol=0, atol=1e-6)
            torch.testing.assert_close(rank["parts"][name], rank["whole"][name], rtol=0, atol=1e-5)
