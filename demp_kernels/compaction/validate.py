"""A compaction tried on fake tensors: the model's own forward, with the shapes that are planned."""
from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

from ..graph.capture import evaluation_mode
from ..graph.units import UnitGraph
from ..modules import SelectiveAdd
from ..reference import memory_format
from .plan import CompactionError, Plan

__all__ = ["validate"]


def validate(model: nn.Module, graph: UnitGraph, plan: Plan) -> None:
    """Run the forward with fake tensors of the planned shapes and compare the outputs' shapes with the analysis.

    The module's tensors and attributes are exchanged for the time of the call and put back, the same objects.
    Raises CompactionError, naming the module that failed, if the model cannot run with these shapes: usually a number
    of channels that is written down in its forward.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = next(model.parameters()).device
    rng = torch.get_rng_state()
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log_disabled, log.disabled = log.disabled, True  # it would print a failure that is raised anyway
    try:
        with mode, torch.no_grad(), evaluation_mode(model), _planned_shapes(model, plan, mode):
            inputs = tree_map(lambda x: _fake(x, x.shape, device) if isinstance(x, Tensor) else x, graph.inputs)
            output = model(*inputs)
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise CompactionError(
            f"{_failing_module(model, error)} cannot run with the planned widths ({_widths(plan)}): {text[0]}"
        ) from error
    finally:
        log.disabled = log_disabled
        torch.set_rng_state(rng)
    shapes = [tuple(t.shape) for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
    if shapes != graph.output_shapes:
        raise CompactionError(f"the outputs must keep their shapes {graph.output_shapes}, they would become {shapes}")


@contextmanager
def _planned_shapes(model: nn.Module, plan: Plan, mode: FakeTensorMode) -> Iterator[None]:
    planned = {id(cut.tensor): cut.shape for cut in plan.cuts}
    selections = {id(change.module): change for change in plan.selections}
    saved: list[tuple[dict[str, Any], str, Any]] = []
    fakes: dict[int, Tensor] = {}

    def exchange(members: dict[str, Any], key: str, value: Any) -> None:
        saved.append((members, key, members[key]))
        members[key] = value

    try:
        for module in model.modules():
            for members in (module._parameters, module._buffers):
                for key, tensor in list(members.items()):
                    if tensor is None:
                        continue
                    if id(tensor) not in fakes:
                        fakes[id(tensor)] = _fake(tensor, planned.get(id(tensor), tensor.shape), tensor.device)
                    exchange(members, key, fakes[id(tensor)])
            if isinstance(module, SelectiveAdd) and id(module) in selections:
                change = selections[id(module)]
                index = None if change.index is None else _fake(change.index, change.index.shape, change.index.device)
                inverse = None if index is None else index.new_empty((change.skip_channels,))
                exchange(module._buffers, "index", index)
                exchange(module._buffers, "inverse", inverse)
        for module, attribute, value in plan.attributes:
            exchange(module.__dict__, attribute, value)
        yield
    finally:
        for members, key, value in reversed(saved):
            members[key] = value


def _fake(like: Tensor, shape: Any, device: torch.device) -> Tensor:
    """A tensor without data, in `like`'s layout; called inside a FakeTensorMode."""
    if tuple(shape) == tuple(like.shape):
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    return torch.empty(tuple(shape), dtype=like.dtype, device=device, memory_format=memory_format(like))


def _failing_module(model: nn.Module, error: BaseException) -> str:
    """The innermost module of the model on the error's stack, with the line it was at."""
    names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
    place = type(model).__name__
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if id(module) in names:
            place = f"{names[id(module)]} ({type(module).__name__}, line {line} of {frame.f_code.co_filename.rsplit('/', 1)[-1]})"
    return place


def _widths(plan: Plan) -> str:
    shown = [f"{cut.name} {tuple(cut.tensor.shape)} -> {cut.shape}" for cut in plan.cuts[:3]]
    return ", ".join(shown) + (f" and {len(plan.cuts) - 3} more" if len(plan.cuts) > 3 else "")
