"""dispatch: what a call costs before any element is touched: ops on tensors so small that nothing else is left.

On a GPU it is the host's time for a launch, a queue of calls being waited for once.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from ...modules import DemPReLU
from ...norm_modules import DemPBatchNormAct2d
from ..cases import Case, Scope, random

__all__ = ["DispatchCase", "cases"]

SHAPE = (2, 8, 2, 2)


@dataclass(frozen=True)
class DispatchCase(Case):
    """function: relu (the function), ReLU (the module, with its counters) or bn+relu. direction: forward (no gradients are
    asked for), or both, forward and backward, as a training step does them."""

    op: ClassVar[str] = "dispatch"
    cold: ClassVar[bool] = False

    @property
    def bytes(self) -> int:
        return 2 * self.input_bytes

    def variants(self, device: torch.device, *, compile: bool) -> dict[str, Callable[[], Any]]:
        x = random(SHAPE, self.layout, self.dtype, device)
        spare, grad = torch.empty_like(x), torch.ones_like(x)
        calls: dict[str, Callable[[], Any]] = {"copy": x.clone, "copy_into": lambda: spare.copy_(x)}
        leaf = x.clone().requires_grad_()
        for name, function in self._functions(device).items():
            calls[name] = self._call(function, leaf, grad)
        return calls

    def _call(self, function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], Any]:
        if self.direction == "both":
            return lambda: torch.autograd.grad(function(x), x, grad)

        def forward() -> Tensor:
            with torch.no_grad():
                return function(x)

        return forward

    def _functions(self, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
        """Each has a layer, and counters, of its own."""
        active = torch.zeros(SHAPE[1], dtype=torch.int64, device=device)

        def counted(z: Tensor) -> Tensor:
            active.add_((z > 0).sum((0, 2, 3)))
            return F.relu(z)

        if self.function == "relu":
            return {"plain": torch.relu, "eager": counted, "demp": lambda x: functional.relu(x)[0]}
        if self.function == "ReLU":
            return {"plain": nn.ReLU(), "eager": counted, "demp": DemPReLU()}
        plain, eager = (nn.BatchNorm2d(SHAPE[1], device=device) for _ in range(2))
        return {
            "plain": lambda x: F.relu(plain(x)), "eager": lambda x: counted(eager(x)),
            "demp": DemPBatchNormAct2d(SHAPE[1], device=device),
        }


def cases(scope: Scope) -> list[Case]:
    directions = ("both",) if scope.quick else ("forward", "both")
    return [
        DispatchCase(function, "nchw", torch.float32, SHAPE, direction, compile=False)
        for function in ("relu", "ReLU", "bn+relu") for direction in directions
    ]  # fmt: skip
