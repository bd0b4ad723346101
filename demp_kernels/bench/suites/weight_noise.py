"""weight_noise: noise on all parameters in one call, beside a loop of randn_like and a copy of the parameters."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import functional
from ...recipes.models import ResNet18
from ..cases import Case, Scope, compiled

__all__ = ["WeightNoiseCase", "cases"]

STD = 1e-5


@dataclass(frozen=True)
class WeightNoiseCase(Case):
    """All parameters of the recipes' ResNet-18. function: resnet18-w<width>, with "-half" where every other row of each
    is dead and stays as it is. shape: (number of elements,)."""

    op: ClassVar[str] = "weight_noise"
    width: int = 16

    @property
    def bytes(self) -> int:
        return 2 * self.input_bytes

    def variants(self, device: torch.device, *, compile: bool) -> dict[str, Callable[[], Any]]:
        parameters = [p.detach().to(device=device, dtype=self.dtype) for p in ResNet18(1, 10, self.width).parameters()]
        spare = [torch.empty_like(p) for p in parameters]
        live: list[Tensor | None] = [None] * len(parameters)
        if self.function.endswith("-half"):
            live = [torch.arange(len(p), device=device) % 2 == 0 for p in parameters]

        def eager() -> None:
            for p, rows in zip(parameters, live):
                xi = torch.randn_like(p)
                p.add_(xi if rows is None else xi * rows.view(-1, *[1] * (p.dim() - 1)), alpha=STD)

        calls: dict[str, Callable[[], Any]] = {
            "copy": lambda: [p.clone() for p in parameters],
            "copy_into": lambda: torch._foreach_copy_(spare, parameters),
            "eager": eager,
            "demp": lambda: functional.weight_noise_(parameters, STD, live),
        }
        if compile:
            calls["compile"] = compiled(eager)
        return calls


def cases(scope: Scope) -> list[Case]:
    widths = (16,) if scope.quick else (16, 32, 64)
    found: list[Case] = []
    for width in widths:
        elements = sum(p.numel() for p in ResNet18(1, 10, width).parameters())
        for half in ("", "-half"):
            # Inductor takes a minute over a list of 62 tensors: once is enough
            found.append(
                WeightNoiseCase(
                    f"resnet18-w{width}{half}", "list", torch.float32, (elements,), "in_place",
                    compile=width == 64 and not half, width=width,
                )
            )
    return [replace(case, compile=False) for case in found] if scope.quick else found
