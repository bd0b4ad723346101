"""What every op means, in plain PyTorch: the specification, the fallback without a compiled extension, and the judge
of every other backend in the tests. Written to be read; nothing here is tuned.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------
# random numbers
# ---------------------------------------------------------------------------------------------------------------


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    counter: four, key: two int64 tensors holding 32-bit words, broadcast against each other.
    Returns four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, so the two halves are those of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, _low(p1), _high(p0) ^ c3 ^ k1, _low(p0)
        k0, k1 = _low(k0 + 0x9E3779B9), _low(k1 + 0xBB67AE85)
    return c0, c1, c2, c3


def _low(x: Tensor) -> Tensor:
    return x & 0xFFFFFFFF


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & 0xFFFFFFFF


def box_muller(words: Sequence[Tensor]) -> list[Tensor]:
    """Four independent normals (float64) from four 32-bit words, two from each pair.

    r = sqrt(-2 ln u0), u0 = ((x0 >> 8) + 1) 2^-24 in (0, 1]; theta = 2 pi (x1 >> 8) 2^-24; z = (r cos theta, r sin theta).
    """
    normals = []
    for x0, x1 in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log(((x0 >> 8) + 1).double() * 2.0**-24))
        theta = (x1 >> 8).double() * (2.0 * math.pi * 2.0**-24)
        normals += [radius * torch.cos(theta), radius * torch.sin(theta)]
    return normals


def noise(positions: int, columns: int, stream: int, seed: Tensor) -> Tensor:
    """The noise of `positions` x `columns` elements, (positions, columns) float64.

    Element (p, c) is lane p % 4 of Philox with counter (q low, q high, c, stream), q = p // 4, and the two halves of the
    64-bit seed as key. It depends on nothing else: not on threads, layout, dtype or device.
    """
    device = seed.device
    q = torch.arange((positions + 3) // 4, device=device).view(-1, 1)
    column = torch.arange(columns, device=device).view(1, -1)
    words = philox((_low(q), _high(q), column, torch.full_like(q, stream)), (_low(seed), _high(seed)))
    words = torch.broadcast_tensors(*words)
    return torch.stack(box_muller(words), dim=1).flatten(0, 1)[:positions]


# ---------------------------------------------------------------------------------------------------------------
# activation
# ---------------------------------------------------------------------------------------------------------------


def activation_forward(
    x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act(x) + noise_std * 1[not x <= 0] * xi; the active elements of each channel; their bits. See `ops.activation`."""
    live = ~(x <= 0)
    channel_dim %= x.dim()
    active = live.sum([d for d in range(x.dim()) if d != channel_dim])
    y = _value(_wide(x), activation, slope)
    mask = x.new_empty(0, dtype=torch.uint8)
    if noise_std > 0:
        assert seed is not None
        shape = list(x.shape)
        channels = shape.pop(channel_dim)
        xi = noise(math.prod(shape), channels, 0, seed).view(*shape, channels).movedim(-1, channel_dim)
        y = y + noise_std * live * xi.to(y.dtype)
        if activation in ("relu", "leaky_relu"):
            mask = _pack(_in_layout_of(x, live))
    return _in_layout_of(x, y.to(x.dtype)), active, mask


def activation_forward_(
    x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`activation_forward` written over x: relu and leaky_relu with a positive slope."""
    y, active, mask = activation_forward(x, activation, slope, channel_dim, noise_std, seed)
    x.copy_(y)
    return active, mask


def activation_count_(x: Tensor, channel_dim: int, active: Tensor, seen: Tensor | None) -> None:
    """Add the elements of each channel with not x <= 0 to `active`, and how many there are in a channel to `seen`."""
    channel_dim %= x.dim()
    active += (~(x <= 0)).sum([d for d in range(x.dim()) if d != channel_dim])
    if seen is not None and active.numel():
        seen += x.numel() // active.numel()


def activation_backward(grad: Tensor, saved: Tensor, mask: Tensor, activation: str, slope: float) -> Tensor:
    """grad * act'(x). relu and leaky_relu know the sign from the mask's bits if there are any, from `saved` otherwise."""
    if activation in ("relu", "leaky_relu"):
        live = _unpack(mask, grad) if mask.numel() else ~(saved <= 0)
        return torch.where(live, grad, _wide(grad) * slope if activation == "leaky_relu" else 0).to(grad.dtype)
    x = _wide(saved)
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        slope_at_x = sigmoid * (1 + x * (1 - sigmoid))
    elif activation == "gelu":
        slope_at_x = _normal_cdf(x) + x * _normal_pdf(x)
    else:
        t, du, _ = _tanh_argument(x)
        slope_at_x = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du
    return _in_layout_of(grad, (_wide(grad) * slope_at_x).to(grad.dtype))


def activation_second_derivative(x: Tensor, activation: str) -> Tensor:
    """act''(x) of gelu, gelu_tanh and silu, for double backward."""
    x = _wide(x)
    if activation == "silu":
        s = torch.sigmoid(x)
        return s * (1 - s) * (2 + x * (1 - 2 * s))
    if activation == "gelu":
        return _normal_pdf(x) * (2 - x * x)
    t, du, ddu = _tanh_argument(x)
    return (1 - t * t) * (du + 0.5 * x * ddu - x * t * du * du)


def _value(x: Tensor, activation: str, slope: float) -> Tensor:
    if activation == "relu":
        return F.relu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, slope)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _normal_pdf(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def _tanh_argument(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tanh(u), u' and u'' of gelu_tanh's u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    k = math.sqrt(2 / math.pi)
    u = k * (x + 0.044715 * x * x * x)
    return torch.tanh(u), k * (1 + 3 * 0.044715 * x * x), 6 * k * 0.044715 * x


def _wide(x: Tensor) -> Tensor:
    """The type the arithmetic is done in: float64 for float64, float32 for the others."""
    return x if x.dtype == torch.float64 else x.float()


def _in_layout_of(x: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=value.dtype).copy_(value)


def _pack(live: Tensor) -> Tensor:
    """One bit an element in memory order: bit i % 8 of byte i // 8."""
    flat = live.as_strided((live.numel(),), (1,))
    flat = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat * (1 << torch.arange(8, device=live.device))).sum(1).to(torch.uint8)


def _unpack(mask: Tensor, like: Tensor) -> Tensor:
    """The bits of `_pack` as a bool tensor of like's shape and memory order."""
    bits = (mask.view(-1, 1) >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    live = torch.empty_like(like, dtype=torch.bool)
    live.as_strided((live.numel(),), (1,)).copy_(bits.reshape(-1)[: live.numel()])
    return live


# ---------------------------------------------------------------------------------------------------------------
# weight noise
# ---------------------------------------------------------------------------------------------------------------


def weight_noise_(tensors: Sequence[Tensor], live: Sequence[Tensor | None], std: float, seed: Tensor) -> None:
    """t += std * live[row] * xi for every tensor; rows are dim 0, stream 1 + its index in the list."""
    for index, (t, rows) in enumerate(zip(tensors, live)):
        count = t.shape[0] if t.dim() else 1
        xi = noise(count, t.numel() // max(count, 1), 1 + index, seed).view(t.shape)
        step = std * _wide(xi.to(t.dtype) if t.dtype == torch.float64 else xi.float())
        if rows is not None:
            step = step * rows.view(-1, *[1] * (t.dim() - 1)) if t.dim() else step * rows.view(())
        t.copy_(_wide(t) + step)


# ---------------------------------------------------------------------------------------------------------------
# norm_act
# ---------------------------------------------------------------------------------------------------------------


def norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    eps: float,
    noise_std: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y = act(z) + noise, z = batch_norm(x) (+ residual): y, active, mean, var, mask. See `ops.norm_act`."""
    mean, var = norm_act_statistics(x)
    z = _in_layout_of(x, _normalised(x, weight, bias, residual, mean, var, eps))
    y, active, _ = activation_forward(z, activation, slope, 1, noise_std, seed)
    mask = x.new_empty(0, dtype=torch.uint8)
    if residual is not None and activation in ("relu", "leaky_relu"):
        mask = _pack_runs(~(z <= 0))
    return _in_layout_of(x, y.to(x.dtype)), active, mean, var, mask


def norm_act_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the residual (empty if there was none)."""
    if added and activation in ("relu", "leaky_relu"):
        live = _unpack_runs(mask, grad)
        dz = torch.where(live, _wide(grad), _wide(grad) * slope if activation == "leaky_relu" else 0)
    else:
        z = _normalised(x, weight, bias, residual, mean, var, eps)
        dz = activation_backward(_wide(grad), z, mask.new_empty(0), activation, slope)
    dims = [d for d in range(x.dim()) if d != 1]
    invstd = 1 / torch.sqrt(var + eps)
    xhat = (_wide(x) - _channels(mean, x)) * _channels(invstd, x)
    grad_weight, grad_bias = (dz * xhat).sum(dims), dz.sum(dims)
    count = max(x.numel() // max(x.shape[1], 1), 1)
    scale = invstd if weight is None else invstd * weight
    grad_x = _channels(scale, x) * (dz - _channels(grad_bias / count, x) - xhat * _channels(grad_weight / count, x))
    grad_residual = _in_layout_of(grad, dz.to(grad.dtype)) if added else grad.new_empty(0)
    return (
        _in_layout_of(x, grad_x.to(x.dtype)),
        grad_weight if weight is None else grad_weight.to(weight.dtype),
        grad_bias if bias is None else grad_bias.to(bias.dtype),
        grad_residual,
    )


def norm_act_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel; zeros if there are no elements.

    A variance that overflows is NaN: divided by infinity, z would be the bias, and a unit that diverged could look dead.
    """
    wide = _wide(x)
    if not x.numel():
        return wide.new_zeros(x.shape[1]), wide.new_zeros(x.shape[1])
    var, mean = torch.var_mean(wide, [d for d in range(x.dim()) if d != 1], correction=0)
    return mean, torch.where(var.isinf(), math.nan, var)


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """z = (x - mean) * (weight / sqrt(var + eps)) + bias (+ residual), in the wide type."""
    scale = 1 / torch.sqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    z = (_wide(x) - _channels(mean, x)) * _channels(scale, x)
    if bias is not None:
        z = z + _channels(_wide(bias), x)
    return z if residual is None else z + _wide(residual)


def _channels(value: Tensor, like: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (like.dim() - 2))


def _pack_runs(live: Tensor) -> Tensor:
    """`_pack` with every run starting a new byte: (runs, ceil(length / 8))."""
    runs, length = norm_act_runs(live)
    flat = F.pad(live.as_strided((runs, length), (length, 1)), (0, -length % 8)).view(runs, (length + 7) // 8, 8)
    return (flat * (1 << torch.arange(8, device=live.device))).sum(2).to(torch.uint8)


def _unpack_runs(mask: Tensor, like: Tensor) -> Tensor:
    """The bits of `_pack_runs` as a bool tensor of like's shape and memory order."""
    runs, length = norm_act_runs(like)
    bits = (mask.unsqueeze(2) >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    live = torch.empty_like(like, dtype=torch.bool)
    live.as_strided((runs, length), (length, 1)).copy_(bits.view(runs, mask.shape[1] * 8)[:, :length])
    return live


def norm_act_runs(x: Tensor) -> tuple[int, int]:
    """Number and length of the stretches of memory with their own bytes in the mask: one a plane where x is contiguous,
    one in all where the channels are last (or planes have one element). Threads that share planes out among them then
    write no common byte."""
    plane = math.prod(x.shape[2:])
    return (x.shape[0] * x.shape[1], plane) if plane != 1 and x.is_contiguous() else (1, x.numel())


# ---------------------------------------------------------------------------------------------------------------
# compaction
# ---------------------------------------------------------------------------------------------------------------


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which ops that change the number of channels return their result."""
    if not x.is_contiguous():
        for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dims and x.is_contiguous(memory_format=layout):
                return layout
    return torch.contiguous_format


def channel_select(x: Tensor, index: Tensor, channel_dim: int) -> Tensor:
    """y[:, c] = x[:, index[c]] where index[c] >= 0, else 0."""
    channels = x.shape[channel_dim]
    shape = list(x.shape)
    shape[channel_dim] = 1
    padded = torch.cat([x, x.new_zeros(shape)], channel_dim)  # -1 reads the channel of zeros
    y = padded.index_select(channel_dim, index.remainder(channels + 1))
    return y.contiguous(memory_format=memory_format(x))


def compact(
    sources: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Sequence[Tensor | None]
) -> list[Tensor]:
    """The kept rows (dim 0) and columns (dim 1) of every source."""
    kept = []
    for source, row, column in zip(sources, rows, columns):
        out = source if row is None else source.index_select(0, row)
        out = out if column is None else out.index_select(1, column)
        out = out.contiguous(memory_format=memory_format(source))
        kept.append(out.clone() if out is source else out)
    return kept


def compact_(
    sources: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Sequence[Tensor | None]
) -> None:
    """The kept rows and columns of every source to the front of its memory, row by row: a row of the result lies where
    only rows were that are read already, or that row itself."""
    for source, row, column in zip(sources, rows, columns):
        shape = list(source.shape)
        for dim, index in enumerate((row, column)):
            if index is not None:
                shape[dim] = index.numel()
        if source.dim() == 1:
            source[: shape[0]] = source if row is None else source[row]
            continue
        strides = torch.empty(shape, device="meta").contiguous(memory_format=memory_format(source)).stride()
        front = source.as_strided(shape, strides)
        for place in range(shape[0]):
            kept = source[place if row is None else int(row[place])]
            front[place] = kept.clone() if column is None else kept.index_select(0, column)
