"""activation: act(x), the active elements of every channel, and noise on the active ones, in one pass.

    y = act(x) + noise_std * 1[not x <= 0] * xi,   active[c] = number of elements of channel c with not x <= 0

`not x <= 0` rather than `x > 0`, so that NaN counts as active: a diverged unit is never taken for a dead one.

`activation` is relu, leaky_relu (x if x > 0 else slope * x), gelu, gelu_tanh or silu. `xi` are standard normals that
depend on the seed and the element's coordinates alone (`reference.noise`).

    x: (N, C, *) or any shape of at least two dimensions with the channels in `channel_dim`; float32, bfloat16, float16 or
        float64; contiguous, or channels_last(_3d) with channel_dim 1. Arithmetic is in float32 (float64 for float64).
    y: like x. active: (C,) int64.
    mask: with noise, for relu and leaky_relu: uint8, one bit an element in y's memory order (bit i % 8 of byte i // 8),
        which backward uses, because the sign of a noisy y is not that of x. Otherwise empty.
    seed: (1,) int64 on x's device, needed if noise_std > 0.

Equivalent to `reference.activation_forward`, `reference.activation_backward`.

Under torch.compile the op stays opaque. Left to Inductor as relu and (~(x <= 0)).sum, forward and backward of
(128, 64, 28, 28) in float32 took 45 ms in NCHW and 49 in channels_last, opaque 3.4 and 4.3; of (4, 64, 32, 32) 2.0 and 2.4,
opaque 0.37 and 0.36 (two Zen 4 cores, torch 2.14). `demp bench activation` measures both: `compile` and `demp_compile`.

`count_` adds the counts alone to counters that are there:

    activation_count_(x, channel_dim, active, seen): active[c] += number of elements of channel c with not x <= 0,
    seen += elements of a channel (if it is given). active: (C,) int64. seen: () int64 or None.

With it relu of a tiny tensor on the CPU is torch.relu and a second look at x: where autograd's Python part costs more than the
work does (`functional.is_tiny`).

The backward pass keeps grad where `not saved <= 0`. Between the passes lies what PyTorch's own activations keep, so that the
same tensors may be freed or overwritten meanwhile: y for relu and whatever was done in place, x for the others.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .out_of_memory import raise_out_of_memory

ACTIVATIONS = ("relu", "leaky_relu", "gelu", "gelu_tanh", "silu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

library = torch.library.Library("demp_kernels", "FRAGMENT")
_ARGUMENTS = "str activation, float slope, int channel_dim, float noise_std, Tensor? seed"
library.define(f"activation_forward(Tensor x, {_ARGUMENTS}) -> (Tensor y, Tensor active, Tensor mask)", tags=_TAGS)
library.define(f"activation_forward_(Tensor(a!) x, {_ARGUMENTS}) -> (Tensor active, Tensor mask)", tags=_TAGS)
library.define(
    "activation_backward(Tensor grad, Tensor saved, Tensor mask, str activation, float slope) -> Tensor", tags=_TAGS
)
library.define(
    "activation_count_(Tensor x, int channel_dim, Tensor(a!) active, Tensor(b!)? seen) -> ()", tags=_TAGS
)
forward = torch.ops.demp_kernels.activation_forward.default
forward_ = torch.ops.demp_kernels.activation_forward_.default
backward = torch.ops.demp_kernels.activation_backward.default
count_ = torch.ops.demp_kernels.activation_count_.default

# ---------------------------------------------------------------------------------------------------------------
# checks: the compiled kernels make the same ones, with the same words
# ---------------------------------------------------------------------------------------------------------------


def check_forward(
    x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None
) -> None:
    """Raise ValueError for the first argument of `forward` that is wrong."""
    _check_activation(activation)
    if x.dtype not in DTYPES:
        raise ValueError(f"activation: x must be float32, bfloat16, float16 or float64, got {dtype_name(x.dtype)}")
    if x.dim() < 2:
        raise ValueError(f"activation: x must have a channel dimension, got shape {shape_text(x.shape)}")
    if not -x.dim() <= channel_dim < x.dim():
        raise ValueError(
            f"activation: channel_dim must be between {-x.dim()} and {x.dim() - 1} for x of shape "
            f"{shape_text(x.shape)}, got {channel_dim}"
        )
    if not is_usable(x, channel_dim):
        raise ValueError(
            f"activation: x must be contiguous, or channels_last with channel_dim 1, got strides {shape_text(x.stride())}"
        )
    if not math.isfinite(slope):
        raise ValueError(f"activation: slope must be finite, got {slope:g}")
    if not (noise_std >= 0 and math.isfinite(noise_std)):
        raise ValueError(f"activation: noise_std must be finite and >= 0, got {noise_std:g}")
    if noise_std > 0:
        if seed is None:
            raise ValueError("activation: seed is needed when noise_std > 0, got None")
        if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != x.device:
            raise ValueError(
                f"activation: seed must be int64 of shape (1,) on {x.device}, got {dtype_name(seed.dtype)} of shape "
                f"{shape_text(seed.shape)} on {seed.device}"
            )


def check_forward_(
    x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None
) -> None:
    """Raise ValueError for the first argument of `forward_` that is wrong."""
    check_forward(x, activation, slope, channel_dim, noise_std, seed)
    if activation not in ("relu", "leaky_relu"):
        raise ValueError(f"activation: only relu and leaky_relu can be done in place, got {activation}")
    if activation == "leaky_relu" and not slope > 0:
        raise ValueError(f"activation: slope must be > 0 in place, got {slope:g}")


def check_count_(x: Tensor, channel_dim: int, active: Tensor, seen: Tensor | None) -> None:
    """Raise ValueError for the first argument of `count_` that is wrong."""
    check_forward(x, "relu", 0.0, channel_dim, 0.0, None)
    channels = x.shape[channel_dim]
    for name, counter in (("active", active), ("seen", seen)):
        if counter is not None and counter.device != x.device:
            raise ValueError(f"activation: {name} must be on {x.device}, got {counter.device}")
    if active.dtype != torch.int64 or active.shape != (channels,) or not active.is_contiguous():
        raise ValueError(
            f"activation: active must be contiguous int64 of shape ({channels},), got {dtype_name(active.dtype)} of shape "
            f"{shape_text(active.shape)}"
        )
    if seen is not None and (seen.dtype != torch.int64 or seen.dim() != 0):
        raise ValueError(
            f"activation: seen must be int64 of shape (), got {dtype_name(seen.dtype)} of shape {shape_text(seen.shape)}"
        )


def check_backward(grad: Tensor, saved: Tensor, mask: Tensor, activation: str, slope: float) -> None:
    """Raise ValueError for the first argument of `backward` that is wrong."""
    _check_activation(activation)
    if grad.dtype not in DTYPES:
        raise ValueError(f"activation: grad must be float32, bfloat16, float16 or float64, got {dtype_name(grad.dtype)}")
    if not is_dense(grad):
        raise ValueError(f"activation: grad must be contiguous or channels_last, got strides {shape_text(grad.stride())}")
    if mask.dtype != torch.uint8:
        raise ValueError(f"activation: mask must be uint8, got {dtype_name(mask.dtype)}")
    for name, tensor in (("saved", saved), ("mask", mask)):
        if tensor.device != grad.device:
            raise ValueError(f"activation: {name} must be on {grad.device}, got {tensor.device}")
    if mask.numel() > 0 and activation in ("relu", "leaky_relu"):
        if mask.numel() != (grad.numel() + 7) // 8:
            raise ValueError(
                f"activation: mask must have {(grad.numel() + 7) // 8} bytes for grad of shape "
                f"{shape_text(grad.shape)}, got {mask.numel()}"
            )
        return
    if saved.dtype != grad.dtype or saved.shape != grad.shape or not same_order(saved, grad):
        raise ValueError(
            f"activation: saved must be like grad ({dtype_name(grad.dtype)}, shape {shape_text(grad.shape)}, strides "
            f"{shape_text(grad.stride())}), got {dtype_name(saved.dtype)}, shape {shape_text(saved.shape)}, strides "
            f"{shape_text(saved.stride())}"
        )


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: activation must be one of {', '.join(ACTIVATIONS)}, got {activation}")


def is_dense(x: Tensor) -> bool:
    """Contiguous or channels_last(_3d)."""
    return x.is_contiguous() or (x.dim() in _CHANNELS_LAST and x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()]))


def is_usable(x: Tensor, channel_dim: int) -> bool:
    """There are kernels for x as it is: contiguous, or channels_last(_3d) with the channels in dimension 1."""
    return x.is_contiguous() or (channel_dim % x.dim() == 1 and is_dense(x))


def same_order(a: Tensor, b: Tensor) -> bool:
    """Two dense tensors of one shape hold their elements in the same order."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    last = _CHANNELS_LAST.get(a.dim())
    return last is not None and a.is_contiguous(memory_format=last) and b.is_contiguous(memory_format=last)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a dense tensor."""
    return torch.contiguous_format if x.is_contiguous() else _CHANNELS_LAST[x.dim()]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(shape: tuple[int, ...]) -> str:
    """(3,) and (2, 3), the way Python prints tuples."""
    return str(tuple(shape))


# ---------------------------------------------------------------------------------------------------------------
# the reference on every device; shapes and strides for tracing
# ---------------------------------------------------------------------------------------------------------------


def _reference_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_forward(x, *arguments)
    return reference.activation_forward(x, *arguments)


def _reference_forward_(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    check_forward_(x, *arguments)
    return reference.activation_forward_(x, *arguments)


def _reference_backward(grad: Tensor, *arguments: Any) -> Tensor:
    check_backward(grad, *arguments)
    return reference.activation_backward(grad, *arguments)


def _reference_count_(x: Tensor, channel_dim: int, active: Tensor, seen: Tensor | None) -> None:
    check_count_(x, channel_dim, active, seen)
    reference.activation_count_(x, channel_dim, active, seen)


library.impl("activation_forward", _reference_forward, "CompositeExplicitAutograd")
library.impl("activation_forward_", _reference_forward_, "CompositeExplicitAutograd")
library.impl("activation_backward", _reference_backward, "CompositeExplicitAutograd")
library.impl("activation_count_", _reference_count_, "CompositeExplicitAutograd")
library.impl("activation_count_", torch.library.fallthrough_kernel, "Autograd")  # integers: nothing to be followed


def _fake_forward_(x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None):
    check_forward(x, activation, slope, channel_dim, noise_std, seed)
    bits = noise_std > 0 and activation in ("relu", "leaky_relu")
    mask = x.new_empty((x.numel() + 7) // 8 if bits else 0, dtype=torch.uint8)
    return x.new_empty(x.shape[channel_dim], dtype=torch.int64), mask


def _fake_forward(x: Tensor, *arguments: Any):
    return torch.empty_like(x), *_fake_forward_(x, *arguments)


def _fake_backward(grad: Tensor, *arguments: Any):
    check_backward(grad, *arguments)
    return torch.empty_like(grad)


torch.library.register_fake("demp_kernels::activation_forward", _fake_forward, lib=library)
torch.library.register_fake("demp_kernels::activation_forward_", _fake_forward_, lib=library)
torch.library.register_fake("demp_kernels::activation_backward", _fake_backward, lib=library)
torch.library.register_fake("demp_kernels::activation_count_", check_count_, lib=library)

# ---------------------------------------------------------------------------------------------------------------
# autograd
# ---------------------------------------------------------------------------------------------------------------


def _save(ctx: Any, x: Tensor, y: Tensor, mask: Tensor, activation: str, slope: float) -> None:
    """Keep what backward needs and no more: the bits if there are any, else y or x (in place both are y)."""
    ctx.set_materialize_grads(False)
    ctx.activation, ctx.slope, ctx.memory_format = activation, slope, memory_format(y)
    if mask.numel():
        ctx.save_for_backward(None, mask)
    elif activation == "relu":
        ctx.save_for_backward(y, mask)
    else:
        ctx.save_for_backward(x, mask)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None, None, None]:
    if grad is None:
        return None, None, None, None, None, None
    saved, mask = ctx.saved_tensors
    if saved is None:
        saved = mask.new_empty(0, dtype=grad.dtype)
    apply = Gradient.apply if torch.is_grad_enabled() else backward
    try:
        grad_x = apply(grad.contiguous(memory_format=ctx.memory_format), saved, mask, ctx.activation, ctx.slope)
    except RuntimeError as error:
        raise_out_of_memory(error, grad)
        raise
    return grad_x, None, None, None, None, None


class Gradient(torch.autograd.Function):
    """`backward` where its result is to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, saved: Tensor, mask: Tensor, activation: str, slope: float) -> Tensor:
        ctx.activation, ctx.slope, ctx.memory_format = activation, slope, memory_format(grad)
        ctx.save_for_backward(grad, saved, mask)
        return backward(grad, saved, mask, activation, slope)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad, saved, mask = ctx.saved_tensors
        grad_grad = grad_grad.contiguous(memory_format=ctx.memory_format)
        to_saved = None
        if ctx.activation not in ("relu", "leaky_relu"):
            second = reference.activation_second_derivative(saved, ctx.activation)
            to_saved = (second * grad * grad_grad).to(saved.dtype)  # from the wide factor on: two of float16 may overflow
        return backward(grad_grad, saved, mask, ctx.activation, ctx.slope), to_saved, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, _, mask = output
    _save(ctx, inputs[0], y, mask, inputs[1], inputs[2])


torch.library.register_autograd(
    "demp_kernels::activation_forward", _backward, setup_context=_setup_context, lib=library
)


class Forward(torch.autograd.Function):
    """`forward` for eager autograd: returns (y, active).

    The formula is the one registered for the op. Calling it from here, below the autograd key, is for speed: a forward
    and backward of a tiny tensor costs 154 us through the registered one and 68 us through this (27 us for torch.relu).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, active, mask = forward(x, activation, slope, channel_dim, noise_std, seed)
        _save(ctx, x, y, mask, activation, slope)
        return y, active

    backward = staticmethod(_backward)


class InPlace(torch.autograd.Function):
    """`forward_` for eager autograd: returns (x, active), with x overwritten."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            active, mask = forward_(x, activation, slope, channel_dim, noise_std, seed)
        ctx.mark_dirty(x)
        _save(ctx, x, x, mask, activation, slope)
        return x, active

    backward = staticmethod(_backward)
