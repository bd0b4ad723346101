"""Which tensors of an optimiser's state follow their parameter."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .plan import CompactionError, Cut

__all__ = ["StateCut", "as_optimizers", "parameters_of", "plan_states", "with_inner"]


@dataclass
class StateCut:
    """`state[key]`, a tensor of its parameter's shape, shrinks as the parameter does."""

    state: dict[str, Any]
    key: str
    cut: Cut

    def put(self, content: Tensor) -> None:
        self.state[self.key] = content


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """One optimiser, several, or none, as a list. Raises TypeError for anything else."""
    if optimizer is None:
        return []
    found: list[Any] = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for one in found:
        if not isinstance(getattr(one, "state", None), dict) or not hasattr(one, "param_groups"):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, a list of them or None, got {type(one).__name__}"
            )
    return found


def parameters_of(optimizers: Iterable[Optimizer]) -> set[int]:
    """The ids of the parameters that some optimisers train."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def plan_states(optimizers: Iterable[Optimizer], cuts: Iterable[Cut]) -> list[StateCut]:
    """The state tensors to cut. Step counts and other scalars stay as they are.

    Raises CompactionError for state that does not tell how it follows the parameter (Adafactor's factored moments,
    L-BFGS's history): dropping it in silence would change the training.
    """
    by_parameter = {id(cut.tensor): cut for cut in cuts}
    states: list[StateCut] = []
    for optimizer in with_inner(optimizers):
        kind = type(optimizer).__name__
        if by_parameter and getattr(optimizer, "parameters_as_bucket_view", False):
            raise CompactionError(f"{kind} with parameters_as_bucket_view=True holds the memory of the parameters: it must be False")
        for group in optimizer.param_groups:
            for key, value in group.items():
                if key != "params" and _has_tensor(value) and by_parameter:
                    raise CompactionError(f"{kind} keeps tensors in param_groups[{key!r}]: how they follow is not known")
        for parameter, state in optimizer.state.items():
            cut = by_parameter.get(id(parameter))
            if cut is None:
                if by_parameter and any(isinstance(value, (list, tuple, dict)) and _has_tensor(value) for value in state.values()):
                    raise CompactionError(f"{kind} keeps a history over all parameters: how it follows is not known")
                continue
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.layout == torch.strided:
                    states.append(StateCut(state, key, cut))
                elif _has_tensor(value):
                    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                    raise CompactionError(
                        f"{kind}'s state {key!r} of {cut.name} (shape {tuple(parameter.shape)}) must have the "
                        f"parameter's shape to follow it, got {got}"
                    )
    return states


def with_inner(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Optimisers, and those that they keep inside (SAM, Lookahead, torch's ZeroRedundancyOptimizer), each state once."""
    found: dict[int, Optimizer] = {}
    pending = list(optimizers)
    while pending:
        one = pending.pop(0)
        if id(one.state) not in found:
            found[id(one.state)] = one
        for value in vars(one).values():
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            pending += [inner for inner in inside if isinstance(inner, Optimizer) and id(inner.state) not in found]
    return list(found.values())


def _has_tensor(value: Any) -> bool:
    """Whether there is a tensor with dimensions in `value`."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.numel() != 1
    if isinstance(value, dict):
        return any(_has_tensor(v) for v in value.values())
    return isinstance(value, (list, tuple)) and any(_has_tensor(v) for v in value)
