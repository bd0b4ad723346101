"""Activations that are called at several places, and looked at on several ranks and devices: no live unit is taken for dead."""
from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import demp_kernels as dk
from demp_kernels.graph import UnitGraph
from demp_kernels.training.liveness import scan_dead

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """One activation behind each of several layers of these widths, under one name or, in a Sequential, under several."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.act = dk.DemPReLU()
        sizes = (6, *widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, widths))
        self.out = nn.Linear(widths[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        return self.out(x)


def several_names(widths: tuple[int, ...]) -> nn.Sequential:
    chain = Chain(widths)
    return nn.Sequential(*[m for layer in chain.layers for m in (layer, chain.act)], chain.out)


def silence(layer: nn.Linear, units: slice) -> None:
    with torch.no_grad():
        layer.weight[units], layer.bias[units] = 0, -1


def controller(model: nn.Module, **options: object) -> dk.DemP:
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    settings = {"total_steps": 4, "peak_penalty": 0.0, "peak_noise": 1e-3, "prune_every": 4, "example_inputs": X}
    return dk.DemP(model, optimizer, **settings | options)


def steps(model: nn.Module, demp: dk.DemP, inputs: list[Tensor]) -> dk.CompactionReport:
    report = None
    for x in inputs:
        model(x).sum().backward()
        report = demp.step()
    return report


def test_units_that_are_dead_in_every_call_go() -> None:
    torch.manual_seed(0)
    model = Chain((8, 8))
    for layer in model.layers:
        silence(layer, slice(0, 3))
    with torch.no_grad():
        model.layers[1].bias[3:] = 1.0
    silence(model.layers[0], slice(3, 5))  # dead in one of the calls only
    demp = controller(model, peak_noise=0.0)
    before = model.eval()(X)
    report = steps(model.train(), demp, [X] * 4)
    assert report.removed == {"act@0": 3, "act@1": 3}
    torch.testing.assert_close(model.eval()(X), before)


def test_noise_leaves_the_rows_of_units_alone_that_are_silent_in_every_call() -> None:
    model = Chain((8, 8))
    for layer in model.layers:
        silence(layer, slice(0, 3))
    rows = [layer.weight.detach().clone() for layer in model.layers]
    steps(model, controller(model, prune_every=100, total_steps=100), [X] * 4)
    for layer, before in zip(model.layers, rows):
        assert torch.equal(layer.weight[:3], before[:3]) and not torch.equal(layer.weight[3:], before[3:])


@pytest.mark.parametrize("widths", [(12, 8, 12), (12, 8)])
@pytest.mark.parametrize("make", [Chain, several_names])
def test_calls_of_several_widths_count_as_live(make: type, widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = make(widths)
    asleep = -torch.ones_like(X)  # in the last batches nothing at all is active in the layers behind
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        first.weight.abs_()
        first.bias.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        demp = controller(model)
    report = steps(model, demp, [X.abs(), asleep, asleep, asleep])
    assert not report.changed and demp.live_units == demp.total_units
    assert dk.compact(model, None, X).removed == {}


def test_several_widths_are_said_and_prepare_mends_it() -> None:
    with pytest.warns(UserWarning, match=r"act is called with 12, 8 units.*prepare\(model, example_inputs\)"):
        controller(Chain((12, 8)))
    model = dk.prepare(Chain((12, 8)), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        demp = controller(model)
    with torch.no_grad():
        model.get_submodule("layers.1").bias.fill_(1.0)
    silence(model.get_submodule("layers.1"), slice(0, 2))
    assert [n for name, n in steps(model, demp, [X] * 4).removed.items() if demp.total_units[name] == 8] == [2]


@pytest.mark.parametrize("make", [Chain, several_names])
def test_a_scan_tells_calls_of_several_widths_apart(make: type) -> None:
    torch.manual_seed(0)
    model = make((12, 8, 12))
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    silence(layers[0], slice(0, 2))
    silence(layers[1], slice(0, 3))
    silence(layers[2], slice(5, 9))
    graph = UnitGraph.trace(model, X)
    dead = scan_dead(model, graph, [X, (X + 1,)])
    plain = [torch.relu(layers[0](torch.cat([X, X + 1])))]
    for layer in layers[1:3]:
        plain.append(torch.relu(layer(plain[-1])))
    for mask, values in zip((dead[name] for name in graph.units), plain):
        assert torch.equal(mask, (values <= 0).all(0)) and mask.any() and not mask.all()


def test_a_generator_of_scan_batches_serves_every_look() -> None:
    def batches() -> Iterator[Tensor]:
        yield X
        yield X + 1

    model = dk.prepare(Chain((8, 8)), X)
    demp = controller(model, criterion="scan", scan_batches=batches(), prune_every=1)
    silence(model.get_submodule("layers.0"), slice(0, 2))
    assert steps(model, demp, [X] * 4) is not None and demp.live_units != demp.total_units


def test_a_scan_looks_at_a_model_whose_evaluation_was_compiled_before() -> None:
    torch.manual_seed(0)
    model = dk.prepare(Chain((8, 8)), X)
    silence(model.get_submodule("layers.0"), slice(0, 3))
    model.compile(backend="eager")
    with torch.no_grad():
        model.eval()(X)
    dead = scan_dead(model.train(), UnitGraph.trace(model, X), [X])
    assert len(dead) == 2 and next(iter(dead.values()))[:3].all()


def test_counters_follow_their_activation_to_another_device() -> None:
    act = dk.DemPReLU()
    act(torch.ones(3, 4))
    assert [c.device.type for c in act._counters(4, torch.device("meta"))] == ["meta", "meta"] and not act.mixed


def test_followers_are_looked_at_at_once() -> None:
    model = dk.prepare(Chain((8, 8)), X)
    with pytest.raises(ValueError, match=r"followers\[0\] must be a copy of the model: out.weight is \(2, 8\) in the model, missing"):
        controller(model, followers=nn.Linear(3, 3))
    averaged = torch.optim.swa_utils.AveragedModel(torch.compile(model, backend="eager"))
    demp = controller(model, followers=averaged)
    silence(model.get_submodule("layers.0"), slice(0, 3))
    assert steps(model, demp, [X] * 4).changed
    assert [p.shape for p in averaged.parameters()] == [p.shape for p in model.parameters()]


def test_the_steering_leaves_min_units_alone() -> None:
    torch.manual_seed(0)
    model = dk.prepare(nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2)), X)
    steering = dk.Steering(target_flops=0.1, start=0.0, until=0.2, rate=0.5)
    demp = controller(model, total_steps=20, prune_every=5, min_units=20, steering=steering, peak_noise=0.0)
    steps(model, demp, [X] * 20)
    assert list(demp.live_units.values()) == [20] and int((model.get_submodule("1").weight == 0).sum()) == 0


def test_a_scan_of_a_model_that_calls_its_activation_more_often_in_training() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act, self.side, self.out = nn.Linear(6, 16), dk.DemPReLU(), nn.Linear(16, 8), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.fc(x))
            return self.out(y) + self.act(self.side(y)).sum() if self.training else self.out(y)

    model = Head()
    demp = controller(model, criterion="scan", scan_batches=[X, X + 1])
    assert steps(model, demp, [X] * 4) is not None and demp.live_units == demp.total_units
    assert set(scan_dead(model, demp.graph, [X, X + 1])) == {"act@0"}


def test_a_scan_without_anything_to_look_at_finds_nothing() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    assert scan_dead(net, UnitGraph.trace(net, X), [X]) == {}
