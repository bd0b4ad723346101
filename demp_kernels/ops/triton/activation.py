"""activation in Triton; see `demp_kernels/ops/activation.py` for what it computes.

Forward has a kernel for planes (contiguous, several elements a channel: a program stays in one channel) and one for rows
(channels innermost: a program keeps its columns and walks down the rows). x is read once and y written once, except that
where bits of different rows share a byte (noise with planes of other than a multiple of 8 elements, or rows of other than
a multiple of 8 channels) a pass before writes the bits. Counts are sums of integers: their order does not matter.
"""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import check_backward, check_forward, check_forward_
from .launch import LARGE, on_device_of, wanted_programs, wide
from .noise import consecutive, normals

# Tunables. Four warps and 1024 elements give a thread 8: one or two 16-byte accesses. Rows are taken four at a time
# because four positions share a Philox call; 1024 quads give a thread 8 neighbours again, of up to 128 columns, so that a
# warp reads whole cache lines. Chosen by that reasoning; no GPU has timed them yet.
BLOCK = 1024
ROW_QUADS = 1024
MAX_COLUMNS = 128


@triton.jit
def _value(x, slope, ACTIVATION: tl.constexpr):
    """act(x)."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x <= 0, x * slope, x)
    elif ACTIVATION == "gelu":
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    else:  # (1 + tanh u) / 2 = sigmoid(2 u)
        return x / (1.0 + tl.exp(-x * (1.5957691216057308 + 0.07135481282955223 * x * x)))


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr):
    """act'(x) of the smooth activations."""
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        return s + x * s * (1.0 - s)
    else:
        s = 1.0 / (1.0 + tl.exp(-x * (1.5957691216057308 + 0.07135481282955223 * x * x)))
        return s + x * s * (1.0 - s) * (1.5957691216057308 + 0.2140644384886567 * x * x)


@triton.jit
def _noisy(x, live, z, slope, noise_std, ACTIVATION: tl.constexpr, WIDE: tl.constexpr):
    return _value(x, slope, ACTIVATION) + tl.where(live, z.to(WIDE) * noise_std, 0.0)


@triton.jit
def _pack(live, AXIS: tl.constexpr):
    """Bytes from (..., 8) bools."""
    weights = 1 << tl.arange(0, 8)
    if AXIS == 1:
        return tl.sum(live.to(tl.int32) * weights[None, :], axis=1).to(tl.uint8)
    else:
        return tl.sum(live.to(tl.int32) * weights[None, None, :], axis=2).to(tl.uint8)


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_planes(
    x, y, active, mask, seed, channels, inner, positions, slope, noise_std,
    ACTIVATION: tl.constexpr, NOISE: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr, LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (c, s): positions of channel c, a position being outer * inner + its place in the plane."""
    channel = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    step = tl.num_programs(1) * BLOCK
    if LARGE:
        first = first.to(tl.int64)
    slope = tl.full((), slope, WIDE)
    noise_std = tl.full((), noise_std, WIDE)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, positions, step):
        position = start + tl.arange(0, BLOCK)
        inside = position < positions
        plane = position // inner
        at = (plane.to(tl.int64) * channels + channel) * inner + (position - plane * inner)
        value = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
        live = (value <= 0) == 0  # NaN counts as active
        count += live.to(tl.int32)
        if NOISE:
            quad = start // 4 + tl.arange(0, BLOCK // 4)
            z0, z1, z2, z3 = normals(quad, channel, 0, tl.load(seed))
            result = _noisy(value, live, consecutive(z0, z1, z2, z3, BLOCK), slope, noise_std, ACTIVATION, WIDE)
        else:
            result = _value(value, slope, ACTIVATION)
        tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)
        if MASK:
            eighth = start + 8 * tl.arange(0, BLOCK // 8)
            eighth_plane = eighth // inner
            byte = ((eighth_plane.to(tl.int64) * channels + channel) * inner + (eighth - eighth_plane * inner)) // 8
            tl.store(mask + byte, _pack(tl.reshape(live, (BLOCK // 8, 8)), 1), mask=eighth < positions)
    tl.atomic_add(active + channel, tl.sum(count, axis=0).to(tl.int64))


@triton.jit
def _forward_rows(
    x, y, active, mask, seed, rows, channels, slope, noise_std,
    ACTIVATION: tl.constexpr, NOISE: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr, LARGE: tl.constexpr,
    QUADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (c, s): COLUMNS channels, quads of four rows of them."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * QUADS
    step = tl.num_programs(1) * QUADS
    if LARGE:
        first = first.to(tl.int64)
    slope = tl.full((), slope, WIDE)
    noise_std = tl.full((), noise_std, WIDE)
    count = tl.zeros((COLUMNS,), tl.int32)
    for start in range(first, (rows - 1) // 4 + 1, step):  # rows + 3 may not fit into 32 bits
        quad = start + tl.arange(0, QUADS)
        if NOISE:
            z0, z1, z2, z3 = normals(quad[:, None], column[None, :], 0, tl.load(seed))
        for m in tl.static_range(4):
            row = quad * 4 + m
            inside = (row < rows)[:, None] & (column < channels)[None, :]
            at = row.to(tl.int64)[:, None] * channels + column[None, :]
            value = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
            live = (value <= 0) == 0
            count += tl.sum(live.to(tl.int32), axis=0)
            if NOISE:
                z = z0 if m == 0 else (z1 if m == 1 else (z2 if m == 2 else z3))
                result = _noisy(value, live, z, slope, noise_std, ACTIVATION, WIDE)
            else:
                result = _value(value, slope, ACTIVATION)
            tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)
            if MASK:
                eighth = tl.program_id(0).to(tl.int64) * COLUMNS + 8 * tl.arange(0, COLUMNS // 8)
                byte = (row.to(tl.int64)[:, None] * channels + eighth[None, :]) // 8
                packed = _pack(tl.reshape(live, (QUADS, COLUMNS // 8, 8)), 2)
                tl.store(mask + byte, packed, mask=(row < rows)[:, None] & (eighth < channels)[None, :])
    tl.atomic_add(active + column, count.to(tl.int64), mask=column < channels)


@triton.jit
def _forward_bits(x, mask, elements, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One bit an element of x in memory order: for shapes whose rows do not end on whole bytes."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < elements, other=0.0).to(WIDE)
    live = (value <= 0) == 0
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    tl.store(mask + byte, _pack(tl.reshape(live, (BLOCK // 8, 8)), 1), mask=byte * 8 < elements)


def _launch_forward(
    x: Tensor, y: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    channel_dim %= x.dim()
    shape = list(x.shape)
    channels = shape.pop(channel_dim)
    inner = math.prod(shape[channel_dim:]) if x.is_contiguous() else 1
    positions = math.prod(shape)
    noise = noise_std > 0
    with_mask = noise and activation in ("relu", "leaky_relu")
    active = torch.zeros(channels, dtype=torch.int64, device=x.device)
    mask = torch.empty((x.numel() + 7) // 8 if with_mask else 0, dtype=torch.uint8, device=x.device)
    if x.numel() == 0:
        return active, mask
    with on_device_of(x):
        mask_in_pass = with_mask and (inner if inner > 1 else channels) % 8 == 0
        if with_mask and not mask_in_pass:
            _forward_bits[(triton.cdiv(x.numel(), BLOCK),)](x, mask, x.numel(), WIDE=wide(x.dtype), BLOCK=BLOCK)
        options = dict(ACTIVATION=activation, NOISE=noise, MASK=mask_in_pass, WIDE=wide(x.dtype), LARGE=positions >= LARGE)
        # Without noise nothing is read from where seed is.
        seed = seed if noise else active
        if inner > 1:
            splits = max(1, min(triton.cdiv(positions, BLOCK), wanted_programs(x) // channels))
            _forward_planes[(channels, splits)](
                x, y, active, mask, seed, channels, inner, positions, float(slope), float(noise_std), **options, BLOCK=BLOCK
            )
        else:
            columns = min(max(8, triton.next_power_of_2(channels)), MAX_COLUMNS)
            quads = ROW_QUADS // columns
            groups = triton.cdiv(channels, columns)
            splits = max(1, min(triton.cdiv(positions, 4 * quads), wanted_programs(x) // groups))
            _forward_rows[(groups, splits)](
                x, y, active, mask, seed, positions, channels, float(slope), float(noise_std), **options,
                QUADS=quads, COLUMNS=columns,
            )
    return active, mask


def activation_forward(
    x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    check_forward(x, activation, slope, channel_dim, noise_std, seed)
    y = torch.empty_like(x)
    return y, *_launch_forward(x, y, activation, slope, channel_dim, noise_std, seed)


def activation_forward_(
    x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_forward_(x, activation, slope, channel_dim, noise_std, seed)
    return _launch_forward(x, x, activation, slope, channel_dim, noise_std, seed)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _backward(
    grad, saved, mask, result, elements, slope,
    ACTIVATION: tl.constexpr, FROM_BITS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x = grad * act'(x), flat over memory."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < elements
    g = tl.load(grad + at, mask=inside, other=0.0).to(WIDE)
    if ACTIVATION == "relu" or ACTIVATION == "leaky_relu":
        if FROM_BITS:
            byte = tl.load(mask + at // 8, mask=inside, other=0).to(tl.int32)
            live = ((byte >> (at % 8).to(tl.int32)) & 1) == 1
        else:
            live = (tl.load(saved + at, mask=inside, other=0.0).to(WIDE) <= 0) == 0
        below = 0.0 if ACTIVATION == "relu" else g * tl.full((), slope, WIDE)
        g = tl.where(live, g, below)
    else:
        g = g * _derivative(tl.load(saved + at, mask=inside, other=0.0).to(WIDE), ACTIVATION)
    tl.store(result + at, g.to(result.dtype.element_ty), mask=inside)


def activation_backward(grad: Tensor, saved: Tensor, mask: Tensor, activation: str, slope: float) -> Tensor:
    check_backward(grad, saved, mask, activation, slope)
    result = torch.empty_like(grad)
    if grad.numel() == 0:
        return result
    from_bits = mask.numel() > 0 and activation in ("relu", "leaky_relu")
    with on_device_of(grad):
        _backward[(triton.cdiv(grad.numel(), BLOCK),)](
            grad, grad if from_bits else saved, mask if from_bits else grad, result, grad.numel(), float(slope),
            ACTIVATION=activation, FROM_BITS=from_bits, WIDE=wide(grad.dtype), BLOCK=BLOCK,
        )
    return result
