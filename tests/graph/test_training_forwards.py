"""What a forward does in training only: heads, features and calls that evaluation does not return, or does not make."""
from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_kernels as dk
from demp_kernels.graph import UnitGraph


class Heads(nn.Module):
    """Two heads, of which evaluation returns one. way: how the code says that."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.fc, self.act, self.head = nn.Linear(6, 8), dk.DemPReLU(), nn.Linear(8, 3)
        self.aux = None if way == "features" else nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.fc(x))
        if self.way == "features":
            return (self.head(h), h) if self.training else self.head(h)
        if self.way == "a list":
            found = [self.aux(h), self.head(h)]
            return found if self.training else found[-1]
        y, a = self.head(h), self.aux(h)
        return (y, a) if self.training else y


@pytest.mark.parametrize("way", ["computed in vain", "a list"])
def test_a_head_that_evaluation_computes_in_vain_keeps_its_outputs(way: str) -> None:
    torch.manual_seed(0)
    model, x = Heads(way), torch.randn(4, 6)
    with torch.no_grad():
        model.fc.weight[2:5], model.fc.bias[2:5] = 0, -1
    before = model(x)
    report = dk.compact(model, None, x, dead={"act": (torch.arange(8) >= 2) & (torch.arange(8) < 5)})
    assert report.removed == {"act": 3} and model.aux.weight.shape == model.head.weight.shape == (3, 5)
    for new, old in zip(model(x), before):
        torch.testing.assert_close(new, old)


def test_nothing_is_removed_of_a_head_where_nothing_is_dead() -> None:
    model, x = Heads("computed in vain"), torch.randn(4, 6)
    assert not dk.compact(model, None, x, dead={}).changed and model.aux.weight.shape == (3, 8)


def test_features_that_training_returns_keep_their_width() -> None:
    model, x = Heads("features"), torch.randn(4, 6)
    report = dk.compact(model, None, x, dead={"act": torch.arange(8) < 3})
    assert not report.changed and "is an output of the model" in report.kept["act"]
    assert model(x)[1].shape == (4, 8)


class Shared(nn.Module):
    """One activation, whose second call in training is not the second one in evaluation."""

    def __init__(self, width: int, module: bool) -> None:
        super().__init__()
        self.act = dk.DemPReLU() if module else None
        self.a, self.side, self.aux = nn.Linear(6, 16), nn.Linear(16, width), nn.Linear(width, 2)
        self.b, self.out = nn.Linear(16, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Any:
        act = self.act or F.relu
        y = act(self.a(x))
        extra = self.aux(act(self.side(y))) if self.training else None
        y = self.out(act(self.b(y)))
        return (y, extra) if self.training else y


@pytest.mark.parametrize("module", [True, False])
@pytest.mark.parametrize("width", [8, 32])
def test_calls_that_training_makes_in_between_are_not_taken_for_others(width: int, module: bool) -> None:
    torch.manual_seed(0)
    model, x = Shared(width, module), torch.randn(5, 6)
    graph, before = UnitGraph.trace(model, x), model(x)
    name = "act@1" if module else "relu_1"
    dead = {name: torch.arange(graph.units[name]) < 4}
    with torch.no_grad():
        model.b.weight[:4], model.b.bias[:4] = 0, -1
        before = model(x)
    report = dk.compact(model, None, dead=dead, graph=graph)
    assert not report.changed and "is called 2 times in evaluation, 3 in training" in report.kept[name]
    for new, old in zip(model(x), before):
        torch.testing.assert_close(new, old)


def test_a_forward_that_wants_targets_in_training_is_analysed_as_in_evaluation() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act, self.out = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)

        def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            y = self.out(self.act(self.fc(x)))
            return F.mse_loss(y, target) if self.training else y

    model = Detector()
    assert dk.compact(model, None, torch.randn(3, 6), dead={"act": torch.arange(8) < 3}).removed == {"act": 3}
    assert model(torch.randn(3, 6), torch.zeros(3, 2)).shape == ()


class Tracker(nn.Module):
    """A childless module that keeps a mean of each channel, in training only."""

    def __init__(self, channels: int, own: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.gain = nn.Parameter(torch.ones(channels)) if own else None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return x if self.gain is None else x * self.gain
        return x


@pytest.mark.parametrize("own", [False, True])
def test_statistics_that_only_training_keeps_stay_as_wide_as_what_they_are_of(own: bool) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Tracker(8, own), nn.Linear(8, 2)), torch.randn(4, 6)
    before = [b.clone() for b in model.buffers()]
    report = dk.compact(model, None, x, dead={"1": torch.arange(8) < 3})
    assert torch.equal(*before, *model.buffers()), "the analysis computes nothing"
    assert model.train()(x).shape == (4, 2) and model[2].mean.numel() == model[0].out_features
    assert not report.changed and "lerp_" in report.kept["1"]


def test_a_buffer_that_nothing_reads_keeps_nothing() -> None:
    class Noted(nn.Sequential):
        """Not one of torch's modules, with a buffer of its own."""

    model, x = Noted(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 6)
    model.register_buffer("note", torch.zeros(8))
    assert dk.compact(model, None, x, dead={"1": torch.arange(8) < 3}).removed == {"1": 3}


def test_an_update_in_place_in_evaluation_is_cut_along() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act, self.out = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.fc(x))
            self.mean.mul_(0.9).add_(y.detach().mean(0))
            return self.out(y)

    model, x = Scaled(), torch.randn(4, 6)
    assert dk.compact(model, None, x, dead={"act": torch.arange(8) < 3}).removed == {"act": 3}
    assert model(x).shape == (4, 2) and model.mean.shape == (5,)


def test_equally_many_calls_on_other_units_are_not_taken_for_the_same() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = dk.DemPReLU()
            self.a, self.b, self.c, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.a(x))
            return self.out(self.act(self.c(y) if self.training else self.b(y)))

    model, x = Swapped(), torch.randn(4, 6)
    report = dk.compact(model, None, x, dead={"act@1": torch.arange(8) < 3})
    assert not report.changed and "is called behind other layers in training" in report.kept["act@1"]


def test_one_call_behind_another_layer_is_not_taken_for_the_same() -> None:
    """Counted is what training runs: a unit that never fires there may well in evaluation."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.a, self.b, self.out = dk.DemPReLU(), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.act(self.a(x) if self.training else self.b(x)))

    model, x = Branches(), torch.randn(16, 6)
    with torch.no_grad():
        model.a.bias[:3] = -100
    model(x)
    expected = model.eval()(x)
    report = dk.compact(model, None, x)
    assert not report.removed and "is called behind other layers in training" in report.kept["act"]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("way", ["dropout", "noise", "none"])
def test_what_only_training_puts_in_front_of_an_activation_keeps_nothing(way: str) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act, self.out = nn.Linear(6, 8), dk.DemPReLU(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            if self.training and way != "none":
                y = F.dropout(y, 0.5) if way == "dropout" else y + torch.randn_like(y)
            return self.out(self.act(y))

    model, x = Noisy(), torch.randn(4, 6)
    assert dk.compact(model, None, x, dead={"act": torch.arange(8) < 3}).removed == {"act": 3}


class Written(nn.Module):
    """What only training does depends on the width: a number in a view, a size as a number, a weight as a value."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.act, self.head, self.aux = nn.Conv2d(3, 8, 1), dk.DemPReLU(), nn.Conv2d(8, 2, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.conv(x))
        y = self.head(h)
        if not self.training:
            return y
        if self.way == "view":
            return y, self.aux(F.adaptive_avg_pool2d(h, 1).view(-1, 8))
        pooled = self.aux(h.mean((2, 3)))
        return y, pooled, h.sum(1) / h.shape[1] if self.way == "size" else self.conv.weight.sum()


@pytest.mark.parametrize("way", ["view", "size", "weight"])
def test_what_training_alone_writes_down_is_kept(way: str) -> None:
    torch.manual_seed(0)
    model, x = Written(way), torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        model.conv.weight[2:5], model.conv.bias[2:5] = 1.0, -100
    before = model(x)
    report = dk.compact(model, None, x, dead={"act": (torch.arange(8) >= 2) & (torch.arange(8) < 5)})
    assert not report.removed
    for new, old in zip(model(x), before):
        torch.testing.assert_close(new, old)


def test_a_weight_that_a_layer_and_a_sum_read_is_kept() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(6, 8), dk.DemPReLU(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fc2(self.act(self.fc1(x)))
            return y, self.fc1.weight.sum()

    report = dk.compact(Norm(), None, torch.randn(2, 6), dead={"act": torch.arange(8) < 3})
    assert not report.removed and "parameter fc1.weight is used in two ways" in str(report.kept)


def test_numbers_that_training_draws_are_no_sizes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(6, 8), dk.DemPReLU(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.fc1(x))
            if self.training:
                share = random.random()
                h = share * h + (1 - share) * h.flip(0) * np.random.rand()
            return self.fc2(h)

    random.seed(0)
    before = random.getstate()
    graph = UnitGraph.trace(Mixed(), torch.randn(4, 6))
    assert graph.proved and not graph.is_pinned[graph.axes["fc1.weight", 0]].any()
    assert random.getstate() == before
