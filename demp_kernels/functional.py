"""The ops as functions: activations that count the active elements of every channel, and noise on weights.

    y, active = relu(x, channel_dim=1, noise_std=0.0, seed=None)

    x: (N, C, *) or any shape of at least two dimensions with the channels in `channel_dim`; float32, bfloat16, float16 or
        float64; any strides (contiguous and channels_last are used as they are, others are copied).
    y: like x: act(x) + noise_std * 1[not x <= 0] * xi, xi standard normal.
    active: (C,) int64, the elements of each channel that are not <= 0 (NaN counts as active).
    seed: of the noise; an int, a (1,) int64 tensor on x's device, or None: drawn from torch's generator of that device,
        so that `torch.manual_seed` decides it and activation checkpointing draws the same noise again.

Each raises ValueError for a wrong argument, TypeError for one of a wrong kind. `relu_` and `leaky_relu_` write over x and return it.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .arguments import require_integer, require_number, require_tensor
from .ops import activation as _activation
from .ops import channel_select as _channel_select
from .ops import norm_act as _norm_act
from .ops import weight_noise as _weight_noise
from .ops.out_of_memory import raise_out_of_memory

__all__ = ["channel_select", "relu", "relu_", "leaky_relu", "leaky_relu_", "gelu", "silu", "norm_act", "weight_noise_"]


def relu(
    x: Tensor, channel_dim: int = 1, noise_std: float = 0.0, seed: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """max(x, 0), and the active elements of each channel."""
    return _forward(x, "relu", 0.0, channel_dim, noise_std, seed)


def relu_(
    x: Tensor, channel_dim: int = 1, noise_std: float = 0.0, seed: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`relu` in place."""
    return _forward_(x, "relu", 0.0, channel_dim, noise_std, seed)


def leaky_relu(
    x: Tensor,
    negative_slope: float = 0.01,
    channel_dim: int = 1,
    noise_std: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x where x > 0, negative_slope * x elsewhere, and the active elements of each channel."""
    return _forward(x, "leaky_relu", negative_slope, channel_dim, noise_std, seed)


def leaky_relu_(
    x: Tensor,
    negative_slope: float = 0.01,
    channel_dim: int = 1,
    noise_std: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`leaky_relu` in place; negative_slope > 0, because backward reads the sign from the output."""
    return _forward_(x, "leaky_relu", negative_slope, channel_dim, noise_std, seed)


def gelu(
    x: Tensor,
    approximate: str = "none",
    channel_dim: int = 1,
    noise_std: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x Phi(x), or with approximate="tanh" its tanh form, and the active elements (not x <= 0) of each channel."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be none or tanh, got {approximate}")
    return _forward(x, "gelu" if approximate == "none" else "gelu_tanh", 0.0, channel_dim, noise_std, seed)


def silu(
    x: Tensor, channel_dim: int = 1, noise_std: float = 0.0, seed: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x sigmoid(x), and the active elements (not x <= 0) of each channel."""
    return _forward(x, "silu", 0.0, channel_dim, noise_std, seed)


def norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    slope: float = 0.01,
    eps: float = 1e-5,
    noise_std: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch normalisation of (N, C, *) with batch statistics, an optional residual and an activation, in one op.

    Equivalent to

        z = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps) (+ residual)
        y, active = relu(z)                 # or leaky_relu with `slope`, gelu, gelu_tanh, silu
        var, mean = torch.var_mean(x, dims, correction=0)

    Returns y, active (C,) int64, mean (C,), var (C,) in float32 (float64 for float64). mean and var carry no gradient.
    residual: x's shape and dtype. Raises ValueError for a wrong argument; see `ops.norm_act`.
    """
    try:
        if not _activation.is_dense(x):
            x = x.contiguous()
        if residual is not None and residual.shape == x.shape and not _activation.same_order(residual, x):
            residual = residual.contiguous(memory_format=_activation.memory_format(x))
        seed = _seed(seed, x.device) if noise_std > 0 else None
        arguments = (x, weight, bias, residual, activation, slope, eps, noise_std, seed)
        if torch.compiler.is_compiling():
            y, active, mean, var, _ = _norm_act.forward(*arguments)
        elif is_transformed():
            _norm_act.check_forward(*arguments)
            y, active, mean, var, _ = reference.norm_act_forward(*arguments)
            mean, var = mean.detach(), var.detach()
        elif _is_followed(x, weight, bias, residual):
            y, active, mean, var = _norm_act.Forward.apply(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y, active, mean, var, _ = _norm_act.forward(*arguments)
    except _WRONG as error:
        raise_out_of_memory(error, x)
        tensors = {"x": x, "weight": weight, "bias": bias, "residual": residual}
        _check_kinds("norm_act", {"x": x, **{name: t for name, t in tensors.items() if t is not None}},
                     slope=slope, eps=eps, noise_std=noise_std)
        _norm_act.check_forward(x, weight, bias, residual, activation, slope, eps, noise_std, _checked_seed("norm_act", seed, x))
        raise
    return y, active, mean, var


def weight_noise_(
    tensors: Sequence[Tensor],
    std: float,
    live: Sequence[Tensor | None] | None = None,
    seed: int | Tensor | None = None,
) -> None:
    """t += std * live[row] * xi for every tensor, without a gradient.

    live: for each tensor a (rows,) bool tensor over its dim 0 or None (all rows). seed as above.
    Raises ValueError for a wrong argument.
    """
    tensors = list(tensors)
    if not tensors:
        return
    live = [None] * len(tensors) if live is None else list(live)
    try:
        seed = _seed(seed, tensors[0].device)
        with torch.no_grad():
            _weight_noise.weight_noise_(tensors, live, std, seed)
    except _WRONG as error:
        raise_out_of_memory(error, tensors[0])
        _check_kinds("weight_noise_", {f"tensors[{i}]": t for i, t in enumerate(tensors)}, std=std)
        _check_kinds("weight_noise_", {f"live[{i}]": t for i, t in enumerate(live) if t is not None})
        checked = _checked_seed("weight_noise_", seed, tensors[0])
        if checked is not None:
            _weight_noise.check(tensors, live, std, checked)
        raise
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)  # so that autograd notices, as for every in-place operation


def channel_select(x: Tensor, index: Tensor, inverse: Tensor, channel_dim: int = 1) -> Tensor:
    """y[:, c] = x[:, index[c]] where index[c] >= 0, else 0; `inverse` is the inverse map of `index`, for the gradient."""
    try:
        if not torch.compiler.is_compiling() and is_transformed():
            _channel_select.check(x, index, inverse, channel_dim)
            return reference.channel_select(x, index, channel_dim)
        return _channel_select.channel_select(x, index, inverse, channel_dim)
    except _WRONG as error:
        raise_out_of_memory(error, x)
        _check_kinds("channel_select", {"x": x, "index": index, "inverse": inverse})
        require_integer("channel_select: channel_dim", channel_dim)
        _channel_select.check(x, index, inverse, channel_dim)
        raise


def _forward(
    x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: int | Tensor | None
) -> tuple[Tensor, Tensor]:
    try:
        if not x.is_contiguous() and not _activation.is_usable(x, channel_dim):
            x = x.contiguous()
        if activation == "relu" and noise_std == 0 and is_tiny(x) and _is_followed(x):
            active = torch.zeros(x.shape[channel_dim], dtype=torch.int64, device=x.device)
            return relu_into(x, channel_dim, active, None), active
        seed = _seed(seed, x.device) if noise_std > 0 else None
        if torch.compiler.is_compiling():
            y, active, _ = _activation.forward(x, activation, slope, channel_dim, noise_std, seed)
            return y, active
        if is_transformed():
            _activation.check_forward(x, activation, slope, channel_dim, noise_std, seed)
            y, active, _ = reference.activation_forward(x, activation, slope, channel_dim, noise_std, seed)
            return y, active
        if not _is_followed(x):
            with torch._C._AutoDispatchBelowAutograd():
                y, active, _ = _activation.forward(x, activation, slope, channel_dim, noise_std, seed)
            return y, active
        return _activation.Forward.apply(x, activation, slope, channel_dim, noise_std, seed)
    except _WRONG as error:
        raise_out_of_memory(error, x)
        # The compiled kernels check as `check_forward` does and know no ValueError: raise it here, off the hot path.
        seed = _check_activation(x, slope, channel_dim, noise_std, seed)
        _activation.check_forward(x, activation, slope, channel_dim, noise_std, seed)
        raise


def is_tiny(x: Tensor) -> bool:
    """PyTorch's relu and a second look at x are cheaper than the op that does both, and nothing traces the call."""
    # the size last: traced, it would be a guard, and other sizes a recompilation
    return isinstance(x, Tensor) and x.is_cpu and not _is_traced() and x.numel() <= _TINY


def relu_into(x: Tensor, channel_dim: int, active: Tensor, seen: Tensor | None) -> Tensor:
    """`relu` of a tiny dense x, its counts added to `active` (C,) and its elements per channel to `seen` (), both int64."""
    y = torch.relu(x)  # its autograd is C++; the op's own would cost four times the rest
    _activation.count_(y, channel_dim, active, seen)
    return y


def _forward_(
    x: Tensor, activation: str, slope: float, channel_dim: int, noise_std: float, seed: int | Tensor | None
) -> tuple[Tensor, Tensor]:
    try:
        followed = x.requires_grad and torch.is_grad_enabled()
        usable = x.is_contiguous() or _activation.is_usable(x, channel_dim)
        if _is_traced() or (followed and (x._is_view() or x.is_leaf)) or not usable:
            # The compiler plans memory itself; autograd lets no function with two outputs write over a view, and refuses
            # a leaf only when it is overwritten; strided x has no kernel. Each way x ends up holding y.
            # leaky_relu's backward needs an x that is not overwritten
            given = x.clone() if followed and activation == "leaky_relu" else x
            y, active = _forward(given, activation, slope, channel_dim, noise_std, seed)
            return x.copy_(y), active
        seed = _seed(seed, x.device) if noise_std > 0 else None
        return _activation.InPlace.apply(x, activation, slope, channel_dim, noise_std, seed)
    except _WRONG as error:
        raise_out_of_memory(error, x)
        seed = _check_activation(x, slope, channel_dim, noise_std, seed)
        if _activation.is_dense(x):  # of other strides is a copy, which the framework has refused to write back
            _activation.check_forward_(x, activation, slope, channel_dim, noise_std, seed)
        raise


_TINY = 2**14
"""Elements. Up to here PyTorch's relu and a pass that counts are faster than the op that does both (benchmarks/README.md)."""

_WRONG = (RuntimeError, AttributeError, TypeError, OverflowError, IndexError)
"""What comes up where an argument is wrong. Which one it was is asked only then: questions cost as much as a small kernel."""


def _check_activation(
    x: Tensor, slope: float, channel_dim: int, noise_std: float, seed: int | Tensor | None
) -> Tensor | None:
    """Raise TypeError or ValueError for an argument of a wrong kind. Returns the seed as the op takes it."""
    _check_kinds("activation", {"x": x}, slope=slope, noise_std=noise_std)
    require_integer("activation: channel_dim", channel_dim)
    return _checked_seed("activation", seed, x)


def _check_kinds(op: str, tensors: dict[str, Tensor], **numbers: float) -> None:
    for name, tensor in tensors.items():
        require_tensor(f"{op}: {name}", tensor)
    for name, number in numbers.items():
        require_number(f"{op}: {name}", number)


def _checked_seed(op: str, seed: int | Tensor | None, x: Tensor) -> Tensor | None:
    if seed is not None and not isinstance(seed, Tensor):
        require_integer(f"{op}: seed", seed)
    return seed if seed is None else _seed(seed, x.device)


def _is_traced() -> bool:
    """torch.compile, torch.export or torch.func is at work."""
    return torch.compiler.is_compiling() or is_transformed()


def is_transformed() -> bool:
    """The call is inside grad, vmap or another transform of torch.func, which look into the reference: they take no autograd
    function of a custom op (pytorch/pytorch#168393)."""
    return torch._C._are_functorch_transforms_active()


def _is_followed(*tensors: Tensor | None) -> bool:
    """Autograd wants to know of an operation on these. If not, the op is called below it: 5 us less of 11 for a tiny tensor."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed
    if isinstance(seed, float):
        raise TypeError(f"seed must be an integer, got {seed}")
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)
