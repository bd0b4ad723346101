"""Random networks with random constant units: folding what can be folded exactly, and keeping the rest, changes no output.

DEMP_RANDOM_NETWORKS sets how many networks are tried; a failure prints the seed, and `check(seed)` repeats it.
"""
from __future__ import annotations

import copy
import os
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_nets import Squeeze, random_net
from torch import Tensor, nn

import demp_kernels as dk

EXAMPLES = max(1, int(os.environ.get("DEMP_RANDOM_NETWORKS", "25")) // 4)


def hold(values: dict[str, tuple[Tensor, Tensor]], graph: dk.UnitGraph, name: str, dim: int) -> Callable[..., Tensor]:
    """A forward hook that gives the units of `values[name]`, (units at first,) bool, their constants. Units that get
    nothing but zeros at the first call have zero for their constant: no activation makes anything else of that."""
    seen = []

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        if not seen:
            seen.append(name)
            values[name][1][(inputs[0] == 0).movedim(dim, 0).flatten(1).all(1)] = 0
        ids = torch.from_numpy(graph.unit_ids[name])
        if output.shape[dim] != len(ids):
            return output  # a trial at planned widths, which the graph does not have yet
        mask, constants = (v[ids].view([-1 if d == dim else 1 for d in range(output.dim())]) for v in values[name])
        return torch.where(mask, constants, output)

    return hook


def output(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).train(training)(x)


def check(seed: int) -> int:
    """One network; returns how many inputs of layers were folded. In every other one live units are called dead, too: they
    have to stay, unless they are constant on what was measured. In the others constants go exactly without a limit, too."""
    model = random_net(seed).double()
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64, generator=generator)
    graph = dk.UnitGraph.trace(model, x)
    modules, values = dict(model.named_modules()), {}
    for a in graph.activations:
        if a.module in modules:
            share = 1.0 if torch.rand((), generator=generator) < 0.15 else 0.4
            mask = torch.rand(a.total, generator=generator) < share
            nonzero = torch.rand(a.total, generator=generator) < 0.7
            values[a.name] = mask, nonzero * torch.randn(a.total, generator=generator, dtype=torch.float64)
            modules[a.module].register_forward_hook(hold(values, graph, a.name, a.dim))
    output(model, torch.cat([x, other]), False)
    wrong = 0.2 * (seed % 2)
    dead = {name: mask | (torch.rand(mask.numel(), generator=generator) < wrong) for name, (mask, _) in values.items()}
    # behind a gate a constant is what the gate makes of it, which other statistics change
    only_here = wrong or any(isinstance(module, Squeeze) for module in modules.values())
    cases = [(x, False)] if only_here else [(x, False), (other, False), (x, True)]
    limit = 1e-9 if only_here else float("inf")
    folded = 0
    for _ in range(2):
        before = [output(model, *case) for case in cases]
        now = {name: mask[torch.from_numpy(graph.unit_ids[name])] for name, mask in dead.items()}
        report = dk.compact(model, None, dead=now, graph=graph, fold_batches=[x], max_change=limit)
        folded += sum(f.inputs for f in report.folded.values())
        for case, expected in zip(cases, before):
            size = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(output(model, *case) / size, expected / size, rtol=0, atol=1e-7)
    return folded


@given(st.integers(0, 10**6))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, print_blob=True)
def test_random_networks(seed: int) -> None:
    check(seed)


def test_folding_happens() -> None:
    """Also where units kept for a width change when others have to stay (8)."""
    assert all(check(seed) > 0 for seed in (0, 2, 5, 8))
