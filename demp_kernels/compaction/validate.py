"""A compaction tried on fake tensors: the model's own forward, with the shapes that are planned."""
from __future__ import annotations

import traceback

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten

from ..graph.capture import evaluation_mode, quiet_fake_tensors, same_attributes
from ..graph.trial import fake_inputs, with_widths
from ..graph.units import UnitGraph
from .plan import CompactionError, Plan

__all__ = ["validate"]


def validate(model: nn.Module, graph: UnitGraph, plan: Plan) -> None:
    """Run the forward with fake tensors of the planned shapes and compare the outputs' shapes with the analysis.

    The module's tensors and attributes are exchanged for the time of the call and put back, the same objects.
    Raises CompactionError, naming the module that failed, if the model cannot run with these shapes: usually a number
    of channels that is written down in its forward.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    rng = torch.get_rng_state()
    try:
        with (
            quiet_fake_tensors(), same_attributes(model), evaluation_mode(model),
            with_widths(model, graph.widths(model, plan.keep.atoms), mode),
        ):
            inputs = fake_inputs(model, graph.inputs, mode)
            with mode, torch.no_grad():
                output = model(*inputs)
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise CompactionError(
            f"{_failing_module(model, error)} cannot run with the planned widths ({_widths(plan)}): {text[0]}"
        ) from error
    finally:
        torch.set_rng_state(rng)
    shapes = [tuple(t.shape) for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
    if shapes != graph.output_shapes:
        raise CompactionError(f"the outputs must keep their shapes {graph.output_shapes}, they would become {shapes}")


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
