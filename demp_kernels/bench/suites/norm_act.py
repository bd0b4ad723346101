"""norm_act: BatchNorm, residual, activation and counts as one op, beside BatchNorm2d + ReLU."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from ...norm_modules import DemPBatchNormAct2d
from ..cases import Case, Scope, compiled, gradient_call, random, shape_for

__all__ = ["NormActCase", "cases"]

NOISE_STD = 0.01
SMALL_PLANES = (128, 256, 4, 4)
"""The last stage of a network on 32x32 images."""


@dataclass(frozen=True)
class NormActCase(Case):
    """direction "both": forward and backward, as a training step does them. function: bn+relu or bn+add+relu."""

    op: ClassVar[str] = "norm_act"

    @property
    def added(self) -> bool:
        return self.function == "bn+add+relu"

    @property
    def bytes(self) -> int:
        # forward: x twice, y once, the residual once; backward: x and grad twice, x's gradient once, the residual's once;
        # with a residual one bit an element says where the activation was live, written once and read once
        x = self.input_bytes
        mask = self.elements // 8 if self.added else 0
        forward, backward = 3 * x + (x + mask if self.added else 0), 5 * x + (x + 2 * mask if self.added else 0)
        return {"forward": forward, "backward": backward, "both": forward + backward}[self.direction]

    def variants(self, device: torch.device, *, compile: bool) -> dict[str, Callable[[], Any]]:
        x = random(self.shape, self.layout, self.dtype, device)
        spare = torch.empty_like(x)
        calls: dict[str, Callable[[], Any]] = {"copy": x.clone, "copy_into": lambda: spare.copy_(x)}
        x = x.clone().requires_grad_()
        residual = random(self.shape, self.layout, self.dtype, device).requires_grad_() if self.added else None
        grad = random(self.shape, self.layout, self.dtype, device)
        for name, function, parameters in self._functions(device, compile):
            wanted = [x, *([] if residual is None else [residual]), *parameters]
            calls[name] = self._call(function, x, residual, grad, wanted)
        return calls

    def _call(
        self, function: Callable[..., Tensor], x: Tensor, residual: Tensor | None, grad: Tensor, wanted: list[Tensor]
    ) -> Callable[[], Any]:
        if self.direction == "forward":
            return lambda: function(x, residual)
        if self.direction == "backward":
            return gradient_call(function(x, residual), wanted, grad)
        return lambda: torch.autograd.grad(function(x, residual), wanted, grad)

    def _functions(self, device: torch.device, compile: bool) -> list[tuple[str, Callable[..., Tensor], list[Tensor]]]:
        """(variant, function of (x, residual), its parameters). Each has a layer, and counters, of its own."""
        channels, std = self.shape[1], NOISE_STD if self.noise else 0.0

        def layer() -> nn.BatchNorm2d:
            return nn.BatchNorm2d(channels, device=device)

        def plain(norm: nn.BatchNorm2d) -> Callable[..., Tensor]:
            return lambda x, residual: F.relu(norm(x) if residual is None else norm(x) + residual)

        def eager(norm: nn.BatchNorm2d) -> Callable[..., Tensor]:
            active = torch.zeros(channels, dtype=torch.int64, device=device)

            def run(x: Tensor, residual: Tensor | None) -> Tensor:
                z = norm(x) if residual is None else norm(x) + residual
                live = z > 0
                active.add_(live.sum((0, 2, 3)))
                y = F.relu(z)
                return y + std * live * torch.randn_like(y) if std else y

            return run

        def unfused(norm: nn.BatchNorm2d) -> Callable[..., Tensor]:
            active = torch.zeros(channels, dtype=torch.int64, device=device)

            def run(x: Tensor, residual: Tensor | None) -> Tensor:
                y, count = functional.relu(norm(x) if residual is None else norm(x) + residual, noise_std=std)
                active.add_(count)
                return y

            return run

        def fused() -> DemPBatchNormAct2d:
            return DemPBatchNormAct2d(channels, noise_std=std, device=device)

        norms = {name: layer() for name in ("plain", "eager", "compile", "demp_unfused")}
        demp, demp_compile = fused(), fused()
        found = [
            ("plain", plain(norms["plain"]), norms["plain"]),
            ("eager", eager(norms["eager"]), norms["eager"]),
            ("demp_unfused", unfused(norms["demp_unfused"]), norms["demp_unfused"]),
            ("demp", demp, demp),
        ]
        if compile:
            found.append(("compile", compiled(eager(norms["compile"])), norms["compile"]))
            found.append(("demp_compile", compiled(demp_compile), demp_compile))
        return [(name, function, list(norm.parameters())) for name, function, norm in found]


def cases(scope: Scope) -> list[Case]:
    found: dict[str, Case] = {}

    def add(function: str, layout: str, dtype: torch.dtype, shape: tuple[int, ...], directions: tuple[str, ...], noise: bool = False) -> None:
        for direction in directions:
            case = NormActCase(function, layout, dtype, shape, direction, noise, compile=direction != "backward")
            found.setdefault(case.key, case)

    f32, layouts = torch.float32, ("nchw", "channels_last")
    if scope.quick:
        for layout in layouts:
            add("bn+relu", layout, f32, (16, 16, 32, 32), ("both",))
        return [replace(case, compile=False) for case in found.values()]
    parts = ("forward", "backward", "both")
    usual, large = (128, 32, 28, 28), shape_for("nchw", f32, scope.large)
    for function, shape, layout in product(("bn+relu", "bn+add+relu"), (usual, large), layouts):
        add(function, layout, f32, shape, parts)
    for shape, layout in product(((16, 16, 32, 32), SMALL_PLANES, (128, 37, 14, 14)), layouts):
        add("bn+relu", layout, f32, shape, ("both",))
    for layout in layouts:
        add("bn+relu", layout, torch.bfloat16, usual, ("both",))
        add("bn+relu", layout, f32, usual, ("both",), noise=True)
    if scope.full:
        dtypes = [torch.float32, torch.bfloat16, torch.float16] + ([] if scope.on_gpu else [torch.float64])
        for function, layout, dtype, size in product(("bn+relu", "bn+add+relu"), layouts, dtypes, scope.sizes):
            add(function, layout, dtype, shape_for(layout, dtype, size), parts)
    return list(found.values())
