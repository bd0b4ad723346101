"""`shrink_to`: a dense model and a plain state_dict give the compacted model; what the state_dict does not tell is refused."""
from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import demp_kernels as dk
from demp_kernels.compaction.shrink import _in_order


class Residual(nn.Module):
    """A stem, two residual blocks with identity skips (one behind the other), a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        for block in (1, 2):
            self.add_module(f"conv{block}a", nn.Conv2d(8, 6, 3, padding=1))
            self.add_module(f"norm{block}a", nn.BatchNorm2d(6))
            self.add_module(f"conv{block}b", nn.Conv2d(6, 8, 3, padding=1))
            self.add_module(f"norm{block}b", nn.BatchNorm2d(8))
        self.head = nn.Linear(8 * 9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norm1b(self.conv1b(F.relu(self.norm1a(self.conv1a(x))))) + x)
        x = F.relu(self.norm2b(self.conv2b(F.relu(self.norm2a(self.conv2a(x))))) + x)
        return self.head(x.flatten(1))


def built(make: Any, x: torch.Tensor) -> Any:
    torch.manual_seed(0)
    return dk.prepare(make(), x)


def compacted(model: Any, x: torch.Tensor, rounds: int = 2) -> Any:
    """With a third of the units of every activation gone, in two rounds, so that selections change twice."""
    chance = torch.Generator().manual_seed(3)
    graph = dk.UnitGraph.trace(model, x)
    for _ in range(rounds):
        dead = {name: torch.rand(units, generator=chance) < 0.25 for name, units in graph.units.items()}
        dk.compact(model, dead=dead, graph=graph)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=chance) - (0.5 if tensor.dim() > 1 else 0)
            tensor.copy_(noise / max(1, tensor[:1].numel()) ** 0.5)
    return model


NETS: list[tuple[Any, tuple[int, ...]]] = [
    (Residual, (2, 2, 3, 3)),
    (lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 2)), (2, 5)),
    (lambda: nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Flatten(),
                           nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 3)), (2, 2, 4, 4)),
]


@pytest.mark.parametrize(("make", "shape"), NETS, ids=["residual", "mlp", "depthwise"])
def test_a_plain_state_dict_is_enough(make: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    small = compacted(built(make, x), x)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in built(make, x).parameters())
    fresh = built(make, x)
    parameters = [id(p) for p in fresh.parameters()]
    graph = dk.shrink_to(fresh, small.state_dict())
    assert [id(p) for p in fresh.parameters()] == parameters
    for training in (True, False):
        assert torch.equal(fresh.train(training)(x), small.train(training)(x))
    torch.testing.assert_close(fresh.state_dict(), small.state_dict(), rtol=0, atol=0)

    # it goes on as any compacted model: removed are units that are zero, and the function stays
    removals = [dk.compact(fresh, dead={n: torch.arange(u) < 1}, graph=graph) for n, u in graph.units.items() if u > 1]
    assert any(removal.changed for removal in removals) and fresh(x).shape == small(x).shape


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models", exc_type=Exception)
    x = torch.randn(2, 3, 64, 64)

    def make() -> nn.Module:
        model = models.get_model(name, weights=None, num_classes=5)
        if name == "mobilenet_v2":  # its ReLU6 are none of the activations that count
            for module in list(model.modules()):
                for key, child in list(module.named_children()):
                    if isinstance(child, nn.ReLU6):
                        setattr(module, key, nn.ReLU())
        return model

    small = compacted(built(make, x), x, rounds=1).eval()
    fresh = built(make, x).eval()
    dk.shrink_to(fresh, small.state_dict())
    assert small(x).isfinite().all() and torch.equal(fresh(x), small(x))


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_torchvision_state_dicts_load_into_prepared_models(name: str) -> None:
    models = pytest.importorskip("torchvision.models", exc_type=Exception)
    pretrained = models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    prepared = dk.prepare(models.get_model(name, weights=None).eval(), x)
    prepared.load_state_dict(pretrained.state_dict())
    with torch.no_grad():
        assert pretrained(x).isfinite().all() and torch.equal(prepared(x), pretrained(x))


def test_a_dense_state_dict_changes_no_width() -> None:
    x = torch.randn(2, 2, 3, 3)
    one, two = built(Residual, x), built(Residual, x)
    dk.shrink_to(two, one.state_dict())
    assert two.stem.weight.shape[0] == 8 and two.norm1b.add.channels is None


def test_selections_follow_a_loaded_state_dict() -> None:
    x = torch.randn(2, 2, 3, 3)
    small = compacted(built(Residual, x), x)
    other = copy.deepcopy(small)
    state = small.state_dict()
    key = "norm1b.add.channels"
    swapped = state[key].flip(0)  # as many channels of each, other ones
    assert not torch.equal(swapped, state[key])
    other.load_state_dict({**state, key: swapped})
    assert not torch.equal(other.norm1b.add.index, small.norm1b.add.index)
    other.load_state_dict(state)
    assert torch.equal(other.norm1b.add.index, small.norm1b.add.index)
    assert torch.equal(other.eval()(x), small.eval()(x))


@pytest.mark.parametrize(
    ("axis", "told"),
    [
        ([1, 2, 3, 5, 6, 7], True),
        ([5, 6, 7, 1, 2, 3, 1, 2, 3], True),
        ([1, 1, 2, 2, 3, 3, 5], True),
        ([1, 5, 2, 6, 3, 7], False),  # alternating: where the kept ones of 1, 2, 3 stand depends on which they are
        ([3, 2, 1, 5, 6, 7], False),
    ],
)
def test_units_whose_places_the_shapes_do_not_tell(axis: list[int], told: bool) -> None:
    members = [np.array([1, 2, 3]), np.array([5, 6, 7])]
    assert _in_order(np.array(axis), members, partly={1, 2, 3}) is told


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("norm1b.add.channels"), "does not fit the other tensors"),
        (lambda s: s.pop("head.bias"), "must have head.bias, a tensor of 1 dimensions or more"),
        (lambda s: s.update(other=torch.zeros(1)), "other is in only one of them"),
        (lambda s: s.update({"stem.weight": torch.zeros(20, 2, 3, 3)}), "stem.weight of the state_dict has 20 entries"),
        (lambda s: s.update({"head.weight": s["head.weight"][:, :-1]}), "must have a multiple of 9|does not fit"),
        (lambda s: s.update({"conv1a.weight": 3}), "must have conv1a.weight, a tensor of"),
        (lambda s: s.update({"norm1b.add.channels": torch.ones(3)}), "must be a uint8 tensor of 8 entries"),
    ],
)
def test_another_state_dict_changes_nothing(change: Any, text: str) -> None:
    x = torch.randn(2, 2, 3, 3)
    state = dict(compacted(built(Residual, x), x).state_dict())
    change(state)
    fresh = built(Residual, x)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(dk.CompactionError, match=text):
        dk.shrink_to(fresh, state)
    torch.testing.assert_close(fresh.state_dict(), before, rtol=0, atol=0)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        dk.shrink_to("resnet18", {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state_dict must be a mapping of tensors, got list"):
        dk.shrink_to(nn.Linear(2, 2), [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="example_inputs is required"):
        dk.shrink_to(nn.Linear(2, 2), {})
