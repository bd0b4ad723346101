"""Networks whose code does what most do not: a shared activation, properties for widths, layers that a forward only sometimes calls."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_kernels as dk
from demp_kernels import UnitGraph
from demp_kernels.compaction import commit


class TwoUses(nn.Module):
    """One activation behind a convolution, and on tokens whose units lie along another dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.mix, self.head = nn.Conv2d(3, 12, 1), dk.DemPReLU(), nn.Linear(12, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        tokens = self.act(self.mix(y.flatten(2).transpose(1, 2)))
        return self.head(tokens.mean(1))


def test_counters_of_a_call_that_was_not_analysed_do_not_stand_in_the_way() -> None:
    torch.manual_seed(0)
    model, x = TwoUses(), torch.randn(2, 3, 3, 3)
    with torch.no_grad():
        model.conv.bias[[2, 9]] = -50
    model(x)
    assert model.act.active.numel() == 9
    before = model.eval()(x)
    graph = UnitGraph.trace(model, x)
    name = next(name for name, units in graph.units.items() if units == 12)
    dk.compact(model, None, dead={name: torch.isin(torch.arange(12), torch.tensor([2, 9]))}, graph=graph)
    assert model.conv.weight.shape[0] == 10 and graph.units[name] == 10
    torch.testing.assert_close(model(x), before)
    model.train()(x)


class Sized(nn.Module):
    """A layer whose number of inputs is a property."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.randn(outputs))

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.reshape(-1, self.in_features), self.weight, self.bias)


def test_a_width_that_is_a_property_follows_by_itself() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), dk.DemPReLU(), Sized(8, 3)), torch.randn(50, 4)
    with torch.no_grad():
        model[0].bias[[1, 6]] = -50
    before = model(x)
    report = dk.compact(model, None, x)
    assert report.removed == {"1": 2} and model[2].in_features == 6
    torch.testing.assert_close(model(x), before)


def test_memory_is_moved_on_the_cpu_whatever_the_default_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "MOVE_BYTES", 1)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), dk.DemPReLU(), nn.Linear(8, 3)), torch.randn(50, 4)
    with torch.no_grad():
        model[0].bias[[1, 6]] = -50
    before = model(x)
    graph = UnitGraph.trace(model, x)
    with torch.device("meta"):
        dk.compact(model, None, graph=graph)
    torch.testing.assert_close(model(x), before)


class Tasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.act, self.heads = nn.Linear(4, 8), dk.DemPReLU(), nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)])

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](self.act(self.trunk(x)))


def test_layers_that_the_example_does_not_reach_are_named() -> None:
    model = Tasks()
    with pytest.warns(UserWarning, match=r"heads\.1\.weight, heads\.1\.bias: not used by the forward of example_inputs"):
        dk.DemP(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=3, peak_penalty=0.0, example_inputs=(torch.randn(2, 4), 0))
