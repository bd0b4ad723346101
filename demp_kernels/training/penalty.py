"""The penalty that makes units die: which parameters, which norm.

The authors' final recipe is the sum of |gamma| over every normalisation layer; the other choices are those they tried.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["PENALTY_NORMS", "PENALTY_TARGETS", "add_penalty_gradient", "penalised_parameters", "penalty_value"]

NORMALISATIONS = (
    nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
)


def _stacked(scalars: Sequence[Tensor]) -> Tensor:
    """On the first one's device: parts of a model may be on several."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])


def _l1(parameters: Sequence[Tensor]) -> Tensor:
    return _stacked(torch._foreach_norm(list(parameters), 1)).sum()


def _l2(parameters: Sequence[Tensor]) -> Tensor:
    return 0.5 * _stacked(torch._foreach_norm(list(parameters), 2)).square().sum()


def _positive(parameters: Sequence[Tensor]) -> Tensor:
    return _stacked([p.relu().sum() for p in parameters]).sum()


PENALTY_NORMS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {"l1": _l1, "l2": _l2, "positive": _positive}
"""l1: sum |p|; l2: sum p^2 / 2; positive: sum max(p, 0). The sub-gradient at 0 is 0."""

PENALTY_TARGETS = ("scales", "offsets", "normalisation", "weights", "all")
"""scales: weights of normalisation layers (gamma); offsets: their biases (beta); normalisation: both; weights: every
parameter with two or more dimensions; all: every parameter."""


def penalised_parameters(model: nn.Module, target: str) -> list[nn.Parameter]:
    """The trainable parameters that `target` names, each once.

    Raises ValueError if the target is unknown or names no parameter of `model`: a network without normalisation needs
    target "weights".
    """
    if target not in PENALTY_TARGETS:
        raise ValueError(f"penalty_on must be one of {', '.join(PENALTY_TARGETS)}, got {target!r}")
    if target == "all":
        candidates = list(model.parameters())
    elif target == "weights":
        candidates = [p for p in model.parameters() if p.dim() >= 2]
    else:
        layers = [m for m in model.modules() if isinstance(m, NORMALISATIONS)]
        scales = [m.weight for m in layers] if target != "offsets" else []
        offsets = [getattr(m, "bias", None) for m in layers] if target != "scales" else []
        candidates = [p for p in scales + offsets if p is not None]
    chosen = list({id(p): p for p in candidates if p.requires_grad}.values())
    if not chosen:
        raise ValueError(
            f"penalty_on={target!r} names no trainable parameter of {type(model).__name__}"
            + ("; without normalisation layers use penalty_on='weights'" if target != "weights" else "")
        )
    return chosen


def penalty_value(parameters: Sequence[Tensor], norm: str) -> Tensor:
    """R = the norm summed over all parameters: a differentiable scalar."""
    return PENALTY_NORMS[norm](parameters)


@torch.no_grad()
def add_penalty_gradient(parameters: Sequence[nn.Parameter], norm: str, weight: float) -> None:
    """p.grad += weight * dR/dp for every parameter, the same as backward through `weight * penalty_value` would add.

    Three calls for the whole list and no autograd graph. A parameter without a gradient gets one.
    """
    derivatives = PENALTY_DERIVATIVES[norm](parameters)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    torch._foreach_add_([p.grad for p in parameters if p.grad is not None], tuple(derivatives), alpha=weight)


PENALTY_DERIVATIVES: dict[str, Callable[[Sequence[Tensor]], Sequence[Tensor]]] = {
    "l1": lambda parameters: torch._foreach_sign(list(parameters)),
    "l2": list,
    "positive": lambda parameters: [(p > 0).to(p.dtype) for p in parameters],
}
