"""channel_select: how a skip meets a block that kept other channels, beside index_select with a mask."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import functional
from ..cases import Case, Scope, compiled, gradient_call, random, shape_for

__all__ = ["ChannelSelectCase", "cases"]


@dataclass(frozen=True)
class ChannelSelectCase(Case):
    """Every fourth output channel is one that the skip has lost; the skip has one channel that the output lacks."""

    op: ClassVar[str] = "channel_select"

    @property
    def bytes(self) -> int:
        return 2 * self.input_bytes

    def variants(self, device: torch.device, *, compile: bool) -> dict[str, Callable[[], Any]]:
        x = random(self.shape, self.layout, self.dtype, device)
        spare = torch.empty_like(x)
        channels = self.shape[1]
        index = torch.arange(channels, device=device)
        index[3::4] = -1
        inverse = index.clone()
        lost = (index < 0).view(1, -1, *[1] * (x.dim() - 2))
        source = index.clamp(min=0)

        def eager(x: Tensor) -> Tensor:
            return x.index_select(1, source).masked_fill(lost, 0)

        def demp(x: Tensor) -> Tensor:
            return functional.channel_select(x, index, inverse, 1)

        functions: dict[str, Callable[[Tensor], Tensor]] = {"eager": eager, "demp": demp}
        if compile:
            functions["compile"] = compiled(eager)
        calls: dict[str, Callable[[], Any]] = {"copy": x.clone, "copy_into": lambda: spare.copy_(x)}
        leaf = x.clone().requires_grad_()
        if self.direction == "forward":
            return calls | {name: lambda f=f: f(leaf) for name, f in functions.items()}
        return calls | {name: gradient_call(f(leaf), [leaf], x) for name, f in functions.items()}


def cases(scope: Scope) -> list[Case]:
    sizes = (scope.small,) if scope.quick else (scope.small, scope.large)
    found = [
        ChannelSelectCase("select", layout, torch.float32, shape_for(layout, torch.float32, size), direction)
        for size, layout, direction in product(sizes, ("nchw", "channels_last"), ("forward", "backward"))
    ]
    return [replace(case, compile=False) for case in found] if scope.quick else found
