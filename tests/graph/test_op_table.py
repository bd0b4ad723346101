"""Every op of the coverage, in a network of its own: half of the units are made zero and compacted.

Either all of them go and the outputs are what they were, in evaluation and in training; or all stay, the report says which
op wants them and where, and not a bit of the model is another one.
"""
from __future__ import annotations

import copy

import pytest
import torch
from op_nets import CASES, UNITS
from torch import Tensor, nn

import demp_kernels as dk


def silence(model: nn.Module, dead: tuple[int, ...], graph: dk.UnitGraph) -> None:
    """Zero the dead units that `act` still has, in every call."""

    def hook(module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        dim = -1 if out.dim() == 3 and isinstance(model.stem, nn.Linear) else 1
        calls = [ids for name, ids in graph.unit_ids.items() if name in ("act", "act@0")]
        live = torch.tensor([unit not in dead for unit in calls[0].tolist()], dtype=out.dtype)
        shape = [1] * out.dim()
        shape[dim] = -1
        return out * live.view(shape) if live.numel() == out.shape[dim] else out  # else: a trial with other widths

    model.act.register_forward_hook(hook)


def outputs(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    """The output; buffers and modes are put back."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    mode = model.training
    with torch.no_grad():
        y = model.train(training)(x)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    model.train(mode)
    return y


def contents(model: nn.Module) -> list:
    """Every tensor (object, bits, strides, flag), every mode and number of the model."""
    seen: list = []
    for name, module in model.named_modules():
        seen.append((name, module.training, sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, str)))))
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                seen.append((name, key, id(tensor), tensor.stride(), tensor.requires_grad, tensor.detach().numpy().tobytes()))
    return seen


@pytest.mark.parametrize("name", CASES)
def test_units_go_exactly_or_stay_with_a_reason(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make().double().train()
    x = torch.randn(case.shape, dtype=torch.float64)
    graph = dk.UnitGraph.trace(model, x)
    calls = [key for key in graph.units if key.split("@")[0] == "act"]
    assert calls and graph.units[calls[0]] == UNITS
    silence(model, case.dead, graph)
    modes = (False,) if case.draws else (False, True)
    before, state = [outputs(model, x, training) for training in modes], contents(model)
    dead = {key: torch.isin(torch.arange(UNITS), torch.tensor(case.dead)) for key in calls}
    report = dk.compact(model, None, dead=dead, graph=graph)
    assert report.removed.get(calls[0], 0) == case.removed, report.kept
    after = [outputs(model, x, training) for training in modes]
    if case.why:
        assert case.why in report.kept[calls[0]]
        assert contents(model) == state
        assert all(torch.equal(a, b) for a, b in zip(after, before))
    else:
        for a, b in zip(after, before):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))
    model(x).square().sum().backward()  # the shapes fit in the backward pass too
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    copy.deepcopy(graph)
