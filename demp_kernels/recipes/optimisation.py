"""Optimisers and learning-rate schedules of the recipes."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .settings import TrainSettings

__all__ = ["DecoupledSGD", "build_optimizer", "build_schedule"]


class DecoupledSGD(torch.optim.SGD):
    """SGD with momentum and decoupled weight decay, as the method's authors use it (optax):

        p <- p - lr * weight_decay * p,   v <- momentum * v + g,   p <- p - lr * v

    torch.optim.SGD adds the decay to g, so that the momentum and the task's gradient see it.
    Source: Loshchilov and Hutter, arXiv 1711.05101.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float, weight_decay: float, fused: bool | None) -> None:
        super().__init__(params, lr=lr, momentum=momentum, fused=fused)
        for group in self.param_groups:
            group["decoupled_decay"] = weight_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if group["decoupled_decay"] and with_gradient:
                torch._foreach_mul_(with_gradient, 1 - group["lr"] * group["decoupled_decay"])
        return super().step(closure)


def build_optimizer(settings: TrainSettings, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum; fused, with decoupled weight decay on all parameters."""
    if settings.optimizer == "sgd":
        # A step that overflows in fp16 is GradScaler's to leave out. Fused optimisers are called all the same: the decay would
        # happen, and torch's SGD (2.14) goes on from uninitialised momentum if it was the first step, as it often is.
        fused = settings.amp != "fp16"
        return DecoupledSGD(parameters, settings.lr, settings.momentum, settings.weight_decay, fused=fused)
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def build_schedule(settings: TrainSettings, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """The learning rate of every step.

    one-cycle: a cosine up to `lr` over the share `warm_up` of the run, then one down to almost nothing.
    steps: `lr`, times `lr_factor` at each epoch of `lr_drops`, after a linear rise over the share `warm_up`.
    constant: `lr`, after the same rise.
    """
    if settings.lr_schedule == "one-cycle":
        rising = float(settings.warm_up)
        if rising * (total_steps + 1) == 1:
            rising = 0.0  # a rise that ends at the first step is none; torch would divide by its length
        return OneCycleLR(optimizer, settings.lr, total_steps=total_steps + 1, pct_start=rising, cycle_momentum=False)
    drops = settings.lr_drops if settings.lr_schedule == "steps" else ()
    at = [round(drop / settings.epochs * total_steps) for drop in drops]
    rise = round(settings.warm_up * total_steps)

    def factor(step: int) -> float:
        risen = min(1.0, (step + 1) / rise) if rise else 1.0
        return risen * settings.lr_factor ** sum(step >= drop for drop in at)

    return LambdaLR(optimizer, factor)
