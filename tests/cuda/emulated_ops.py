"""The ops on CPU tensors through the emulated CUDA kernels: the signatures of `torch.ops.demp_kernels`, checks included.

Every tensor that a kernel sees is a copy with guarded room around it, at `offset` elements from a 16-byte boundary, and
outputs are poisoned first.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from demp_kernels.ops import activation as activation_op
from emulated import EMULATOR, Emulator, build, guarded

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of ElementType


@dataclass
class EmulatedOps:
    emulator: Emulator
    offset: int = 0
    watch: bool = True

    @classmethod
    def load(cls, checks: str = "accesses") -> EmulatedOps:
        return cls(Emulator(build([EMULATOR / "ops.cpp"], checks)))

    def _in(self, t: Tensor) -> Tensor:
        return guarded(t, self.offset)

    def _out(self, like: Tensor) -> Tensor:
        poisoned = guarded(like, self.offset)
        flat = poisoned.as_strided((poisoned.numel(),), (1,), poisoned.storage_offset())
        flat.view(torch.uint8).fill_(0xFF)
        return poisoned

    def _call(self, name: str, tensors: list[Tensor | None], *arguments: object) -> None:
        """`tensors` first, then `arguments`; all of `tensors` are watched."""
        with self.emulator.watching(*[t for t in tensors if t is not None] if self.watch else []):
            self.emulator.call(name, *tensors, *arguments)

    # ---- activation ----------------------------------------------------------------------------------------------

    def activation_forward(
        self, x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        activation_op.check_forward(x, activation, slope, channel_dim, noise_std, seed)
        x = self._in(x)
        y = self._out(x)
        return y, *self._forward(x, y, activation, slope, channel_dim, noise_std, seed)

    def activation_forward_(
        self, x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        activation_op.check_forward_(x, activation, slope, channel_dim, noise_std, seed)
        y = self._in(x)
        result = self._forward(y, y, activation, slope, channel_dim, noise_std, seed)
        x.copy_(y)
        return result

    def _forward(self, x: Tensor, y: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None):
        outer, channels, inner = canonical(x, channel_dim)
        active = guarded(torch.full((channels,), -1, dtype=torch.int64))
        with_mask = noise_std > 0 and activation in ("relu", "leaky_relu")
        mask = guarded(torch.full(((x.numel() + 7) // 8 if with_mask else 0,), 0xAA, dtype=torch.uint8))
        seed = guarded(seed) if noise_std > 0 else None
        watched = [x, y if y is not x else None, active, mask, seed]
        with self.emulator.watching(*[t for t in watched if t is not None] if self.watch else []):
            self.emulator.call(
                "emulated_activation_forward", x, y, active, mask, seed, outer, channels, inner, float(slope),
                float(noise_std), activation_op.ACTIVATIONS.index(activation), TYPES.index(x.dtype),
            )
        return active.clone(), mask.clone()

    def activation_backward(self, grad: Tensor, saved: Tensor, mask: Tensor, activation: str, slope: float) -> Tensor:
        activation_op.check_backward(grad, saved, mask, activation, slope)
        from_bits = mask.numel() > 0 and activation in ("relu", "leaky_relu")
        grad = self._in(grad)
        saved, bits = (None, guarded(mask)) if from_bits else (self._in(saved), None)
        result = self._out(grad)
        self._call(
            "emulated_activation_backward", [grad, saved, bits, result], grad.numel(), float(slope),
            activation_op.ACTIVATIONS.index(activation), TYPES.index(grad.dtype),
        )
        return result


def canonical(x: Tensor, channel_dim: int) -> tuple[int, int, int]:
    """Memory order of a dense x as (outer, channels, inner)."""
    channel_dim %= x.dim()
    shape = list(x.shape)
    channels = shape.pop(channel_dim)
    if not x.is_contiguous():
        return math.prod(shape), channels, 1
    return math.prod(shape[:channel_dim]), channels, math.prod(shape[channel_dim:])
