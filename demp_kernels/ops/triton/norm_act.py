"""norm_act in Triton; see `demp_kernels/ops/norm_act.py` for what it computes.

Each direction is three launches: a pass over x whose programs leave parts of every channel's sums, a kernel that combines
the parts in a fixed order, a pass that writes the output. Bytes moved are the native kernel's, and no sum of floats is
atomic: on one device results do not change from run to run.

Planes (contiguous, several elements a channel): program (c, s) stays in channel c and walks blocks of its positions, planes
filled up to whole bytes of the mask. Rows (channels innermost): program (b, s) keeps a block of channels and walks down the
rows. Where rows are no whole bytes (channels no multiple of 8) a kernel of its own writes the mask.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import memory_format
from ..norm_act import check_backward, check_forward, mask_shape
from ..norm_act import wide as wide_dtype
from .activation import _derivative, _pack, _value
from .launch import on_device_of, wanted_programs, wide
from .noise import normals

# Tunables. Four warps and 1024 elements give a thread 8: one or two 16-byte accesses; rows are read 64 channels wide, whole
# cache lines. Backward holds twice the operands. Chosen by that reasoning; no GPU has timed them yet.
BLOCK = 1024
COLUMNS = 64
COMBINED = 8  # channels of a program that combines parts: 32 bytes of every row of them
PARTS = 64  # of a channel, at a time
LINEAR = ("relu", "leaky_relu")


# ---- places ----------------------------------------------------------------------------------------------------------
# A block is (ROWS, CHANNELS): (BLOCK, 1) for planes, whose rows are positions, and (BLOCK / columns, columns) for rows.


@triton.jit
def _padded(inner):
    """Positions of a plane up to whole bytes of the mask. In 64 bits: the last few of 32 have no place for the 7."""
    return (tl.cast(inner, tl.int64) + 7) // 8 * 8


@triton.jit
def _positions(start, outer, inner, ROWS: tl.constexpr, PLANES: tl.constexpr):
    """Plane and place of ROWS positions from `start` on, and which of them exist."""
    position = start + tl.arange(0, ROWS)
    if PLANES:
        padded = _padded(inner)
        plane = position // padded
        place = position - plane * padded
        return plane, place, (plane < outer) & (place < inner)
    else:
        return position, position * 0, position < outer


@triton.jit
def _addresses(plane, place, inside, column, channels, inner):
    at = (plane[:, None] * channels + column[None, :]) * inner + place[:, None]
    return at, inside[:, None] & (column < channels)[None, :]


@triton.jit
def _total(outer, inner, PLANES: tl.constexpr):
    # tl.cast: the product of two 32-bit sizes may need more bits, and an argument that is 1 has no `.to`
    return tl.cast(outer, tl.int64) * _padded(inner) if PLANES else outer


# ---- channels --------------------------------------------------------------------------------------------------------


@triton.jit
def _affine(mean, var, weight, bias, column, known, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr):
    """mean, scale, bias and 1 / sqrt(var + eps): z = (x - mean) * scale + bias."""
    center = tl.load(mean + column, mask=known, other=0.0)
    invstd = 1.0 / tl.sqrt(tl.load(var + column, mask=known, other=1.0) + tl.full((), eps, WIDE))
    scale = invstd
    if HAS_WEIGHT:
        scale = invstd * tl.load(weight + column, mask=known, other=0.0).to(WIDE)
    offset = tl.zeros_like(center)
    if HAS_BIAS:
        offset = tl.load(bias + column, mask=known, other=0.0).to(WIDE)
    return center, scale, offset, invstd


@triton.jit
def _z(value, residual, at, known, center, scale, offset, ADDED: tl.constexpr, WIDE: tl.constexpr):
    # Forward and backward contract this alike, so that they agree on the sign.
    z = tl.fma(value - center[None, :], scale[None, :] + tl.zeros_like(value), offset[None, :] + tl.zeros_like(value))
    if ADDED:
        z += tl.load(residual + at, mask=known, other=0.0).to(WIDE)
    return z


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _statistics(
    x, partial, outer, channels, inner,
    PLANES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Parts of count, mean and sum of squared deviations of x - (the channel's first element): Welford's update in every
    lane, then the lanes together. partial: (3, splits, channels)."""
    column = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.load(x + column * inner, mask=column < channels, other=0.0).to(WIDE)
    count = tl.zeros((ROWS, CHANNELS), WIDE)
    mean = tl.zeros((ROWS, CHANNELS), WIDE)
    m2 = tl.zeros((ROWS, CHANNELS), WIDE)
    for start in range(tl.program_id(1).to(tl.int64) * ROWS, _total(outer, inner, PLANES), tl.num_programs(1) * ROWS):
        plane, place, inside = _positions(start, outer, inner, ROWS, PLANES)
        at, known = _addresses(plane, place, inside, column, channels, inner)
        value = tl.load(x + at, mask=known, other=0.0).to(WIDE) - first[None, :]
        count += known.to(WIDE)
        delta = tl.where(known, value - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)
        m2 += delta * tl.where(known, value - mean, 0.0)
    n = tl.sum(count, axis=0)
    together = tl.sum(count * mean, axis=0) / tl.maximum(n, 1.0)
    apart = mean - together[None, :]
    squares = tl.sum(m2 + count * apart * apart, axis=0)
    out = partial + tl.program_id(1).to(tl.int64) * channels + column
    step = tl.num_programs(1).to(tl.int64) * channels
    tl.store(out, n, mask=column < channels)
    tl.store(out + step, together, mask=column < channels)
    tl.store(out + 2 * step, squares, mask=column < channels)


@triton.jit
def _parts(start, splits, column, channels, SPLITS: tl.constexpr):
    """Where SPLITS parts of every channel are, and which of them exist."""
    split = start + tl.arange(0, SPLITS)
    at = split.to(tl.int64)[:, None] * channels + column[None, :]
    return at, (split < splits)[:, None] & (column < channels)[None, :]


@triton.jit
def _combine_statistics(
    x, partial, mean, var, active, splits, part, channels, inner, WIDE: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Mean and variance of CHANNELS channels from their parts, each of `part` numbers a kind; the counters are set to 0."""
    column = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    counts = tl.zeros((SPLITS, CHANNELS), WIDE)
    weighted = tl.zeros((SPLITS, CHANNELS), WIDE)
    for start in range(0, splits, SPLITS):
        at, known = _parts(start, splits, column, channels, SPLITS)
        count = tl.load(partial + at, mask=known, other=0.0)
        counts += count
        weighted += count * tl.load(partial + part + at, mask=known, other=0.0)
    n = tl.maximum(tl.sum(counts, axis=0), 1.0)
    together = tl.sum(weighted, axis=0) / n
    squares = tl.zeros((SPLITS, CHANNELS), WIDE)
    for start in range(0, splits, SPLITS):
        at, known = _parts(start, splits, column, channels, SPLITS)
        apart = tl.load(partial + part + at, mask=known, other=0.0) - together[None, :]
        squares += tl.load(partial + part + part + at, mask=known, other=0.0)
        squares += tl.load(partial + at, mask=known, other=0.0) * apart * apart
    first = tl.load(x + column * inner, mask=column < channels, other=0.0).to(WIDE)
    tl.store(mean + column, first + together, mask=column < channels)
    variance = tl.sum(squares, axis=0) / n
    # NaN where it is infinite: divided by that, z would be the bias, and a unit that diverged could look dead
    tl.store(var + column, variance + (variance - variance), mask=column < channels)
    tl.store(active + column, tl.zeros((CHANNELS,), tl.int64), mask=column < channels)


@triton.jit
def _normalise(
    x, residual, weight, bias, mean, var, y, active, mask, seed, outer, channels, inner, slope, eps, noise_std,
    ACTIVATION: tl.constexpr, ADDED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, NOISE: tl.constexpr,
    MASK: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    center, scale, offset, _ = _affine(mean, var, weight, bias, column, column < channels, eps, HAS_WEIGHT, HAS_BIAS, WIDE)
    slope = tl.full((), slope, WIDE)
    noise_std = tl.full((), noise_std, WIDE)
    count = tl.zeros((ROWS, CHANNELS), tl.int32)
    for start in range(tl.program_id(1).to(tl.int64) * ROWS, _total(outer, inner, PLANES), tl.num_programs(1) * ROWS):
        plane, place, inside = _positions(start, outer, inner, ROWS, PLANES)
        at, known = _addresses(plane, place, inside, column, channels, inner)
        value = tl.load(x + at, mask=known, other=0.0).to(WIDE)
        z = _z(value, residual, at, known, center, scale, offset, ADDED, WIDE)
        live = ((z <= 0) == 0) & known
        count += live.to(tl.int32)
        result = _value(z, slope, ACTIVATION)
        if NOISE:
            position = (plane * inner + place)[:, None] + tl.zeros_like(at)
            z0, z1, z2, z3 = normals(position // 4, column[None, :] + tl.zeros_like(at), 0, tl.load(seed))
            lane = position % 4
            xi = tl.where(lane < 2, tl.where(lane == 0, z0, z1), tl.where(lane == 2, z2, z3))
            result += tl.where(live, xi.to(WIDE) * noise_std, 0.0)
        tl.store(y + at, result.to(y.dtype.element_ty), mask=known)
        if MASK:
            if PLANES:
                padded = _padded(inner) // 8
                eighth = start // 8 + tl.arange(0, ROWS // 8)
                of_plane = eighth // padded
                byte = (of_plane * channels + tl.program_id(0)) * padded + eighth - of_plane * padded
                tl.store(mask + byte, _pack(tl.reshape(live, (ROWS // 8, 8)), 1), mask=of_plane < outer)
            else:
                eighth = tl.program_id(0).to(tl.int64) * CHANNELS + 8 * tl.arange(0, CHANNELS // 8)
                byte = (plane[:, None] * channels + eighth[None, :]) // 8
                packed = _pack(tl.reshape(live, (ROWS, CHANNELS // 8, 8)), 2)
                tl.store(mask + byte, packed, mask=inside[:, None] & (eighth < channels)[None, :])
    tl.atomic_add(active + column, tl.sum(count, axis=0).to(tl.int64), mask=column < channels)


@triton.jit
def _bits(
    x, residual, weight, bias, mean, var, mask, elements, channels, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mask of rows that are no whole bytes."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    known = at < elements
    center, scale, offset, _ = _affine(mean, var, weight, bias, at % channels, known, eps, HAS_WEIGHT, HAS_BIAS, WIDE)
    z = tl.fma(tl.load(x + at, mask=known, other=0.0).to(WIDE) - center, scale, offset)
    z += tl.load(residual + at, mask=known, other=0.0).to(WIDE)
    live = ((z <= 0) == 0) & known
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    tl.store(mask + byte, _pack(tl.reshape(live, (BLOCK // 8, 8)), 1), mask=byte * 8 < elements)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _dz(
    grad, residual, mask, value, plane, place, at, known, column, channels, inner, center, scale, offset, slope,
    ACTIVATION: tl.constexpr, ADDED: tl.constexpr, FROM_BITS: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad * act'(z)."""
    g = tl.load(grad + at, mask=known, other=0.0).to(WIDE)
    if ACTIVATION == "relu" or ACTIVATION == "leaky_relu":
        if FROM_BITS:
            bit = at
            if PLANES:
                bit = (plane[:, None] * channels + column[None, :]) * _padded(inner) + place[:, None]
            live = ((tl.load(mask + (bit >> 3), mask=known, other=0).to(tl.int32) >> (bit & 7).to(tl.int32)) & 1) == 1
        else:
            live = (_z(value, residual, at, known, center, scale, offset, False, WIDE) <= 0) == 0
        return tl.where(live, g, 0.0 if ACTIVATION == "relu" else g * slope)
    else:
        return g * _derivative(_z(value, residual, at, known, center, scale, offset, ADDED, WIDE), ACTIVATION)


@triton.jit
def _sums(
    grad, x, residual, mask, weight, bias, mean, var, grad_residual, partial, outer, channels, inner, slope, eps,
    ACTIVATION: tl.constexpr, ADDED: tl.constexpr, FROM_BITS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    PLANES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Parts of the sums of dz and dz * (x - mean), (2, splits, channels); dz is the residual's gradient."""
    column = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    center, scale, offset, _ = _affine(mean, var, weight, bias, column, column < channels, eps, HAS_WEIGHT, HAS_BIAS, WIDE)
    slope = tl.full((), slope, WIDE)
    plain = tl.zeros((ROWS, CHANNELS), WIDE)
    centred = tl.zeros((ROWS, CHANNELS), WIDE)
    for start in range(tl.program_id(1).to(tl.int64) * ROWS, _total(outer, inner, PLANES), tl.num_programs(1) * ROWS):
        plane, place, inside = _positions(start, outer, inner, ROWS, PLANES)
        at, known = _addresses(plane, place, inside, column, channels, inner)
        value = tl.load(x + at, mask=known, other=0.0).to(WIDE)
        dz = _dz(
            grad, residual, mask, value, plane, place, at, known, column, channels, inner, center, scale, offset, slope,
            ACTIVATION, ADDED, FROM_BITS, PLANES, WIDE,
        )  # fmt: skip
        if ADDED:
            tl.store(grad_residual + at, dz.to(grad_residual.dtype.element_ty), mask=known)
        dz = tl.where(known, dz, 0.0)
        plain += dz
        centred += dz * (value - center[None, :])
    out = partial + tl.program_id(1).to(tl.int64) * channels + column
    tl.store(out, tl.sum(plain, axis=0), mask=column < channels)
    tl.store(out + tl.num_programs(1).to(tl.int64) * channels, tl.sum(centred, axis=0), mask=column < channels)


@triton.jit
def _combine_sums(
    partial, var, totals, grad_weight, grad_bias, splits, part, channels, eps,
    WIDE: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """totals: (2, channels), the whole sums; the gradients of weight and bias."""
    column = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    plain = tl.zeros((SPLITS, CHANNELS), WIDE)
    centred = tl.zeros((SPLITS, CHANNELS), WIDE)
    for start in range(0, splits, SPLITS):
        at, known = _parts(start, splits, column, channels, SPLITS)
        plain += tl.load(partial + at, mask=known, other=0.0)
        centred += tl.load(partial + part + at, mask=known, other=0.0)
    invstd = 1.0 / tl.sqrt(tl.load(var + column, mask=column < channels, other=1.0) + tl.full((), eps, WIDE))
    plain_sum = tl.sum(plain, axis=0)
    centred_sum = tl.sum(centred, axis=0)
    tl.store(totals + column, plain_sum, mask=column < channels)
    tl.store(totals + channels + column, centred_sum, mask=column < channels)
    tl.store(grad_bias + column, plain_sum.to(grad_bias.dtype.element_ty), mask=column < channels)
    tl.store(grad_weight + column, (centred_sum * invstd).to(grad_weight.dtype.element_ty), mask=column < channels)


@triton.jit
def _input(
    grad, x, weight, bias, mean, var, totals, grad_x, outer, channels, inner, n, slope, eps,
    ACTIVATION: tl.constexpr, IS_DZ: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    PLANES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad_x = scale (dz - sum(dz) / n - (x - mean) / (var + eps) * sum(dz (x - mean)) / n); IS_DZ: grad is dz."""
    column = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    center, scale, offset, invstd = _affine(mean, var, weight, bias, column, column < channels, eps, HAS_WEIGHT, HAS_BIAS, WIDE)
    n = tl.full((), n, WIDE)
    down = scale * (tl.load(totals + column, mask=column < channels, other=0.0) / n)
    across = scale * invstd * invstd * (tl.load(totals + channels + column, mask=column < channels, other=0.0) / n)
    slope = tl.full((), slope, WIDE)
    for start in range(tl.program_id(1).to(tl.int64) * ROWS, _total(outer, inner, PLANES), tl.num_programs(1) * ROWS):
        plane, place, inside = _positions(start, outer, inner, ROWS, PLANES)
        at, known = _addresses(plane, place, inside, column, channels, inner)
        value = tl.load(x + at, mask=known, other=0.0).to(WIDE)
        if IS_DZ:
            dz = tl.load(grad + at, mask=known, other=0.0).to(WIDE)
        else:
            dz = _dz(
                grad, x, x, value, plane, place, at, known, column, channels, inner, center, scale, offset, slope,
                ACTIVATION, False, False, PLANES, WIDE,
            )  # fmt: skip
        result = scale[None, :] * dz - down[None, :] - (value - center[None, :]) * across[None, :]
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=known)


# ---- launchers -------------------------------------------------------------------------------------------------------


class _Grid:
    """How x is walked: (outer, channels, inner), the block of a program, and programs for all of it."""

    def __init__(self, x: Tensor) -> None:
        self.channels = x.shape[1]
        self.n = x.numel() // max(self.channels, 1)
        self.planes = self.n != x.shape[0] and x.is_contiguous()
        self.outer, self.inner = (x.shape[0], self.n // x.shape[0]) if self.planes else (self.n, 1)
        columns = 1 if self.planes else min(max(8, triton.next_power_of_2(self.channels)), COLUMNS)
        total = self.outer * triton.cdiv(self.inner, 8) * 8 if self.planes else self.outer
        # Short blocks for short channels: no more than twice what is there.
        rows = min(BLOCK // columns, max(8, triton.next_power_of_2(total)))
        beside = triton.cdiv(self.channels, columns)
        self.splits = max(1, min(triton.cdiv(total, rows), wanted_programs(x) // beside))
        self.grid = (beside, self.splits)
        self.sizes = (self.outer, self.channels, self.inner)
        self.options: dict[str, Any] = dict(PLANES=self.planes, WIDE=wide(x.dtype), ROWS=rows, CHANNELS=columns)
        self.combine = (triton.cdiv(self.channels, COMBINED),)
        self.combine_options = dict(WIDE=wide(x.dtype), SPLITS=PARTS, CHANNELS=COMBINED)


def norm_act_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str, slope: float, eps: float,
    noise_std: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_forward(x, weight, bias, residual, activation, slope, eps, noise_std, seed)
    dtype, channels = wide_dtype(x.dtype), x.shape[1]
    y = torch.empty_like(x)
    make = x.new_empty if x.numel() else x.new_zeros
    mean, var, active = (make(channels, dtype=made) for made in (dtype, dtype, torch.int64))
    bits = residual is not None and activation in LINEAR
    mask = torch.empty(mask_shape(x) if bits else 0, dtype=torch.uint8, device=x.device)
    if x.numel() == 0:
        return y, active, mean, var, mask
    g = _Grid(x)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    partial = x.new_empty(3, g.splits, channels, dtype=dtype)
    parameters = dict(HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None)
    # What a kernel does not read is a pointer all the same: x.
    operands = [x if t is None else t for t in (residual, weight, bias)]
    with on_device_of(x):
        _statistics[g.grid](x, partial, *g.sizes, **g.options)
        _combine_statistics[g.combine](
            x, partial, mean, var, active, g.splits, g.splits * channels, channels, g.inner, **g.combine_options
        )
        in_pass = bits and (g.planes or channels % 8 == 0)
        _normalise[g.grid](
            x, *operands, mean, var, y, active, mask, seed if noise_std > 0 else active, *g.sizes, float(slope), float(eps),
            float(noise_std), ACTIVATION=activation, ADDED=residual is not None, NOISE=noise_std > 0, MASK=in_pass, **parameters,
            **g.options,
        )  # fmt: skip
        if bits and not in_pass:
            _bits[(triton.cdiv(x.numel(), BLOCK),)](
                x, *operands, mean, var, mask, x.numel(), channels, float(eps), WIDE=wide(x.dtype), BLOCK=BLOCK, **parameters
            )
    return y, active, mean, var, mask


def norm_act_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mean: Tensor, var: Tensor,
    mask: Tensor, activation: str, slope: float, eps: float, added: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_backward(grad, x, weight, bias, residual, mean, var, mask, activation, slope, eps, added)
    dtype, channels = wide_dtype(x.dtype), x.shape[1]
    grad_x = torch.empty_like(x)
    make = x.new_empty if x.numel() else x.new_zeros
    grad_weight, grad_bias = (make(channels, dtype=dtype if t is None else t.dtype) for t in (weight, bias))
    grad_residual = torch.empty_like(grad, memory_format=memory_format(grad)) if added else grad.new_empty(0)
    if x.numel() == 0:
        return grad_x, grad_weight, grad_bias, grad_residual
    g = _Grid(x)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    mean, var, mask = mean.contiguous(), var.contiguous(), mask.contiguous()
    partial, totals = x.new_empty(2, g.splits, channels, dtype=dtype), x.new_empty(2, channels, dtype=dtype)
    from_bits = added and activation in LINEAR
    residual = residual if added and not from_bits else None
    parameters = dict(HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None)
    affine = [x if t is None else t for t in (weight, bias, mean, var)]
    with on_device_of(x):
        _sums[g.grid](
            grad, x, x if residual is None else residual, mask if from_bits else x, *affine, grad_residual if added else grad_x,
            partial, *g.sizes, float(slope), float(eps), ACTIVATION=activation, ADDED=added, FROM_BITS=from_bits, **parameters,
            **g.options,
        )  # fmt: skip
        _combine_sums[g.combine](
            partial, var, totals, grad_weight, grad_bias, g.splits, g.splits * channels, channels, float(eps), **g.combine_options
        )
        _input[g.grid](
            grad_residual if added else grad, x, *affine, totals, grad_x, *g.sizes, float(g.n), float(slope), float(eps),
            ACTIVATION=activation, IS_DZ=added, **parameters, **g.options,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias, grad_residual
