"""The ops on CPU tensors through the emulated CUDA kernels: the signatures of `torch.ops.demp_kernels`, checks included.

Every tensor that a kernel sees is a copy with guarded room around it, at `offset` elements from a 16-byte boundary, and
outputs are poisoned first.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from emulated import EMULATOR, Emulator, build, guarded
from emulated_norm_act import TYPES, EmulatedNormAct
from torch import Tensor

from demp_kernels.ops import activation as activation_op
from demp_kernels.ops import channel_select as channel_select_op
from demp_kernels.ops import compact as compact_op
from demp_kernels.ops import weight_noise as weight_noise_op
from demp_kernels.ops.activation import is_dense, memory_format


@dataclass
class EmulatedOps(EmulatedNormAct):
    emulator: Emulator
    device = "cpu"
    normals = 4e-6  # float32 arithmetic; the device's approximate functions are replaced by exact ones
    long_list = 600  # longer than one kernel argument holds
    offset: int = 0
    watch: bool = True

    @classmethod
    def load(cls, checks: str = "accesses") -> EmulatedOps:
        return cls(Emulator(build([EMULATOR / "ops.cpp", EMULATOR / "norm_act.cpp"], checks)))

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

    # ---- lists of tensors ----------------------------------------------------------------------------------------

    def weight_noise_(self, tensors: Sequence[Tensor], live: Sequence[Tensor | None], std: float, seed: Tensor) -> None:
        weight_noise_op.check(tensors, live, std, seed)
        seed = guarded(seed)
        copies = [self._in(t if is_dense(t) else t.contiguous()) for t in tensors]
        rows = [None if r is None else guarded(r) for r in live]
        for type_index, dtype in enumerate(TYPES):
            table = [
                [t.data_ptr(), _address(r), count, t.numel() // count, _taps(t), 1 + i]
                for i, (t, r) in enumerate(zip(copies, rows))
                if t.dtype == dtype and t.numel() and (count := t.shape[0] if t.dim() else 1)
            ]
            if table:
                watched = [seed, *copies, *[r for r in rows if r is not None]]
                with self.emulator.watching(*watched if self.watch else []):
                    self.emulator.call("emulated_weight_noise", torch.tensor(table), seed, len(table), float(std), type_index)
        for t, copy in zip(tensors, copies):
            t.copy_(copy)

    def compact(self, sources: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Sequence[Tensor | None]) -> list[Tensor]:
        compact_op.check(sources, rows, columns)
        table, targets, watched = [], [], []
        for given, row, column in zip(sources, rows, columns):
            last = given.dim() in (4, 5) and not given.is_contiguous() and is_dense(given)
            source = self._in(given if last else given.contiguous())
            shape = list(source.shape)
            for dim, index in ((0, row), (1, column)):
                if index is not None:
                    shape[dim] = index.numel()
            like = torch.empty(shape, dtype=source.dtype)
            target = self._out(like.contiguous(memory_format=memory_format(source)) if last else like)
            row, column = (None if index is None else guarded(index) for index in (row, column))
            inner, size = math.prod(shape[2:]), source.element_size()
            wide = source.dim() > 1
            table.append([
                source.data_ptr(), target.data_ptr(), _address(row), _address(column), source.shape[0], shape[0],
                inner if last else 1, source.shape[1] if wide else 1, shape[1] if wide else 1, size if last else inner * size,
            ])
            targets.append(target)
            watched += [t for t in (source, target, row, column) if t is not None]
        with self.emulator.watching(*watched if self.watch else []):
            self.emulator.call("emulated_gathers", torch.tensor(table), len(table))
        return targets

    def channel_select(self, x: Tensor, index: Tensor, inverse: Tensor, channel_dim: int) -> Tensor:
        channel_select_op.check(x, index, inverse, channel_dim)
        last = channel_dim % x.dim() == 1 and not x.is_contiguous() and is_dense(x)
        source, index = self._in(x if last else x.contiguous()), guarded(index)
        outer, channels, inner = canonical(source, channel_dim)
        shape = list(x.shape)
        shape[channel_dim] = index.numel()
        like = torch.empty(shape, dtype=x.dtype)
        y = self._out(like.contiguous(memory_format=memory_format(source)) if last else like)
        table = [[source.data_ptr(), y.data_ptr(), 0, index.data_ptr(), outer, outer, 1, channels, index.numel(), inner * x.element_size()]]
        with self.emulator.watching(*[source, index, y] if self.watch else []):
            self.emulator.call("emulated_gathers", torch.tensor(table), 1)
        return y


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _taps(t: Tensor) -> int:
    return 1 if t.is_contiguous() else math.prod(t.shape[2:])


def canonical(x: Tensor, channel_dim: int) -> tuple[int, int, int]:
    """Memory order of a dense x as (outer, channels, inner)."""
    channel_dim %= x.dim()
    shape = list(x.shape)
    channels = shape.pop(channel_dim)
    if not x.is_contiguous():
        return math.prod(shape), channels, 1
    return math.prod(shape[:channel_dim]), channels, math.prod(shape[channel_dim:])
