"""norm_act through the emulated CUDA kernels: the part of `EmulatedOps` for its two ops."""
from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from emulated import Emulator, guarded
from torch import Tensor

from demp_kernels.ops import norm_act as op
from demp_kernels.ops.activation import ACTIVATIONS

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of ElementType


class Arguments(ctypes.Structure):
    """As in emulator/norm_act.cpp."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("outer", "channels", "inner", "rows", "type", "act", "weight_type", "bias_type")],
        *[(name, ctypes.c_double) for name in ("slope", "eps", "noise_std")],
        *[(name, ctypes.c_int64) for name in ("x", "residual", "weight", "bias", "mean", "var", "mask", "workspace")],
        *[(name, ctypes.c_int64) for name in ("y", "active", "seed")],
        *[(name, ctypes.c_int64) for name in ("grad", "grad_x", "grad_residual", "grad_weight", "grad_bias")],
    ]


class EmulatedNormAct:
    """Needs `emulator`, `watch`, `_in` and `_out` of `EmulatedOps`."""

    emulator: Emulator
    watch: bool
    _in: Callable[[Tensor], Tensor]
    _out: Callable[[Tensor], Tensor]

    def norm_act_forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str, slope: float,
        eps: float, noise_std: float, seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        op.check_forward(x, weight, bias, residual, activation, slope, eps, noise_std, seed)
        bits = residual is not None and activation in ("relu", "leaky_relu")
        inputs = dict(x=self._in(x), residual=self._maybe(residual), weight=_dense(weight), bias=_dense(bias))
        inputs["seed"] = guarded(seed) if noise_std > 0 else None
        outputs = dict(y=self._out(x), active=guarded(torch.full((x.shape[1],), -1)), **_statistics(x))
        outputs["mask"] = guarded(torch.full(op.mask_shape(x) if bits else (0,), 0xAA, dtype=torch.uint8))
        self._norm_act("forward", inputs, outputs, weight, bias, activation, slope, eps, noise_std)
        return tuple(outputs[name].clone() for name in ("y", "active", "mean", "var", "mask"))

    def norm_act_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mean: Tensor,
        var: Tensor, mask: Tensor, activation: str, slope: float, eps: float, added: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        op.check_backward(grad, x, weight, bias, residual, mean, var, mask, activation, slope, eps, added)
        linear = activation in ("relu", "leaky_relu")
        inputs = dict(
            grad=self._in(grad), x=self._in(x), weight=_dense(weight), bias=_dense(bias), mean=guarded(mean), var=guarded(var),
            residual=self._maybe(residual) if added and not linear else None, mask=guarded(mask) if added and linear else None,
        )  # fmt: skip
        outputs = dict(grad_x=self._out(x), grad_residual=self._out(grad) if added else None)
        for name, parameter in (("grad_weight", weight), ("grad_bias", bias)):
            dtype = op.wide(x.dtype) if parameter is None else parameter.dtype
            outputs[name] = guarded(torch.full((x.shape[1],), float("nan"), dtype=dtype))
        self._norm_act("backward", inputs, outputs, weight, bias, activation, slope, eps, 0.0)
        if not added:
            outputs["grad_residual"] = grad.new_empty(0)
        return tuple(outputs[name] for name in ("grad_x", "grad_weight", "grad_bias", "grad_residual"))

    def _norm_act(
        self, direction: str, inputs: dict[str, Tensor | None], outputs: dict[str, Tensor | None], weight: Tensor | None,
        bias: Tensor | None, activation: str, slope: float, eps: float, noise_std: float,
    ) -> None:  # fmt: skip
        x = inputs["x"]
        assert x is not None
        runs, length = op.reference.norm_act_runs(x)
        rows = runs == 1 and length == x.numel()  # one run of memory, channels innermost
        n = x.numel() // max(x.shape[1], 1)
        wide = op.wide(x.dtype)
        arguments = Arguments(
            outer=n if rows else x.shape[0], channels=x.shape[1], inner=1 if rows else length, rows=rows,
            type=TYPES.index(x.dtype), act=ACTIVATIONS.index(activation), slope=slope, eps=eps, noise_std=noise_std,
            weight_type=TYPES.index(wide if weight is None else weight.dtype),
            bias_type=TYPES.index(wide if bias is None else bias.dtype),
        )  # fmt: skip
        size = self.emulator.library.emulated_norm_act_workspace(ctypes.byref(arguments))
        workspace = guarded(torch.full((size,), float("nan"), dtype=wide))
        tensors: dict[str, Any] = {**inputs, **outputs, "workspace": workspace}
        present = {name: t for name, t in tensors.items() if t is not None}
        for name, t in present.items():
            setattr(arguments, name, t.data_ptr())
        with self.emulator.watching(*present.values() if self.watch else []):
            self.emulator.call(f"emulated_norm_act_{direction}", ctypes.byref(arguments))

    def _maybe(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else self._in(t)


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else guarded(parameter.contiguous())


def _statistics(x: Tensor) -> dict[str, Tensor]:
    return {name: guarded(torch.full((x.shape[1],), float("nan"), dtype=op.wide(x.dtype))) for name in ("mean", "var")}
