"""Random networks, random dead units: three compactions in a row change neither the outputs nor the training.

DEMP_RANDOM_NETWORKS sets how many networks are tried, DEMP_RANDOM_SEED where their seeds begin; a failure prints the seed,
and `check(seed)` repeats it.
"""
from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch
from nets import silenced
from torch import Tensor, nn
from wider_nets import wider_net

import demp_kernels as dk

EXAMPLES = int(os.environ.get("DEMP_RANDOM_NETWORKS", "24"))
FIRST_SEED = int(os.environ.get("DEMP_RANDOM_SEED", "0"))
OPTIMIZERS: list[Callable] = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05),
]


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


def silence(model: nn.Module, dead: dict[str, Tensor], units: Callable[[str], Tensor]) -> list:
    """Hooks that zero dead units, in each call of an activation those of that call. `units(name)`: the original numbers of
    the units that it has now."""
    made: dict[str, int] = {}
    handles = [model.register_forward_pre_hook(lambda _module, _inputs: made.clear())]
    for path in {name.split("@")[0] for name in dead}:
        calls = [name for name in dead if name.split("@")[0] == path]

        def hook(module: nn.Module, _inputs: object, out: Tensor, path: str = path, calls: list[str] = calls) -> Tensor:
            name = calls[made.get(path, 0) % len(calls)]
            made[path] = made.get(path, 0) + 1
            return silenced(module, out, dead[name][units(name)])

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    return handles


def check(seed: int) -> int:
    """One network; returns how many units were removed."""
    model = wider_net(seed).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    graph = dk.UnitGraph.trace(model, x)
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    dead = {name: torch.zeros(units, dtype=torch.bool) for name, units in graph.units.items()}
    everything = {name: torch.arange(units) for name, units in graph.units.items()}
    handles = silence(model, dead, lambda name: torch.from_numpy(graph.unit_ids[name]))
    silence(twin, dead, lambda name: everything[name])
    optimizers = [OPTIMIZERS[seed % len(OPTIMIZERS)](m.parameters()) for m in (model, twin)]
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
    assert losses(model, optimizers[0], 3) == pytest.approx(losses(twin, optimizers[1], 3), abs=1e-7)
    if seed % 4:
        return removed
    for handle in handles:
        handle.remove()
    again = dk.UnitGraph.trace(model, x)
    # a new analysis may not see units where one is left, or know a depthwise convolution from one with one input a group
    assert all(graph.units[name] == units for name, units in again.units.items())
    return removed


def test_random_networks(record_property: Callable[[str, object], None]) -> None:
    seeds = range(FIRST_SEED, FIRST_SEED + EXAMPLES)
    removed, failed = 0, {}
    for seed in seeds:
        try:
            removed += check(seed)
        except Exception as error:
            failed[seed] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    record_property("networks tried", len(seeds))
    record_property("units removed", removed)
    record_property("seeds", f"{seeds.start} to {seeds.stop - 1}")
    assert not failed, "check(seed) repeats these: " + "; ".join(f"{seed}: {text}" for seed, text in failed.items())
    assert removed > 10 * len(seeds)
