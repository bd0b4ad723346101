"""Training goes on as if nothing had been removed."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, inputs, kill, traced
from torch import Tensor, nn

import demp_kernels as dk

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.01),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int, dtype: torch.dtype) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for _ in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=generator).to(dtype)
        y = torch.randint(5, (8,), generator=generator)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.item())
    return losses


def outputs(model: nn.Module, x: Tensor) -> dict[bool, Tensor]:
    """The outputs in training and in evaluation mode; statistics and modes are put back."""
    state = copy.deepcopy(model.state_dict())
    modes = {m: m.training for m in model.modules()}
    found = {}
    with torch.no_grad():
        for mode in (True, False):
            model.train(mode)
            found[mode] = model(x)
            model.load_state_dict(state)
    for m, mode in modes.items():
        m.training = mode
    return found


def pair(name: str, optimizer: str, dtype: torch.dtype) -> tuple:
    """A trained model with dead units, and its copy with an optimiser in the same state."""
    torch.manual_seed(0)
    model = NETS[name]().to(dtype)
    graph = traced(name, dtype)
    dead = kill(model, graph)
    opt = OPTIMIZERS[optimizer](model.parameters())
    train(model, opt, 3, 1, dtype)
    twin = copy.deepcopy(model)
    twin_opt = OPTIMIZERS[optimizer](twin.parameters())
    twin_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    return model, opt, graph, dead, twin, twin_opt


# One chain and one residual network are enough for the other optimisers.
CASES = [(n, o) for n in NETS for o in OPTIMIZERS if o in ("adamw", "sgd") or n in ("chain", "basic")]


@pytest.mark.parametrize("name, optimizer", CASES)
def test_losses_agree_on_every_step(name: str, optimizer: str) -> None:
    model, opt, graph, dead, twin, twin_opt = pair(name, optimizer, torch.float64)
    x = inputs(dtype=torch.float64)
    before = outputs(model, x)
    report = dk.compact(model, opt, dead=dead, graph=graph)
    assert report.changed and sum(report.removed.values()) >= 0.3 * sum(int(m.sum()) for m in dead.values())
    after = outputs(model, x)
    for mode in (True, False):
        torch.testing.assert_close(after[mode], before[mode], rtol=0, atol=1e-9)
    expected = train(twin, twin_opt, 8, 2, torch.float64)
    assert train(model, opt, 8, 2, torch.float64) == pytest.approx(expected, rel=0, abs=1e-8)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_losses_agree_in_single_precision(name: str, optimizer: str) -> None:
    model, opt, graph, dead, twin, twin_opt = pair(name, optimizer, torch.float32)
    x = inputs()
    before = outputs(model, x)
    dk.compact(model, opt, dead=dead, graph=graph)
    after = outputs(model, x)
    for mode in (True, False):
        torch.testing.assert_close(after[mode], before[mode], rtol=0, atol=1e-6)
    expected = train(twin, twin_opt, 6, 2, torch.float32)
    assert train(model, opt, 6, 2, torch.float32) == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_three_compactions_in_a_row(name: str) -> None:
    model, opt, graph, dead, twin, twin_opt = pair(name, "adamw", torch.float64)
    for step in range(3):
        # a third of what is dead goes each time, some units of every layer die in between
        ids = {key: torch.from_numpy(value) for key, value in graph.unit_ids.items()}
        now = {key: mask[ids[key]] & (ids[key] % 3 == step) for key, mask in dead.items()}
        report = dk.compact(model, opt, dead=now, graph=graph)
        assert report.changed
        expected = train(twin, twin_opt, 3, step, torch.float64)
        assert train(model, opt, 3, step, torch.float64) == pytest.approx(expected, rel=0, abs=1e-8)
    retraced = dk.UnitGraph.trace(model, inputs(dtype=torch.float64))
    assert retraced.units == graph.units and retraced.gates == graph.gates


def test_counters_say_what_is_dead() -> None:
    model, opt, graph, dead, twin, twin_opt = pair("basic", "adamw", torch.float64)
    for module in model.modules():
        if isinstance(module, dk.DemPActivation):
            module.reset_counts()
    train(model, opt, 1, 3, torch.float64)
    train(twin, twin_opt, 1, 3, torch.float64)
    report = dk.compact(model, opt, inputs(dtype=torch.float64))
    for name, mask in dead.items():
        assert report.live_units[name] <= int((~mask).sum()) or "oneDNN" in report.kept[name]
        module = model.get_submodule(name)
        assert module.active.numel() == report.live_units[name] == report.total_units[name] - report.removed.get(name, 0)
        assert bool((module.active > 0).all()) or name in report.kept
    assert train(model, opt, 3, 4, torch.float64) == pytest.approx(train(twin, twin_opt, 3, 4, torch.float64), abs=1e-8)


def test_a_loss_of_the_step_before_may_still_be_referenced() -> None:
    model, opt, graph, dead, _, _ = pair("chain", "adamw", torch.float32)
    calls: list[tuple] = []
    weight = model[0].weight
    weight.register_hook(lambda g: calls.append(("tensor", tuple(g.shape))))
    weight.register_post_accumulate_grad_hook(lambda p: calls.append(("accumulated", tuple(p.grad.shape))))
    loss = model(inputs()).square().mean()
    loss.backward()
    kept_loss = loss
    dk.compact(model, opt, dead=dead, graph=graph)
    loss = model(inputs()).square().mean()
    loss.backward()
    assert kept_loss is not loss
    shape = tuple(weight.shape)
    assert calls[-2:] == [("tensor", shape), ("accumulated", shape)] and len(calls) == 4
    opt.step()
