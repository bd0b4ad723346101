"""norm_act: batch normalisation with batch statistics, an optional residual, an activation, its active elements and noise.

    z = (x - mean) / sqrt(var + eps) * weight + bias (+ residual)
    y = act(z) + noise_std * 1[not z <= 0] * xi,   active[c] = number of elements of channel c with not z <= 0

`mean` and `var` (biased) are taken over N and * of x (N, C, *), by a method that is as accurate where |mean| is much
larger than sqrt(var). Activations, `active` and `xi` are those of `ops.activation`.

    x: (N, C, *), at least two dimensions; float32, bfloat16, float16 or float64; contiguous or channels_last(_3d); more
        than one value a channel, or none. Arithmetic is in the wide type: float32 (float64 for float64).
    weight, bias: (C,) in x's dtype or the wide type, or None for 1 and 0. residual: like x, or None.
    y: like x. active: (C,) int64. mean, var: (C,) in the wide type, without a gradient; zeros if x is empty. var is NaN, and
        with it all of the channel (active then), where its sum of squares overflows the wide type: |x| around
        1e18 in float32. Another number of threads adds up in another order: the last bits of mean, var, the gradients and y,
        and counts where z is zero but for rounding, may differ. The same number gives the same bits.
    mask: for relu and leaky_relu with a residual: uint8, one bit an element in y's memory order, bit i % 8 of byte i // 8;
        in a contiguous x with planes of more than one element each plane begins a new byte: (N * C, ceil(plane / 8)),
        else (1, ceil(numel / 8)). Otherwise empty.
    seed: (1,) int64 on x's device, needed if noise_std > 0.

Equivalent to `reference.norm_act_forward`, `reference.norm_act_backward`.

Under torch.compile the op stays opaque: forward and backward of (128, 64, 28, 28) in float32 took 5.0 ms in NCHW and 4.8 in
channels_last, left to Inductor as batch_norm, relu and a count 62 and 67 (two Zen 4 cores, torch 2.14).

Bytes moved, in units of x, when x does not fit the caches: forward reads x twice (statistics, then y) and writes y once.
Nothing in between is stored: backward recomputes z from x, or reads the sign from the mask's bits where a residual
went into it (1/32 of x in float32; reading y would be a whole x), or adds the saved residual again for gelu and silu. It
reads x and grad twice and writes once; with a residual it writes the residual's gradient on the first pass and
reads that instead of grad on the second. Eager BatchNorm2d and ReLU read 4 and write 2 forward, read 6 and write 2
backward.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .activation import ACTIVATIONS, DTYPES, dtype_name, is_dense, memory_format, same_order, shape_text
from .out_of_memory import raise_out_of_memory

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

library = torch.library.Library("demp_kernels", "FRAGMENT")
library.define(
    "norm_act_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, str activation, float slope, float eps, "
    "float noise_std, Tensor? seed) -> (Tensor y, Tensor active, Tensor mean, Tensor var, Tensor mask)",
    tags=_TAGS,
)
library.define(
    "norm_act_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, Tensor var, "
    "Tensor mask, str activation, float slope, float eps, bool added) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    tags=_TAGS,
)
forward = torch.ops.demp_kernels.norm_act_forward.default
backward = torch.ops.demp_kernels.norm_act_backward.default

# ---------------------------------------------------------------------------------------------------------------
# checks: the compiled kernels make the same ones, with the same words
# ---------------------------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type the arithmetic is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    eps: float,
    noise_std: float,
    seed: Tensor | None,
) -> None:
    """Raise ValueError for the first argument of `forward` that is wrong."""
    _check_common(x, weight, bias, residual, activation, slope, eps)
    if not (noise_std >= 0 and math.isfinite(noise_std)):
        raise ValueError(f"norm_act: noise_std must be finite and >= 0, got {noise_std:g}")
    if noise_std > 0:
        if seed is None:
            raise ValueError("norm_act: seed is needed when noise_std > 0, got None")
        if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != x.device:
            raise ValueError(
                f"norm_act: seed must be int64 of shape (1,) on {x.device}, got {dtype_name(seed.dtype)} of shape "
                f"{shape_text(seed.shape)} on {seed.device}"
            )


def check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor,
    activation: str,
    slope: float,
    eps: float,
    added: bool,
) -> None:
    """Raise ValueError for the first argument of `backward` that is wrong."""
    _check_common(x, weight, bias, residual, activation, slope, eps)
    _check_like("grad", grad, x)
    for name, value in (("mean", mean), ("var", var)):
        if value.shape != (x.shape[1],) or value.dtype != wide(x.dtype):
            raise ValueError(
                f"norm_act: {name} must have shape ({x.shape[1]},) and dtype {dtype_name(wide(x.dtype))}, got shape "
                f"{shape_text(value.shape)} and dtype {dtype_name(value.dtype)}"
            )
        _check_device(name, value, x)
    if added and activation in ("relu", "leaky_relu"):
        if mask.dtype != torch.uint8 or mask.shape != mask_shape(x):
            raise ValueError(
                f"norm_act: mask must be uint8 of shape {shape_text(mask_shape(x))}, got {dtype_name(mask.dtype)} of "
                f"shape {shape_text(mask.shape)}"
            )
        _check_device("mask", mask, x)
    elif added and residual is None:
        raise ValueError(f"norm_act: residual is needed for {activation} where one was added, got None")


def _check_common(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str, slope: float, eps: float
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"norm_act: activation must be one of {', '.join(ACTIVATIONS)}, got {activation}")
    if x.dtype not in DTYPES:
        raise ValueError(f"norm_act: x must be float32, bfloat16, float16 or float64, got {dtype_name(x.dtype)}")
    if x.dim() < 2:
        raise ValueError(f"norm_act: x must have shape (N, C, *), got shape {shape_text(x.shape)}")
    if not is_dense(x):
        raise ValueError(f"norm_act: x must be contiguous or channels_last, got strides {shape_text(x.stride())}")
    if x.numel() and x.numel() == x.shape[1]:
        raise ValueError(f"norm_act: x must have more than one value per channel, got shape {shape_text(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and (value.shape != (x.shape[1],) or value.dtype not in (x.dtype, wide(x.dtype))):
            raise ValueError(
                f"norm_act: {name} must have shape ({x.shape[1]},) and dtype {dtype_name(x.dtype)} or "
                f"{dtype_name(wide(x.dtype))}, got shape {shape_text(value.shape)} and dtype {dtype_name(value.dtype)}"
            )
        if value is not None:
            _check_device(name, value, x)
    if residual is not None:
        _check_like("residual", residual, x)
    if not math.isfinite(slope):
        raise ValueError(f"norm_act: slope must be finite, got {slope:g}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"norm_act: eps must be finite and > 0, got {eps:g}")


def _check_device(name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(f"norm_act: {name} must be on {x.device}, got {value.device}")


def _check_like(name: str, value: Tensor, x: Tensor) -> None:
    _check_device(name, value, x)
    if value.dtype != x.dtype or value.shape != x.shape or not same_order(value, x):
        raise ValueError(
            f"norm_act: {name} must be like x ({dtype_name(x.dtype)}, shape {shape_text(x.shape)}, strides "
            f"{shape_text(x.stride())}), got {dtype_name(value.dtype)}, shape {shape_text(value.shape)}, strides "
            f"{shape_text(value.stride())}"
        )


def mask_shape(x: Tensor) -> tuple[int, int]:
    """Shape of the mask of a dense x."""
    runs, length = reference.norm_act_runs(x)
    return runs, (length + 7) // 8


# ---------------------------------------------------------------------------------------------------------------
# the reference on every device; shapes and strides for tracing
# ---------------------------------------------------------------------------------------------------------------


def _reference_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_forward(*arguments)
    return reference.norm_act_forward(*arguments)


def _reference_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_backward(*arguments)
    return reference.norm_act_backward(*arguments)


library.impl("norm_act_forward", _reference_forward, "CompositeExplicitAutograd")
library.impl("norm_act_backward", _reference_backward, "CompositeExplicitAutograd")


def _fake_forward(x: Tensor, *arguments: Any):
    check_forward(x, *arguments)
    residual, activation = arguments[2:4]
    channels, statistics = x.shape[1], wide(x.dtype)
    bits = residual is not None and activation in ("relu", "leaky_relu")
    return (
        torch.empty_like(x),
        x.new_empty(channels, dtype=torch.int64),
        x.new_empty(channels, dtype=statistics),
        x.new_empty(channels, dtype=statistics),
        x.new_empty(mask_shape(x) if bits else 0, dtype=torch.uint8),
    )


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *arguments: Any):
    check_backward(grad, x, weight, bias, *arguments)
    per_channel = [x.new_empty(x.shape[1], dtype=wide(x.dtype) if p is None else p.dtype) for p in (weight, bias)]
    added = arguments[-1]
    return torch.empty_like(x), *per_channel, torch.empty_like(grad) if added else grad.new_empty(0)


torch.library.register_fake("demp_kernels::norm_act_forward", _fake_forward, lib=library)
torch.library.register_fake("demp_kernels::norm_act_backward", _fake_backward, lib=library)

# ---------------------------------------------------------------------------------------------------------------
# autograd
# ---------------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple, mean: Tensor, var: Tensor, mask: Tensor) -> None:
    x, weight, bias, residual, ctx.activation, ctx.slope, ctx.eps, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.added, ctx.memory_format = residual is not None, memory_format(x)
    if ctx.activation in ("relu", "leaky_relu"):
        residual = None  # the mask says what it is needed for
    ctx.save_for_backward(x, weight, bias, residual, mean, var, mask)


def _setup_forward(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, active, mean, var, mask = output
    ctx.mark_non_differentiable(active, mean, var, mask)
    _save(ctx, inputs, mean, var, mask)


def _backward_forward(ctx: Any, grad: Tensor | None, *_: Any):
    if grad is None:
        return (None,) * 9
    x, weight, bias, residual, mean, var, mask = ctx.saved_tensors
    arguments = (
        grad.contiguous(memory_format=ctx.memory_format), x, weight, bias, residual, mean, var, mask, ctx.activation, ctx.slope,
        ctx.eps, ctx.added,
    )
    try:
        if torch.is_grad_enabled():  # to be differentiated again
            grad_x, grad_weight, grad_bias, grad_residual = backward(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grad_x, grad_weight, grad_bias, grad_residual = backward(*arguments)
    except RuntimeError as error:
        raise_out_of_memory(error, grad)
        raise
    return (
        grad_x,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
        grad_residual if ctx.added else None,
        *[None] * 5,
    )


torch.library.register_autograd(
    "demp_kernels::norm_act_forward", _backward_forward, setup_context=_setup_forward, lib=library
)


class Forward(torch.autograd.Function):
    """`forward` for eager autograd: returns (y, active, mean, var).

    The formula is the one registered for the op. Calling it from here, below the autograd key, is for speed: see
    `activation.Forward`.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, active, mean, var, mask = forward(*inputs)
        ctx.mark_non_differentiable(active, mean, var)
        _save(ctx, inputs, mean, var, mask)
        return y, active, mean, var

    backward = staticmethod(_backward_forward)


def _setup_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.arguments = inputs[8:]


def _backward_backward(ctx: Any, *grads: Tensor):
    """Gradients of the gradients, through the reference. Rare (gradient penalties), so written for brevity.

    mean and var are recomputed from x, so that their dependence on it is part of x's gradient. Raises RuntimeError where they
    are to be differentiated once more.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("norm_act: third derivatives are not there; create_graph must be False in the second backward")
    grad, x, weight, bias, residual, _, _, mask = ctx.saved_tensors
    with torch.enable_grad():
        leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in (grad, x, weight, bias, residual)]
        arguments = [*leaves, *reference.norm_act_statistics(leaves[1]), mask, *ctx.arguments]
        outputs = reference.norm_act_backward(*arguments)
        pairs = [(o, g) for o, g in zip(outputs, grads) if o.requires_grad and g is not None]
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    by_leaf = dict(zip(map(id, wanted), found))
    return *[by_leaf.get(id(leaf)) for leaf in leaves], *[None] * 7


torch.library.register_autograd(
    "demp_kernels::norm_act_backward", _backward_backward, setup_context=_setup_backward, lib=library
)
