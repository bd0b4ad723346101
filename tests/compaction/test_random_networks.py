"""Random networks, random dead units: three compactions in a row change neither the outputs nor the training.

DEMP_RANDOM_NETWORKS sets how many networks are tried; a failure prints the seed, and `check(seed)` repeats it.
"""
from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import enforce
from random_nets import random_net
from torch import Tensor, nn

import demp_kernels as dk

EXAMPLES = int(os.environ.get("DEMP_RANDOM_NETWORKS", "25"))


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 2) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        y = model(x)
    model.train()
    return y


def check(seed: int) -> int:
    """One network; returns how many units were removed."""
    model = random_net(seed).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    graph = dk.UnitGraph.trace(model, x)
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    dead = {name: torch.zeros(units, dtype=torch.bool) for name, units in graph.units.items()}
    everything = {name: torch.arange(units) for name, units in graph.units.items()}
    handles = enforce(model, dead, lambda name: torch.from_numpy(graph.unit_ids[name]))
    enforce(twin, dead, lambda name: everything[name])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (model, twin)]
    removed = 0
    for round_number in range(3):
        for mask in dead.values():
            # deaths are for good; sometimes whole layers die
            share = 1.0 if torch.rand((), generator=generator) < 0.15 else 0.3
            mask |= torch.rand(mask.numel(), generator=generator) < share
        assert losses(model, optimizers[0], round_number) == pytest.approx(losses(twin, optimizers[1], round_number), abs=1e-8)
        before = evaluated(model, x)
        now = {name: mask[torch.from_numpy(graph.unit_ids[name])] for name, mask in dead.items()}
        report = dk.compact(model, optimizers[0], dead=now, graph=graph)
        removed += sum(report.removed.values())
        torch.testing.assert_close(evaluated(model, x), before, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(evaluated(twin, x), before, rtol=1e-7, atol=1e-7)
    for handle in handles:
        handle.remove()
    again = dk.UnitGraph.trace(model, x)
    # a new analysis may not see units where one is left, or know a depthwise convolution from one with one input a group
    assert all(graph.units[name] == units for name, units in again.units.items())
    return removed


@given(st.integers(0, 10**6))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, print_blob=True)
def test_random_networks(seed: int) -> None:
    check(seed)
