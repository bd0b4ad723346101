"""Closed loop: costs against torch's counter, the budget's curve, the push, the guard, a run that meets its budget."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import demp_kernels as dk
from demp_kernels.graph import UnitGraph
from demp_kernels.recipes.flops import count_flops
from demp_kernels.recipes.models import ResNet18
from demp_kernels.training.budget import flops_cost, lowest_units, parameter_cost, unit_savings


def small(normalised: bool = True) -> Any:
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(12)] if normalised else []
    net = nn.Sequential(nn.Linear(6, 12), *norm, nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    return dk.prepare(net, torch.randn(2, 6))


def run(model: Any, steps: int, optimizer: Any = None, loss: Any = None, **options: Any) -> dk.DemP:
    """Train on four clouds of points; `loss`: step -> what the guard is told."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.02)
    settings = {"total_steps": steps, "peak_penalty": 0.0, "peak_noise": 0.0, "prune_every": 5, "seed": 0} | options
    demp = dk.DemP(model, optimizer, **settings)
    train(model, optimizer, demp, steps, torch.Generator().manual_seed(1), loss)
    return demp


def train(model: Any, optimizer: Any, demp: dk.DemP, steps: int, generator: torch.Generator, loss: Any = None) -> None:
    for _ in range(steps):
        y = torch.randint(3, (32,), generator=generator)
        x = F.one_hot(y, 6).float() + 0.1 * torch.randn(32, 6, generator=generator)
        task = F.cross_entropy(model(x), y)
        task.backward()
        optimizer.step()
        optimizer.zero_grad()
        demp.step(task if loss is None else torch.tensor(loss(demp.steps_done)))


def test_costs_of_widths_are_those_of_the_removed_network() -> None:
    x = torch.randn(1, 1, 8, 8)
    model = dk.prepare(ResNet18(1, 10, 8), torch.randn(2, 1, 8, 8))
    graph = UnitGraph.trace(model, x)
    flops, parameters = flops_cost(model, (x.to("meta"),)), parameter_cost(model)
    assert 2 * flops({}) == count_flops(model, x) and parameters({}) == sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    dead = {name: torch.rand(units, generator=generator) < 0.4 for name, units in graph.units.items()}
    shapes = graph.widths(model, graph.keep(dead).atoms).shapes
    expected = flops(shapes), parameters(shapes)
    dk.compact(model, dead=dead, graph=graph)
    assert expected == (flops({}), parameters({}))
    assert 2 * flops({}) == count_flops(model, x)


@pytest.mark.parametrize("by_flops", [True, False])
@pytest.mark.usefixtures("simd_of_16")
def test_savings_are_those_of_the_removed_units(by_flops: bool) -> None:
    x = torch.randn(1, 1, 8, 8)
    model = dk.prepare(ResNet18(1, 10, 16), torch.randn(2, 1, 8, 8))
    graph = UnitGraph.trace(model, x)
    cost = flops_cost(model, (x,)) if by_flops else parameter_cost(model)
    savings = unit_savings(model, graph, cost)
    # oneDNN#6035: a strided 1x1 convolution reads it, which keeps 16 inputs
    assert [name for name, saved in savings.items() if saved == 0] == ["blocks.1.bn2.act"]
    for name, saved in savings.items():
        smaller, units = copy.deepcopy(model), graph.units[name]
        dk.compact(smaller, dead={name: torch.arange(units) < units // 2}, graph=UnitGraph.trace(smaller, x))
        left = (flops_cost(smaller, (x,)) if by_flops else parameter_cost(smaller))({})
        assert saved == (cost({}) - left) / (units // 2), name


@pytest.mark.usefixtures("simd_of_16")
def test_units_that_must_stay_are_not_pushed() -> None:
    """The outputs of a network, and inputs that a layer needs a number of."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 40, 1, stride=2), nn.BatchNorm2d(40), nn.ReLU()
    )
    x = torch.randn(2, 1, 9, 9)
    model = dk.prepare(net, x)
    graph = UnitGraph.trace(model, x)
    first, last = graph.units
    assert unit_savings(model, graph, parameter_cost(model)) == {first: pytest.approx((9 + 1 + 2 + 40) * 8 / 12), last: 0}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = dk.DemP(model, optimizer, total_steps=10, peak_penalty=0.0, steering=dk.Steering(target_sparsity=0.9))
    assert demp._steerer.scores()[last].isinf().all()
    demp._steerer.choose(10)
    assert {name: int(mask.sum()) for name, mask in demp._steerer.pushed.items()} == {first: 24 - 16, last: 0}


def test_a_score_for_parameters_is_strength_over_place_and_saving() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = dk.DemP(model, optimizer, total_steps=10, peak_penalty=0.0, steering=dk.Steering(target_sparsity=0.5))
    scale = dict(model.named_parameters())["1.weight"]
    with torch.no_grad():
        scale.copy_(torch.tensor([3.0, -2, 1, 0, 4, 5, 6, 7, 8, 9, 10, 11]))
    place = torch.tensor([9, 10, 11, 12, 8, 7, 6, 5, 4, 3, 2, 1])
    rows = dict(model.named_parameters())["3.weight"].detach().abs().sum(1)
    first, second = demp._steerer.scores().values()
    # a unit of the first layer: 6 weights, its bias, scale and offset, 9 weights that read it; of the second: 12, 1, 3
    torch.testing.assert_close(first, scale.detach().abs() * 12 / (place * 18))
    order = rows.argsort(descending=True)
    torch.testing.assert_close(second[order], rows[order] / rows.mean() * 9 / (torch.arange(1, 10) * 16))


def test_a_score_for_operations_is_strength() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = dk.DemP(model, optimizer, total_steps=10, peak_penalty=0.0, steering=dk.Steering(target_flops=0.5))
    scale, rows = (dict(model.named_parameters())[name].detach() for name in ("1.weight", "3.weight"))
    scale.copy_(torch.linspace(-3, 2, 12))
    first, second = demp._steerer.scores().values()
    torch.testing.assert_close(first, scale.abs())
    sizes = rows.abs().sum(1)
    torch.testing.assert_close(second, sizes / sizes.mean())


def test_equal_strengths_leave_shares_by_what_a_unit_costs() -> None:
    """N / k in proportion to c, up to one unit, where no layer is at its floor."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)
    )
    model = dk.prepare(net, torch.randn(2, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = dk.DemP(model, optimizer, total_steps=10, peak_penalty=0.0, steering=dk.Steering(target_sparsity=0.4, floor=0.0))
    demp._steerer.choose(10)
    left = [int((~mask).sum()) for mask in demp._steerer.pushed.values()]
    saved = (8 + 3 + 32, 64 + 3 + 4)
    assert left[0] / 64 < 1 and left[1] / 32 < 1
    assert abs(left[0] / 64 * saved[0] / saved[1] - left[1] / 32) <= 1 / 32


def test_a_floor_holds_in_every_layer() -> None:
    model = small()
    graph = UnitGraph.trace(model, torch.randn(2, 6))
    scores = {name: torch.arange(units) / 100 for name, units in graph.units.items()}
    dead = lowest_units(model, graph, scores, 0, floor=0.5)
    assert [int((~mask).sum()) for mask in dead.values()] == [6, 4]


def test_the_budget_falls_from_all_to_the_target() -> None:
    steering = dk.Steering(target_flops=0.2, start=0.1, until=0.5)
    assert steering.left(0.0) == steering.left(0.1) == 1
    assert steering.left(0.3) == pytest.approx(0.2 + 0.8 * 0.5**3)
    assert steering.left(0.5) == steering.left(1.0) == 0.2
    assert dk.Steering(target_sparsity=0.9).left(1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("what", ["target_flops", "target_sparsity"])
def test_a_run_meets_its_budget(what: str, normalised: bool) -> None:
    model = small(normalised)
    flops, parameters = flops_cost(model, (torch.zeros(1, 6),)), parameter_cost(model)
    before = (flops if what == "target_flops" else parameters)({})
    demp = run(model, 150, steering=dk.Steering(**{what: 0.5}, rate=0.05), min_units=1)
    left = (flops if what == "target_flops" else parameters)({}) / before
    assert 0.25 < left <= 0.5
    assert min(demp.live_units.values()) >= 1
    y = torch.arange(3).repeat(20)
    model.eval()
    assert (model(F.one_hot(y, 6).float()).argmax(1) == y).all()  # and has learnt what there is to learn


def test_a_cost_of_layers_whose_weight_is_computed() -> None:
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 4, 1))
    )
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    assert flops_cost(net, (torch.empty(1, 3, 6, 6, device="meta"),))({}) == 16 * (8 * 27 + 4 * 8)
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_what_no_optimiser_trains_is_neither_pushed_nor_noisy() -> None:
    model = small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    head = [p for name, p in model.named_parameters() if name.startswith("5.")]
    steering = dk.Steering(target_flops=0.5, start=0.0, until=0.1)
    run(model, 10, torch.optim.SGD(head, lr=0.0), total_steps=100, prune_every=1000, peak_noise=0.1, steering=steering)
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), before[name]) != name.startswith("5."), name


def test_only_the_chosen_units_are_pushed() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    demp = run(model, 10, optimizer, total_steps=100, prune_every=1000, steering=dk.Steering(target_flops=0.7, rate=0.01))
    pushed = demp._steerer.pushed
    assert 0 < sum(int(mask.sum()) for mask in pushed.values()) < 21
    for name, p in model.named_parameters():
        activation = demp.graph.gates.get(name)
        changed = (p.detach() != before[name]).flatten(1).any(1) if p.dim() > 1 else p.detach() != before[name]
        assert activation is not None or not changed.any(), name
        if activation is not None:
            # weights in front of a normalisation are left alone: their scale does not matter
            expected = torch.zeros(len(p), dtype=torch.bool) if name == "0.weight" else pushed[activation]
            assert not (changed & ~expected).any(), name
    scale, offset = dict(model.named_parameters())["1.weight"], dict(model.named_parameters())["1.bias"]
    steps = 10 - 5  # from `start` on
    chosen = pushed[demp.graph.gates["1.weight"]]
    if chosen.any():
        assert (scale[chosen] < 1).all() and (scale[chosen] >= 1 - 0.01 * steps - 1e-6).all()
        assert (offset[chosen] <= -0.01 + 1e-6).all()


@pytest.mark.parametrize("normalised", [True, False])
def test_an_offset_falls_faster_when_it_is_late_and_the_strength_is_zero(normalised: bool) -> None:
    model = small(normalised)
    weight, bias = (dict(model.named_parameters())[f"{1 if normalised else 0}.{name}"] for name in ("weight", "bias"))
    with torch.no_grad():
        weight.fill_(1.0)
        weight[0], weight[1] = 0.085, 0.0  # zero with the ninth step, from the first one on
        bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    steering = dk.Steering(target_flops=0.5, rate=0.01, start=0.0, until=0.5)
    steerer = dk.DemP(model, optimizer, total_steps=10, peak_penalty=0.0, steering=steering)._steerer
    pushed = {name: torch.arange(units) < 3 for name, units in steerer.graph.units.items()}
    steerer.choose = lambda step: None
    steerer.pushed = pushed
    steerer._plan_pushes()
    for step in range(1, 12):
        steerer.step(step, None)
    # six steps too late: the first unit's strength is zero in three of them, the second's in all, the third's in none
    expected = [-0.01 * (5 + 3 + 5 * 3), -0.01 * (5 + 5 * 6), -0.01 * 11, 0.0]
    torch.testing.assert_close(bias[:4].detach(), torch.tensor(expected))


def test_the_guard_rests_while_the_loss_is_high() -> None:
    def pushed_by(loss: Any) -> float:
        model = small()
        run(model, 40, torch.optim.SGD(model.parameters(), lr=0.0), loss, prune_every=1000,
            steering=dk.Steering(target_flops=0.5))
        return sum((1 - m.weight).sum().item() for m in model.modules() if isinstance(m, nn.BatchNorm1d))

    free = pushed_by(lambda step: 1.0)
    assert free > 0.5
    assert pushed_by(lambda step: 1.0 if step == 0 else 9.0) == 0
    rested = pushed_by(lambda step: 1.0 if step < 20 else 90.0)
    assert 0 < rested < free
    # a step that a GradScaler skips has a loss that says nothing, be it the first one
    for wrong in (float("inf"), float("nan")):
        assert pushed_by(lambda step: wrong if step in (0, 5, 15) else 1.0) == free
        assert pushed_by(lambda step: wrong if step in (0, 5, 15) else 1.0 if step < 20 else 90.0) == rested


@pytest.mark.parametrize("stop", [17, 40])
def test_a_checkpoint_continues_bit_for_bit(stop: int, tmp_path: Path) -> None:
    def start() -> tuple[Any, Any, dk.DemP]:
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        return model, optimizer, dk.DemP(
            model, optimizer, total_steps=60, peak_penalty=0.0, prune_every=5, seed=0,
            steering=dk.Steering(target_flops=0.4, rate=0.05),
        )

    whole, generator = start(), torch.Generator().manual_seed(1)
    train(*whole, stop, generator)
    dk.save_checkpoint(tmp_path / "run.pt", *whole)
    state = generator.get_state()
    train(*whole, 60 - stop, generator)
    resumed = start()
    dk.load_checkpoint(tmp_path / "run.pt", *resumed)
    train(*resumed, 60 - stop, generator.set_state(state))
    assert resumed[2].live_units == whole[2].live_units
    for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "one of target_flops and target_sparsity"),
        ({"target_flops": 0.5, "target_sparsity": 0.5}, "one of target_flops and target_sparsity"),
        ({"target_flops": 1.0}, "target_flops must be above 0 and below 1, got 1.0"),
        ({"target_sparsity": 0.0}, "target_sparsity must be above 0 and below 1, got 0.0"),
        ({"target_flops": 0.5, "rate": 0.0}, "rate must be above 0"),
        ({"target_flops": 0.5, "start": 0.5, "until": 0.4}, "start < until"),
        ({"target_flops": 0.5, "floor": 1.0}, "floor must be"),
        ({"target_flops": 0.5, "tolerance": 0.0}, "tolerance must be"),
    ],
)
def test_wrong_steering(options: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dk.Steering(**options)
