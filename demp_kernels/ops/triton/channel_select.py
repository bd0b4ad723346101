"""channel_select in Triton; see `demp_kernels/ops/channel_select.py` for what it computes.

The gather of `compact` over the columns of (outer, channels, inner). Indices are not looked at on the host; one out of
range, -1 above all, reads as zeros.
"""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import reference
from ..channel_select import check
from .compact import BLOCK, UNITS, check_rows, gather_step, unit_of
from .launch import on_device_of, wanted_programs

_VIEWS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@triton.jit
def _select(source, target, index, outer, source_columns, target_columns, column_units, BLOCK: tl.constexpr):
    # tl.cast: an argument that is 1 is a number of Python's here, which has no `.to`
    rows = tl.cast(outer, tl.int64)
    columns = tl.cast(target_columns, tl.int64)
    units = tl.cast(column_units, tl.int64)
    total = rows * columns * units
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, total, tl.num_programs(0) * BLOCK):
        gather_step(
            source, target, index, index, False, True, rows, rows, rows * 0 + 1, tl.cast(source_columns, tl.int64), columns,
            units, start, BLOCK,
        )  # fmt: skip


def channel_select(x: Tensor, index: Tensor, inverse: Tensor, channel_dim: int) -> Tensor:
    check(x, index, inverse, channel_dim)
    channel_dim %= x.dim()
    format = reference.memory_format(x)
    last = format != torch.contiguous_format and channel_dim == 1
    source = x if last else x.contiguous()
    shape = list(x.shape)
    channels, shape[channel_dim] = shape[channel_dim], index.numel()
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format if last else torch.contiguous_format)
    if y.numel():
        others = [size for d, size in enumerate(shape) if d != channel_dim]
        inner = 1 if last else math.prod(others[channel_dim:])
        column_bytes = inner * x.element_size()
        unit = unit_of(column_bytes, source, y)
        check_rows("channel_select: x", x, index.numel() * column_bytes // unit)
        programs = max(1, min(triton.cdiv(y.numel() * x.element_size() // unit, BLOCK), 2 * wanted_programs(x)))
        with on_device_of(x):
            _select[(programs,)](
                _units(source, unit), _units(y, unit), index.contiguous(), math.prod(others) // inner, channels,
                index.numel(), column_bytes // unit, BLOCK=BLOCK,
            )
    return y if last or format == torch.contiguous_format else y.contiguous(memory_format=format)


def _units(t: Tensor, unit: int) -> Tensor:
    """The memory of a dense tensor as integers of `unit` bytes."""
    return t.as_strided((t.numel(),), (1,)).view(torch.uint8).view(_VIEWS[unit])


assert set(_VIEWS) == set(UNITS)
