"""compact: the kept rows and columns of a list of weights in one call, beside index_select twice and a copy of what is kept."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.compact import compact
from ...recipes.models import ResNet18
from ..cases import Case, Scope

__all__ = ["CompactCase", "cases"]

SHAPES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "resnet18-w16": lambda: _weights(16),
    "resnet18-w64": lambda: _weights(64),
    "vgg16-fc1": lambda: [(4096, 25088)],
    "wide-rows": lambda: [(2048, 2048)] * 4,
}


def _weights(width: int) -> list[tuple[int, ...]]:
    """Weights whose inputs and outputs can both be cut."""
    return [tuple(p.shape) for p in ResNet18(1, 10, width).parameters() if p.dim() == 4 and p.shape[1] > 1]


@dataclass(frozen=True)
class CompactCase(Case):
    """Every other row and every other column is kept. function: which weights. shape: (number of elements kept,)."""

    op: ClassVar[str] = "compact"

    @property
    def bytes(self) -> int:
        return 2 * self.input_bytes

    def variants(self, device: torch.device, *, compile: bool) -> dict[str, Callable[[], Any]]:
        sources = [_in_layout(torch.randn(shape, device=device), self.layout) for shape in SHAPES[self.function]()]
        rows = [torch.arange(0, source.shape[0], 2, device=device) for source in sources]
        columns = [torch.arange(0, source.shape[1], 2, device=device) for source in sources]
        kept = compact(sources, rows, columns)
        spare = [torch.empty_like(k) for k in kept]
        return {
            "copy": lambda: [k.clone() for k in kept],
            "copy_into": lambda: torch._foreach_copy_(spare, kept),
            "eager": lambda: [s.index_select(0, r).index_select(1, c) for s, r, c in zip(sources, rows, columns)],
            "demp": lambda: compact(sources, rows, columns),
        }


def _in_layout(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def cases(scope: Scope) -> list[Case]:
    names = ("resnet18-w16",) if scope.quick else tuple(SHAPES)
    found: list[Case] = []
    for name in names:
        shapes = SHAPES[name]()
        kept = sum(-(-s[0] // 2) * -(-s[1] // 2) * math.prod(s[2:]) for s in shapes)
        for layout in ("nchw", "channels_last") if len(shapes[0]) == 4 else ("nc",):
            found.append(CompactCase(name, layout, torch.float32, (kept,), "forward", compile=False))
    return found
