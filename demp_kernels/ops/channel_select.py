"""channel_select: channels in another order, zero where there is none; how a skip meets a block that kept other units.

    y[:, c] = x[:, index[c]] where index[c] >= 0, else 0

    x: any shape with C_in channels in dimension `channel_dim`, any dtype, any strides (contiguous and channels_last
        are kept in y).
    index: (C_out,) int64, each value in [-1, C_in), none but -1 twice. Its values are not looked at on a GPU.
    inverse: (C_in,) int64, the inverse map: position in y of each channel of x, or -1.
    y: like x with C_out channels.

The gradient is channel_select(grad, inverse, index, channel_dim). Equivalent to `reference.channel_select`.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .activation import dtype_name, shape_text
from .out_of_memory import raise_out_of_memory

library = torch.library.Library("demp_kernels", "FRAGMENT")
library.define(
    "channel_select(Tensor x, Tensor index, Tensor inverse, int channel_dim) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
channel_select = torch.ops.demp_kernels.channel_select.default


def check(x: Tensor, index: Tensor, inverse: Tensor, channel_dim: int) -> None:
    """Raise ValueError for the first argument that is wrong. The compiled kernel uses the same words."""
    if not -x.dim() <= channel_dim < x.dim():
        raise ValueError(
            f"channel_select: channel_dim must be a dimension of x of shape {shape_text(x.shape)}, got {channel_dim}"
        )
    for name, tensor in (("index", index), ("inverse", inverse)):
        if tensor.dim() != 1 or tensor.dtype != torch.int64 or tensor.device != x.device:
            raise ValueError(
                f"channel_select: {name} must be a 1-D int64 tensor on {x.device}, got {dtype_name(tensor.dtype)} of "
                f"shape {shape_text(tensor.shape)} on {tensor.device}"
            )
    if inverse.numel() != x.shape[channel_dim]:
        raise ValueError(
            f"channel_select: inverse must have an entry for each of the {x.shape[channel_dim]} channels of x, got "
            f"{inverse.numel()}"
        )


def _reference(x: Tensor, index: Tensor, inverse: Tensor, channel_dim: int) -> Tensor:
    check(x, index, inverse, channel_dim)
    return reference.channel_select(x, index, channel_dim)


def _fake(x: Tensor, index: Tensor, inverse: Tensor, channel_dim: int) -> Tensor:
    check(x, index, inverse, channel_dim)
    shape = list(x.shape)
    shape[channel_dim] = index.shape[0]
    return x.new_empty(shape).contiguous(memory_format=reference.memory_format(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, inverse, ctx.channel_dim = inputs
    ctx.save_for_backward(index, inverse)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    index, inverse = ctx.saved_tensors
    try:
        return channel_select(grad, inverse, index, ctx.channel_dim), None, None, None
    except RuntimeError as error:
        raise_out_of_memory(error, grad)
        raise


library.impl("channel_select", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("demp_kernels::channel_select", _fake, lib=library)
torch.library.register_autograd(
    "demp_kernels::channel_select", _backward, setup_context=_setup_context, lib=library
)
