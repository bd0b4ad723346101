"""What cannot be done is refused, with the reason, and nothing is changed."""
from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from nets import Chain, inputs
from torch import Tensor, nn

import demp_kernels as dk


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list:
    """Every tensor (object, content, strides), flag and number that a compaction could touch."""
    seen: list = []
    for name, module in model.named_modules():
        seen.append((name, module.training, id(module), [(k, v) for k, v in vars(module).items() if isinstance(v, (int, float, str))]))
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.clone())
                seen.append((name, key, id(tensor), tensor.detach().clone(), tensor.stride(), tensor.requires_grad, grad))
    for optimizer in optimizers:
        for state in optimizer.state.values():
            seen += [(key, v.clone() if isinstance(v, Tensor) else copy.deepcopy(v)) for key, v in state.items()]
    return seen


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(-1), b.view(-1))
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return a == b


class WrittenDown(nn.Module):
    """The number of features is written down in the forward: from the start, or later."""

    def __init__(self, features: int | None = 512) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Linear(8 * 64, 4)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        return self.fc(y.flatten(1) if self.features is None else y.view(-1, self.features))


def adafactor(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=1e-3)


def lbfgs(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=1e-3)


def chain_and(optimizer: Callable) -> tuple:
    torch.manual_seed(0)
    model = Chain()
    opt = optimizer(model.parameters())

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(inputs()).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    return model, opt, {"2": torch.arange(12) < 5}


def written_down_later() -> tuple:
    model = WrittenDown(None)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), {"act": torch.arange(8) < 3}


REFUSED = {
    "adafactor": (lambda: chain_and(adafactor), r"Adafactor's state .* must have the parameter's shape .* got shape"),
    "lbfgs": (lambda: chain_and(lbfgs), r"LBFGS's state .* must have the parameter's shape"),
    "written_down_later": (written_down_later, r"WrittenDown .* cannot run with the planned widths \(conv.weight \(8, 3, 3, 3\) -> \(5,"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_changes_nothing(case: str) -> None:
    make, text = REFUSED[case]
    model, optimizer, dead = make()
    model.train()
    graph = dk.UnitGraph.trace(model, inputs())
    if case == "written_down_later":
        model.features, graph.proved = 512, False
    before, units, rng = snapshot(model, optimizer), graph.units, torch.get_rng_state()
    with pytest.raises(dk.CompactionError, match=text):
        dk.compact(model, optimizer, dead=dead, graph=graph)
    assert same(before, snapshot(model, optimizer))
    assert graph.units == units and torch.equal(rng, torch.get_rng_state())


def test_written_sizes_keep_their_units() -> None:
    model = WrittenDown()
    before = snapshot(model)
    report = dk.compact(model, None, inputs(), dead={"act": torch.arange(8) < 3})
    assert not report.changed and same(before, snapshot(model))
    assert report.kept["act"].startswith("3 dead units: sizes are written down in view.default in the model (test_refusals.py:")


def test_a_model_that_cannot_be_captured_is_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), dk.DemPReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.fc(x)) if float(x.sum()) > 0 else x

    model = Branching()
    before = snapshot(model)
    with pytest.raises(dk.CompactionError, match="torch.export cannot capture Branching"):
        dk.compact(model, None, torch.ones(2, 4), dead={})
    assert same(before, snapshot(model))


BAD_ARGUMENTS = [
    (dict(dead={"nowhere": torch.zeros(12, dtype=torch.bool)}), ValueError, "dead: names must be activations of the model"),
    (dict(dead={"2": torch.zeros(11, dtype=torch.bool)}), ValueError, r"dead\['2'\] must have shape \(12,\), got \(11,\)"),
    (dict(dead={"2": torch.zeros(12)}), TypeError, r"dead\['2'\] must be a bool tensor, got torch.float32"),
    (dict(dead={"2": [True] * 12}), TypeError, r"dead\['2'\] must be a bool tensor, got list"),
    (dict(round_to=0), ValueError, "round_to must be an integer >= 1, got 0"),
    (dict(min_units=1.5), ValueError, "min_units must be an integer >= 1, got 1.5"),
    (dict(optimizer="adam"), TypeError, "optimizer must be a torch.optim.Optimizer, a list of them or None, got str"),
    (dict(model=3), TypeError, "model must be an nn.Module, got int"),
    (dict(example_inputs=None), ValueError, "example_inputs is required for a model that was not made by prepare"),
    (dict(example_inputs=3), TypeError, "example_inputs must be a tensor or a non-empty tuple, got int"),
    (dict(model=nn.Linear(2, 2)), ValueError, "dead is required for a model without DemP activations"),
]


@pytest.mark.parametrize("arguments, kind, text", BAD_ARGUMENTS, ids=[text[:40] for *_, text in BAD_ARGUMENTS])
def test_bad_arguments_are_named(arguments: dict, kind: type, text: str) -> None:
    arguments = {"model": Chain(), "example_inputs": inputs(), **arguments}
    model = arguments["model"]
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(kind, match=text):
        dk.compact(**arguments)
    assert before is None or same(before, snapshot(model))


def test_a_graph_of_another_model_is_refused() -> None:
    graph = dk.UnitGraph.trace(Chain(), inputs())
    model = Chain()
    model[0] = nn.Conv2d(3, 10, 3)
    with pytest.raises(ValueError, match="graph must be that of the model: it has 0.weight with 12 entries"):
        dk.compact(model, dead={"2": torch.arange(12) < 4}, graph=graph)


def test_nothing_to_remove_is_said() -> None:
    model = Chain()
    report = dk.compact(model, None, inputs(), dead={})
    assert not report.changed and report.bytes_freed == 0
    assert str(report) == "nothing to remove: 48 of 48 units left"
