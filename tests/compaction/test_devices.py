"""Parts of a model on several devices. The meta device stands in for the second one: it has no values, but the ops refuse
indices of another device there as everywhere."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import demp_kernels as dk
from demp_kernels import UnitGraph
from demp_kernels.training.noise import noise_on_live
from demp_kernels.training.penalty import PENALTY_NORMS, add_penalty_gradient, penalised_parameters, penalty_value


class Halves(nn.Module):
    """A stem on one device; on another a residual block and a grouped convolution, a transposed one, and a head."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.second = torch.device(second)
        self.stem = nn.Conv2d(2, 12, 3, padding=1).to(first)
        self.conv, self.norm = nn.Conv2d(12, 12, 3, padding=1).to(second), nn.BatchNorm2d(12).to(second)
        self.grouped, self.up = nn.Conv2d(12, 12, 3, padding=1, groups=2).to(second), nn.ConvTranspose2d(12, 8, 2, 2).to(second)
        self.head = nn.Conv2d(8, 3, 1).to(second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x).to(self.second))
        x = F.relu(self.norm(self.conv(x)) + x)
        return self.head(F.relu(self.up(F.relu(self.grouped(x)))))


def built(first: str, second: str) -> tuple[Any, UnitGraph, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = dk.prepare(Halves(first, second), torch.empty(2, 2, 6, 6, device=first))
    graph = UnitGraph.trace(model, torch.empty(2, 2, 6, 6, device=first))
    dead = {name: torch.arange(units) % (number + 2) == 0 for number, (name, units) in enumerate(graph.units.items())}
    return model, graph, dead


def with_state(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


@pytest.mark.parametrize(("first", "second"), [("cpu", "meta"), ("meta", "cpu"), ("meta", "meta")])
def test_every_tensor_shrinks_where_it_is(first: str, second: str) -> None:
    expected, graph, dead = built("cpu", "cpu")
    report = dk.compact(expected, with_state(expected), dead=dead, graph=graph)
    assert expected.norm.add.index is not None, "the skip has other channels than the sum"

    model, graph, dead = built(first, second)
    devices = {name: t.device for name, t in [*model.named_parameters(), *model.named_buffers()]}
    optimizer = with_state(model)
    assert dk.compact(model, optimizer, dead=dead, graph=graph).live_units == report.live_units
    assert {name: t.shape for name, t in model.state_dict().items()} == {name: t.shape for name, t in expected.state_dict().items()}
    for name, p in model.named_parameters():
        for tensor in (p, p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]):
            assert tensor.device == devices[name] and tensor.shape == p.shape
    assert all(t.device == devices[name] for name, t in model.named_buffers() if name in devices)
    torch.testing.assert_close(model.norm.add.index, expected.norm.add.index)  # on the CPU even if the operands are on meta
    assert graph.proved and {s.device.type for s in graph.selections} == {second}


def test_a_selection_is_where_its_operands_are() -> None:
    """Not on the first device of the model, unless all of it has moved since the analysis."""
    _, graph, _ = built("cpu", "meta")
    two, one = Halves("cpu", "meta"), Halves("cpu", "cpu")
    assert [(s.device_in(two).type, s.device_in(one).type) for s in graph.selections] == [("meta", "cpu")]


def test_state_that_was_moved_elsewhere_shrinks_there() -> None:
    model, graph, dead = built("cpu", "cpu")
    optimizer = with_state(model)
    for p, state in optimizer.state.items():
        state["exp_avg"] = torch.empty_like(p, device="meta")
    dk.compact(model, optimizer, dead=dead, graph=graph)
    for p, state in optimizer.state.items():
        assert state["exp_avg"].is_meta and state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape


def test_a_selection_without_values_is_refused_before_anything_changes() -> None:
    model, graph, dead = built("cpu", "cpu")
    dk.compact(model, None, dead=dead, graph=graph)
    model.to("meta")
    before = {name: t.shape for name, t in model.state_dict().items()}
    dead = {name: torch.arange(units) < 2 for name, units in graph.units.items()}
    with pytest.raises(dk.CompactionError, match="norm.add must know which channels it has, but these are on the meta device"):
        dk.compact(model, None, dead=dead, graph=graph)
    assert {name: t.shape for name, t in model.state_dict().items()} == before


def test_penalty_and_noise_reach_every_device() -> None:
    """The rows of dead units are left alone wherever they are, and the first device gets the noise that it would get alone."""
    alone, _, _ = built("cpu", "cpu")
    model, graph, _ = built("cpu", "meta")
    parts = [(name, p) for name, p in model.named_parameters() if not p.is_meta]
    assert 0 < len(parts) < len(list(model.parameters()))
    for name, p in alone.named_parameters():
        p.requires_grad_(any(name == other for other, _ in parts))
    live = {name: torch.arange(units) % 2 == 0 for name, units in graph.units.items()}
    before = {name: p.detach().clone() for name, p in parts}
    seed = torch.tensor([5])
    trained = {id(p) for net in (model, alone) for p in net.parameters()}
    noise_on_live(model, live, graph.gates, 0.1, seed, trained)
    noise_on_live(alone, live, graph.gates, 0.1, seed, trained)
    for name, p in parts:
        torch.testing.assert_close(p, alone.get_parameter(name), rtol=0, atol=0)
        moved = (p != before[name]).flatten(1).any(1) if p.dim() > 1 else p != before[name]
        assert torch.equal(moved, live[graph.gates[name]])
    meta, _, _ = built("meta", "cpu")
    for norm in PENALTY_NORMS:
        value = penalty_value(penalised_parameters(meta, "all"), norm)
        assert value.is_meta and value.shape == ()
        add_penalty_gradient(penalised_parameters(model, "all"), norm, 0.1)
    assert all(p.grad.device == p.device for p in model.parameters())
