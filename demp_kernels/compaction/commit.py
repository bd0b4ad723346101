"""Carrying a plan out: one gather over everything, then the exchange of the tensors' contents."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.compact import compact as compact_op
from .optimizer import StateCut
from .plan import Cut, Plan

__all__ = ["commit"]


@torch.no_grad()
def commit(plan: Plan, states: Sequence[StateCut]) -> int:
    """Shrink parameters, buffers, gradients and optimiser state. Returns the bytes freed.

    Everything new is gathered first, so that running out of memory leaves all as it was; what follows only exchanges
    contents. Parameters and buffers stay the same objects, with hooks and requires_grad.
    """
    jobs: list[tuple[Tensor, Cut]] = [(cut.tensor, cut) for cut in plan.cuts]
    with_grad = [cut for cut in plan.cuts if cut.tensor.grad is not None]
    jobs += [(cut.tensor.grad, cut) for cut in with_grad]
    jobs += [(state.state[state.key], state.cut) for state in states]
    new = gather([(tensor.detach(), cut.index) for tensor, cut in jobs])
    freed = sum(old.nbytes for old, _ in jobs) - sum(t.nbytes for t in new)

    contents = iter(new)
    gradients = new[len(plan.cuts) : len(plan.cuts) + len(with_grad)]
    for cut in with_grad:
        cut.tensor.grad = None
    for cut in plan.cuts:
        replace_content(cut.tensor, next(contents))
    for cut, gradient in zip(with_grad, gradients):
        cut.tensor.grad = gradient
    for state, tensor in zip(states, new[len(plan.cuts) + len(with_grad) :]):
        state.state[state.key] = tensor

    for change in plan.selections:
        change.module.set_selection(change.index, change.skip_channels)
    for module, attribute, value in plan.attributes:
        setattr(module, attribute, value)
    for module, kept in plan.counters:
        if kept is None:
            module.active = module.seen = None
        else:
            module.select_units(kept)
    return freed


def replace_content(tensor: Tensor, content: Tensor) -> None:
    """Give a parameter or buffer another content and shape; object, hooks and flags stay."""
    if tensor.requires_grad:
        # A graph that is still alive (a loss kept for logging) holds the parameter's gradient accumulator with the old
        # shape, and autograd would hand it out again. It drops an accumulator only when dtype or device change.
        other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = content


def gather(jobs: Sequence[tuple[Tensor, dict[int, Tensor]]]) -> list[Tensor]:
    """Index each tensor along the given dimensions, in one call of the `compact` op for each device and step."""
    views: list[Tensor] = []
    rows: list[Tensor | None] = []
    columns: list[Tensor | None] = []
    shapes: list[list[int] | None] = []
    for tensor, index in jobs:
        shape = None
        if any(d > 1 for d in index):
            if len(index) > 1:
                tensor, index = _all_but_last(tensor, index)
            # one dimension further back: the middle one of three is a column
            ((dim, kept),) = index.items()
            shape = [*tensor.shape[:dim], kept.numel(), *tensor.shape[dim + 1 :]]
            tensor = tensor.reshape(math.prod(tensor.shape[:dim]), tensor.shape[dim], -1)
            index = {1: kept}
        views.append(tensor)
        rows.append(index.get(0))
        columns.append(index.get(1))
        shapes.append(shape)
    results: list[Tensor] = [None] * len(views)  # type: ignore[list-item]
    for device in {view.device for view in views}:
        here = [i for i, view in enumerate(views) if view.device == device]
        found = compact_op([views[i] for i in here], [rows[i] for i in here], [columns[i] for i in here])
        for i, tensor in zip(here, found):
            results[i] = tensor if shapes[i] is None else tensor.view(shapes[i])
    return results


def _all_but_last(tensor: Tensor, index: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    last = max(index)
    for dim in sorted(index)[:-1]:
        tensor = tensor.index_select(dim, index[dim])
    return tensor, {last: index[last]}
