"""Recycled units: the function stays, nothing else moves, and the units learn again."""
from __future__ import annotations

import copy

import pytest
import torch
from nets import Chain, ResNet, inputs, kill, traced
from test_refusals import same, snapshot
from torch import nn

import demp_kernels as dk
from demp_kernels.compaction import recycle


def trained(net: str = "chain") -> tuple:
    torch.manual_seed(0)
    model = Chain() if net == "chain" else ResNet(net)
    graph = traced(net)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, amsgrad=True)
    dead = kill(model, graph)
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs()).square().mean().backward()
        optimizer.step()
    return model, optimizer, graph, dead


@pytest.mark.parametrize("net", ["chain", "basic", "bottleneck"])
def test_the_function_does_not_change_and_live_units_are_untouched(net: str) -> None:
    model, optimizer, graph, dead = trained(net)
    model.eval()
    x = inputs()
    out, rng = model(x).detach(), torch.get_rng_state()
    whole = copy.deepcopy(model)
    counts = recycle(model, optimizer, graph, dead)
    assert counts and all(0 < n <= int(dead[name].sum()) for name, n in counts.items())
    assert torch.equal(rng, torch.get_rng_state())
    torch.testing.assert_close(model(x), out, rtol=0, atol=1e-6)
    left = graph.keep(dead, min_units=0)
    masks = graph.keep_masks(left)
    for name, old in whole.named_parameters():
        new = model.get_parameter(name)
        stays = torch.ones_like(old, dtype=torch.bool)
        for dim in range(old.dim()):
            if (name, dim) in masks:
                shape = [1] * old.dim()
                shape[dim] = -1
                stays &= masks[name, dim].view(shape)
        assert torch.equal(new[stays], old[stays]), name


def test_rows_start_anew_columns_and_moments_are_zero() -> None:
    model, optimizer, graph, dead = trained()
    recycle(model, optimizer, graph, dead)
    gone = dead["2"]
    incoming, norm, outgoing = model[0].weight, model[1], model[4].weight
    assert incoming[gone].abs().max() < 1 and incoming[gone].std() > 0.01 and model[0].bias is None
    assert (norm.weight[gone] == 1).all() and (norm.bias[gone] == 0).all()
    assert (norm.running_mean[gone] == 0).all() and (norm.running_var[gone] == 1).all()
    assert (outgoing[:, gone] == 0).all() and (outgoing[:, ~gone] != 0).any()
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert (optimizer.state[incoming][key][gone] == 0).all() and (optimizer.state[incoming][key][~gone] != 0).any()
        assert (optimizer.state[outgoing][key][:, gone] == 0).all()
    assert float(optimizer.state[incoming]["step"]) == 2


def test_units_learn_again() -> None:
    model, optimizer, graph, dead = trained()
    recycle(model, optimizer, graph, dead)
    gone, incoming, outgoing = dead["2"], model[0].weight, model[4].weight
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs(64)).square().mean().backward()
        optimizer.step()
    assert (outgoing[:, gone] != 0).any() and (incoming.grad[gone] != 0).any()


def test_the_seed_decides() -> None:
    found = []
    for seed in (1, 1, 2):
        model, optimizer, graph, dead = trained()
        recycle(model, optimizer, graph, dead, seed=seed)
        found.append(model[0].weight.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.gpu
def test_state_may_lie_elsewhere_and_no_generator_moves() -> None:
    model, optimizer, graph, dead = trained()
    model.cuda()
    before = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    recycle(model, optimizer, graph, {name: mask.cuda() for name, mask in dead.items()})
    after = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    assert torch.equal(before[0], after[0]) and all(map(torch.equal, before[1], after[1]))
    state = optimizer.state[model[0].weight]["exp_avg"]
    assert state.device.type == "cpu" and (state[dead["2"]] == 0).all() and (state[~dead["2"]] != 0).any()


def test_only_the_generators_of_the_devices_in_use_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed seeds all devices, of which some would not be restored."""
    model, optimizer, graph, dead = trained()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every device"))
    assert recycle(model, optimizer, graph, dead)


def test_state_that_starts_otherwise_is_refused() -> None:
    model, _, graph, dead = trained()
    optimizer = torch.optim.Rprop(model.parameters())
    model(inputs()).sum().backward()
    optimizer.step()
    before = snapshot(model, optimizer)
    with pytest.raises(dk.CompactionError, match="recycle: how the optimiser's state 'prev'|'step_size'"):
        recycle(model, optimizer, graph, dead)
    assert same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("on_dead", ["recycle", "report"])
def test_demp_recycles_or_reports(on_dead: str) -> None:
    torch.manual_seed(0)
    model = dk.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    demp = dk.DemP(model, optimizer, total_steps=4, peak_noise=0.0, peak_penalty=0.0, prune_every=2, on_dead=on_dead)
    with torch.no_grad():
        first = next(model.parameters()), dict(model.named_parameters())["0.bias"]
        first[1][:3] = -1000
    x = torch.randn(16, 6)
    report = None
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        report = demp.step()
    assert report is not None and not report.changed and demp.live_units == demp.total_units
    (count,) = report.recycled.values() if on_dead == "recycle" else report.found.values()
    assert count == 3 and f"{'recycled' if on_dead == 'recycle' else 'found'} 3 dead units" in str(report)
    assert bool((first[1][:3] > -2).all()) == (on_dead == "recycle")
    with pytest.raises(ValueError, match="on_dead must be one of remove, recycle, report, got 'drop'"):
        dk.DemP(model, optimizer, total_steps=4, on_dead="drop")


@pytest.mark.parametrize("way", ["a sum", "a product", "the transposed weight"])
def test_units_that_something_else_than_a_layer_reads_stay_as_they_are(way: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act, self.out = nn.Linear(5, 6), dk.DemPReLU(), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.act(self.fc(x))
            if way == "a sum":
                return self.out(y) + y.sum(1, keepdim=True)
            return y @ y.mT if way == "a product" else torch.nn.functional.linear(y, self.fc.weight.t())

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 5)
    with torch.no_grad():
        model.fc.weight[:3], model.fc.bias[:3] = 0, -1
    before = model(x)
    assert recycle(model, None, dk.UnitGraph.trace(model, x), {"act": torch.arange(6) < 3}) == {}
    assert torch.equal(model(x), before)
