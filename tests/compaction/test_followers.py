"""Copies of a model (averages, teachers) are cut as it is, keep what they compute, and stay averages afterwards."""
from __future__ import annotations

import copy

import pytest
import torch
from nets import ResNet, inputs
from test_optimizers import net, train
from test_refusals import same, snapshot
from torch import nn
from torch import optim as O
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import demp_kernels as dk
from demp_kernels import UnitGraph


@pytest.mark.parametrize("kind", ["average", "ema", "copy"])
def test_copies_follow(kind: str) -> None:
    model, graph, dead = net()
    optimizer = O.AdamW(model.parameters(), 1e-3)
    average = {
        "average": lambda: AveragedModel(model),
        "ema": lambda: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        "copy": lambda: copy.deepcopy(model),
    }[kind]()
    train(model, optimizer, 2, 1)
    if kind != "copy":
        average.update_parameters(model)
    x = inputs(dtype=torch.float64)
    average.eval()
    before, objects = average(x), [id(p) for p in average.parameters()]
    dk.compact(model, optimizer, dead=dead, graph=graph, followers=average)
    torch.testing.assert_close(average(x), before, rtol=0, atol=1e-9)
    assert [id(p) for p in average.parameters()] == objects
    assert [p.shape for p in average.parameters()] == [p.shape for p in model.parameters()]
    if kind != "copy":
        average.update_parameters(model)
        assert int(average.n_averaged) == 2


def test_a_follower_of_another_shape_is_refused() -> None:
    model, graph, dead = net()
    other = copy.deepcopy(model)
    other[0] = nn.Conv2d(3, 10, 3)
    before = snapshot(model), snapshot(other)
    with pytest.raises(ValueError, match=r"followers\[0\] must be a copy of the model: .*0.weight with 12 entries"):
        dk.compact(model, None, dead=dead, graph=graph, followers=[other])
    with pytest.raises(TypeError, match="followers must be a module or a list of modules, got int"):
        dk.compact(model, None, dead=dead, graph=graph, followers=[3])
    assert same(before[0], snapshot(model)) and same(before[1], snapshot(other))


def test_what_a_follower_shares_with_the_model_is_cut_once() -> None:
    model, graph, dead = net()
    twin = copy.deepcopy(model)
    twin[0], twin[2] = model[0], model[2]
    x = inputs(dtype=torch.float64)
    model(x), model.eval(), twin.eval()
    before, shared = model(x), twin(x)
    dk.compact(model, None, dead=dead, graph=graph, followers=[twin, model])
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-9)
    torch.testing.assert_close(twin(x), shared, rtol=0, atol=1e-9)


def test_additions_that_followers_share_are_cut_once() -> None:
    torch.manual_seed(0)
    model = ResNet().double()
    twin = copy.deepcopy(model)
    twin.blocks = model.blocks
    x = inputs(dtype=torch.float64)
    graph = UnitGraph.trace(model, x)
    dead = {name: torch.arange(units) % 3 == place % 3 for place, (name, units) in enumerate(graph.units.items())}
    dk.compact(model, None, dead=dead, graph=graph, followers=[twin, model])
    assert any(block.add.index is not None for block in model.blocks)
    assert twin.blocks is model.blocks and twin.head.weight.shape == model.head.weight.shape
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_averages_of_buffers_leave_selections_alone() -> None:
    """torch averages integer buffers in floating point: 3 became 2 in an addition's table, and its indices moved."""
    torch.manual_seed(0)
    model = ResNet()
    optimizer = O.SGD(model.parameters(), 1e-2)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    x = torch.randn(4, 3, 8, 8)
    graph = UnitGraph.trace(model, x)
    for share in (3, 2):
        dead = {name: torch.arange(units) % share == place % share for place, (name, units) in enumerate(graph.units.items())}
        for _ in range(3):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update_parameters(model)
        dk.compact(model, optimizer, dead=dead, graph=graph, followers=ema)
        for _ in range(3):
            ema.update_parameters(model)
        selections = [(a.add, b.add) for a, b in zip(model.blocks, ema.module.blocks)]
        assert any(a.index is not None for a, _ in selections)
        for a, b in selections:
            assert torch.equal(a.channels, b.channels)
            assert a.index is b.index is None or torch.equal(a.index, b.index)
        ema(x).sum().backward()


def test_a_copy_of_the_network_before_prepare_is_no_follower() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = net, nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.head(torch.relu(self.b(y) + y).mean((2, 3)))

    plain = Residual()
    ema = AveragedModel(plain)
    model = dk.prepare(plain, torch.randn(2, 3, 6, 6))
    with pytest.raises(ValueError, match=r"followers\[0\] must be a copy of the model: it has no add; copy the model that prepare"):
        dk.DemP(model, O.SGD(model.parameters(), 0.1), total_steps=5, peak_penalty=0.0, followers=ema)
