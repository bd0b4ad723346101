"""DemP and torch.compile: a model that is compacted often goes on being compiled."""
from __future__ import annotations

import pytest
import torch
from torch import nn

import demp_kernels as dk


@pytest.mark.parametrize("way", ["function", "method"])
def test_a_removal_a_step_never_ends_compilation(way: str) -> None:
    torch._dynamo.reset()
    model = dk.prepare(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(4, 6))
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    compiled = model
    if way == "function":
        compiled = torch.compile(model, backend=count)
    else:
        model.compile(backend=count)
    removals = torch._dynamo.config.recompile_limit + 2
    demp = dk.DemP(compiled, optimizer, total_steps=100, peak_penalty=0.0, peak_noise=0.0, prune_every=1)
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        layer.bias.fill_(100.0)  # no unit is dead by chance
    for removed in range(1, removals + 1):
        with torch.no_grad():
            layer.bias[0] = -1e6  # the first unit is dead from now on
        compiled(torch.randn(8, 6)).sum().backward()
        assert len(graphs) == removed, "compiled once for every width"
        optimizer.zero_grad()
        demp.step()
        assert layer.out_features == 16 - removed


@pytest.mark.parametrize("module", [dk.DemPReLU(), dk.DemPBatchNormAct2d(16)])
def test_batches_of_any_size_are_one_graph(module: nn.Module) -> None:
    """The way of tiny tensors is not asked for while tracing: the question would be a guard on the size."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, backend=count)
    module.get_submodule("act").allocate(16) if hasattr(module, "act") else module.allocate(16)
    for batch in (3, 5, 70, 7, 90):  # 192 to 5,760 values a channel: below and above what is tiny
        x = torch.randn(batch, 16, 8, 8)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
    assert len(graphs) == 1
