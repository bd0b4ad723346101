"""activation: act(x), counts and noise, beside torch.relu, the same in eager PyTorch, and copies."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ..cases import DTYPES, Case, Scope, channel_dim, compiled, gradient_call, random, shape_for

__all__ = ["ActivationCase", "cases"]

NOISE_STD = 0.01
LAYOUTS = ("nchw", "channels_last", "nc", "ntc")
ODD_SHAPES = ((128, 37, 14, 14), (128, 256, 7, 7))
"""What pruning leaves: planes that are no multiple of a vector, channel counts that are not even."""
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class ActivationCase(Case):
    """direction "forward": with the graph recorded, as in training; "backward": from the output's gradient to x's;
    "in_place": over x, no gradients."""

    op: ClassVar[str] = "activation"

    @property
    def bytes(self) -> int:
        bits = self.elements // 8 if self.noise and self.function == "relu" else 0
        if self.direction == "backward":
            # grad read, its product written; and what tells the sign: the bits, or the output (for gelu: the input)
            return 2 * self.input_bytes + (bits or self.input_bytes)
        return 2 * self.input_bytes + bits

    def variants(self, device: torch.device, *, compile: bool) -> dict[str, Callable[[], Any]]:
        x = random(self.shape, self.layout, self.dtype, device)
        spare = torch.empty_like(x)
        calls: dict[str, Callable[[], Any]] = {"copy": x.clone, "copy_into": lambda: spare.copy_(x)}
        if self.direction == "in_place":
            return calls | self._in_place(x.clone())
        functions = self._functions(compile)
        x = x.clone().requires_grad_()
        if self.direction == "forward":
            return calls | {name: lambda f=f: f(x) for name, f in functions.items()}
        grad = random(self.shape, self.layout, self.dtype, device)
        return calls | {name: gradient_call(_first(f(x)), [x], grad) for name, f in functions.items()}

    def _functions(self, compile: bool) -> dict[str, Callable[[Tensor], Any]]:
        plain, dim, std = PLAIN[self.function], channel_dim(self.layout), NOISE_STD if self.noise else 0.0

        def eager(x: Tensor) -> tuple[Tensor, Tensor]:
            live = x > 0
            y = plain(x)
            if std:
                y = y + std * live * torch.randn_like(x)
            return y, live.sum([d for d in range(x.dim()) if d != dim % x.dim()])

        def demp(x: Tensor) -> tuple[Tensor, Tensor]:
            return getattr(functional, self.function)(x, channel_dim=dim, noise_std=std)

        functions = {"plain": plain, "eager": eager, "demp": demp}
        if compile:
            functions["compile"] = compiled(eager)
            functions["demp_compile"] = compiled(demp)
        return functions

    def _in_place(self, x: Tensor) -> dict[str, Callable[[], Any]]:
        dims = [d for d in range(x.dim()) if d != channel_dim(self.layout) % x.dim()]

        def eager() -> tuple[Tensor, Tensor]:
            active = (x > 0).sum(dims)
            return x.relu_(), active

        # relu of a relu is itself: repeated calls do the same work
        return {
            "plain": x.relu_, "eager": eager, "demp": lambda: functional.relu_(x, channel_dim=channel_dim(self.layout)),
        }


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def cases(scope: Scope) -> list[Case]:
    found: dict[str, Case] = {}

    def add(function: str, layout: str, dtype: torch.dtype, size: int | tuple[int, ...], noises: tuple[bool, ...] = (False, True),
            directions: tuple[str, ...] = ("forward", "backward")) -> None:
        shape = size if isinstance(size, tuple) else shape_for(layout, dtype, size)
        for direction, noise in product(directions, noises):
            case = ActivationCase(function, layout, dtype, shape, direction, noise)
            found.setdefault(case.key, case)

    f32 = torch.float32
    if scope.quick:
        for layout in ("nchw", "channels_last"):
            add("relu", layout, f32, scope.small)
        return [replace(case, compile=False) for case in found.values()]
    dtypes = [dtype for name, dtype in DTYPES.items() if not (scope.on_gpu and name == "float64")]
    for size in scope.sizes:
        add("relu", "nchw", f32, size)
    for size, layout in product((scope.small, scope.large), LAYOUTS):
        add("relu", layout, f32, size)
    for dtype in dtypes:
        add("relu", "nchw", dtype, scope.large)
    for layout in LAYOUTS:
        add("relu", layout, torch.bfloat16, scope.small)
    add("relu", "channels_last", torch.bfloat16, scope.large)
    for function, size in product(("gelu", "silu"), (scope.small, scope.large)):
        add(function, "nchw", f32, size, noises=(False,))
    for shape, layout in product(ODD_SHAPES, ("nchw", "channels_last")):
        add("relu", layout, f32, shape)
    add("relu", "nchw", f32, (128, 64, 32, 32))
    add("relu", "nc", f32, (4096, 1024))
    for size in (scope.small, scope.large):
        add("relu", "nchw", f32, size, noises=(False,), directions=("in_place",))
    if scope.full:
        for function, layout, dtype, size in product(PLAIN, LAYOUTS, dtypes, scope.sizes):
            add(function, layout, dtype, size)
    return list(found.values())
