"""Carrying a plan out: one gather over everything, then the exchange of the tensors' contents."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    new = gather([(tensor.detach(), cut) for tensor, cut in jobs])
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


@dataclass
class _Piece:
    """One source of the `compact` op, and the shape in which its result is part of job `job`."""

    job: int
    source: Tensor
    rows: Tensor | None
    columns: Tensor | None
    shape: list[int] | None = None


def gather(jobs: Sequence[tuple[Tensor, Cut]]) -> list[Tensor]:
    """Cut each tensor, in one call of the `compact` op for each device. The new tensors share nothing with the old."""
    pieces: list[_Piece] = []
    for number, (tensor, cut) in enumerate(jobs):
        if cut.blocks is not None:
            pieces += [_Piece(number, tensor, rows, columns) for rows, columns in cut.blocks]
        elif max(cut.index) <= 1:
            pieces.append(_Piece(number, tensor, cut.index.get(0), cut.index.get(1)))
        else:
            pieces.append(_further_back(number, tensor, cut.index))
    parts: list[list[Tensor]] = [[] for _ in jobs]
    for device in {piece.source.device for piece in pieces}:
        here = [piece for piece in pieces if piece.source.device == device]
        found = compact_op([p.source for p in here], [p.rows for p in here], [p.columns for p in here])
        for piece, result in zip(here, found):
            parts[piece.job].append(result if piece.shape is None else result.view(piece.shape))
    return [part[0] if len(part) == 1 else torch.cat(part) for part in parts]


def _further_back(number: int, tensor: Tensor, index: dict[int, Tensor]) -> _Piece:
    """A dimension further back than the second: the middle one of three is a column."""
    *others, last = sorted(index)
    for dim in others:
        tensor = tensor.index_select(dim, index[dim])
    before, after = tensor.shape[:last], tensor.shape[last + 1 :]
    flat = tensor.reshape(math.prod(before), tensor.shape[last], math.prod(after))
    return _Piece(number, flat, None, index[last], [*before, index[last].numel(), *after])
