"""Thin `nn.Module`s over the ops: activations that count their units, and the residual addition that can select.

A *unit* is one channel of one activation's output. In training mode every activation here counts, in the pass that
computes it, how many elements of each unit were active; a unit whose count stays zero is dead. In evaluation mode the
modules are their plain PyTorch counterparts: nothing is counted and no noise is added. Nothing is counted inside a transform
of torch.func either, whose functions may write to nothing outside.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .arguments import require_integer, require_number

__all__ = ["DemPActivation", "DemPReLU", "DemPLeakyReLU", "DemPGELU", "DemPSiLU", "SelectiveAdd"]


class DemPActivation(nn.Module):
    """Base of the counting activations: y = act(x) + noise_std * 1[x > 0] * xi, with the active elements counted.

    Args:
        noise_std: standard deviation of the noise on active elements, >= 0; training mode only.
        channel_dim: the dimension of the input that holds the units (1 for images, -1 for token sequences).

    Shapes: x (N, C, *) -> y of the same shape, dtype and memory format; float32, bfloat16, float16 or float64, as in
    `functional`. Raises ValueError if x has no channel dimension.

    The counters move with the module between devices but are no buffers: they never enter the `state_dict`, so a
    checkpoint of the plain model loads into this one and back, and DistributedDataParallel does not overwrite them with
    those of rank 0 before every forward. They are created when the number of channels is known: by `prepare` or
    `DemP`, else at the first forward in training mode, or by `allocate`.
    """

    active: Tensor | None
    """Active elements (not x <= 0) of each unit since `reset_counts`, (C,) int64 on the input's device, or None
    before the first counted forward."""
    seen: Tensor | None
    """Elements of each unit looked at since `reset_counts`, a scalar int64 tensor: a unit is dead when `seen` is
    positive and its `active` is zero."""
    mixed: bool = False
    """Whether the number of units has changed since `reset_counts`, as it does where one module is called at several places
    of several widths: the counters are those of the last call only, and tell of no unit that it is dead."""

    def __init__(self, *, noise_std: float = 0.0, channel_dim: int = 1) -> None:
        super().__init__()
        require_number(f"{type(self).__name__}: noise_std", noise_std)
        if not 0.0 <= noise_std < float("inf"):
            raise ValueError(f"{type(self).__name__}: noise_std must be >= 0 and finite, got {noise_std}")
        require_integer(f"{type(self).__name__}: channel_dim", channel_dim)
        self.noise_std = float(noise_std)
        self.channel_dim = channel_dim
        self.active = self.seen = None
        self.mixed = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DemPActivation:
        super()._apply(fn, recurse)
        if self.active is not None and self.seen is not None:
            was_meta = self.active.is_meta
            self.active, self.seen = fn(self.active), fn(self.seen)
            if was_meta:  # `to_empty` gives memory as it lies
                self.active.zero_()
                self.seen.zero_()
        return self

    def _replicate_for_data_parallel(self) -> nn.Module:
        if self.training:
            raise RuntimeError(
                f"{type(self).__name__} counts for one process on one device, and nn.DataParallel throws its replicas' counts away: "
                "train with DistributedDataParallel"
            )
        return super()._replicate_for_data_parallel()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._plain(x)
        y, active = self._counted(x)
        self.count(active, x.numel() // max(active.numel(), 1))
        return y

    def _plain(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _counted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def count(self, active: Tensor, elements: int) -> None:
        """Add `active` (C,) int64 of `elements` elements a unit to the counters; called by `forward`."""
        if not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() != -1:
                return  # a forward inside a backward pass is activation checkpointing's recomputation: it was counted before
            if functional.is_transformed():
                return
        mine, seen = self._counters(active.numel(), active.device)
        mine.add_(active)
        seen.add_(elements)

    def _counters(self, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`active` and `seen` on the inputs' device, made anew for another number of channels."""
        if self.active is None or self.seen is None:
            self.allocate(channels, device)
        elif self.active.numel() != channels:
            self.allocate(channels, device)
            self.mixed = True
        elif self.active.device != device:
            self._refuse_capture(f"counters on {device}")
            self.active, self.seen = self.active.to(device), self.seen.to(device)
        assert self.active is not None and self.seen is not None
        return self.active, self.seen

    def allocate(self, channels: int, device: torch.device | str | None = None) -> None:
        """Create zeroed counters for `channels` units, replacing those there are. Raises RuntimeError while a CUDA graph is captured,
        each replay of which would zero them."""
        self._refuse_capture(f"counters of {channels} units")
        # a first forward in inference mode would else leave tensors that no training step may write to
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            self.active = torch.zeros(channels, dtype=torch.int64, device=device)
            self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.mixed = False

    def _refuse_capture(self, needed: str) -> None:
        if torch.compiler.is_compiling() or not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
            return
        got = "none" if self.active is None else f"{self.active.numel()} on {self.active.device}"
        raise RuntimeError(
            f"{type(self).__name__} must have {needed} before a CUDA graph is captured, got {got}: train a step, or call "
            "allocate(channels, device); a module that is called with several widths needs prepare()"
        )

    def reset_counts(self) -> None:
        """Start a new window: zero the counters, if there are any."""
        if self.active is not None and self.seen is not None:
            self.active.zero_()
            self.seen.zero_()
        self.mixed = False

    def select_units(self, kept: Tensor) -> None:
        """Keep the counters of the units `kept` (int64 indices) when the others are removed."""
        if self.active is not None:
            self.active = self.active.index_select(0, kept.to(self.active.device))

    def dead(self) -> Tensor | None:
        """(C,) bool: units that were looked at and never active since `reset_counts`; None if nothing was counted, or calls
        of several widths were."""
        if self.active is None or self.seen is None or self.mixed:
            return None
        return (self.active == 0) & (self.seen > 0)

    def extra_repr(self) -> str:
        parts = [f"channel_dim={self.channel_dim}"] if self.channel_dim != 1 else []
        if self.noise_std:
            parts.append(f"noise_std={self.noise_std:g}")
        return ", ".join(parts)


class DemPReLU(DemPActivation):
    """Drop-in for `nn.ReLU`: y = max(x, 0), counting the active elements of each channel in the same pass.

    Args:
        inplace: overwrite the input, as `nn.ReLU(inplace=True)` does.
        noise_std, channel_dim: see `DemPActivation`, as for shapes, dtypes and errors.
    """

    def __init__(self, inplace: bool = False, noise_std: float = 0.0, channel_dim: int = 1) -> None:
        super().__init__(noise_std=noise_std, channel_dim=channel_dim)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self._takes(x) and torch._C._current_graph_task_id() == -1:
            return functional.relu_into(x, self.channel_dim, *self._counters(x.shape[self.channel_dim], x.device))
        return super().forward(x)

    def _takes(self, x: Tensor) -> bool:
        """Whether x can take the short way, which leaves it to the other to refuse."""
        if self.inplace or self.noise_std or not functional.is_tiny(x):
            return False
        return x.is_contiguous() and x.is_floating_point() and -x.dim() <= self.channel_dim < x.dim() > 1

    def _plain(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=self.inplace)

    def _counted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.inplace:
            return functional.relu_(x, self.channel_dim, self.noise_std)
        return functional.relu(x, self.channel_dim, self.noise_std)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, ["inplace=True" if self.inplace else "", super().extra_repr()]))


class DemPLeakyReLU(DemPActivation):
    """Drop-in for `nn.LeakyReLU`: y = x if x > 0 else negative_slope * x; a unit is active where x > 0.

    Args:
        negative_slope: finite; ValueError else.
        inplace: overwrite the input where the slope is positive.
        noise_std, channel_dim: see `DemPActivation`, as for shapes, dtypes and errors.
    """

    def __init__(
        self, negative_slope: float = 0.01, inplace: bool = False, noise_std: float = 0.0, channel_dim: int = 1
    ) -> None:
        super().__init__(noise_std=noise_std, channel_dim=channel_dim)
        require_number("DemPLeakyReLU: negative_slope", negative_slope)
        if not math.isfinite(negative_slope):
            raise ValueError(f"DemPLeakyReLU: negative_slope must be finite, got {negative_slope}")
        self.negative_slope = float(negative_slope)
        self.inplace = inplace

    def _plain(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope, inplace=self.inplace)

    def _counted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # The sign of the output tells that of the input only for a positive slope.
        if self.inplace and self.negative_slope > 0:
            return functional.leaky_relu_(x, self.negative_slope, self.channel_dim, self.noise_std)
        return functional.leaky_relu(x, self.negative_slope, self.channel_dim, self.noise_std)

    def extra_repr(self) -> str:
        parts = [f"negative_slope={self.negative_slope:g}", "inplace=True" if self.inplace else "", super().extra_repr()]
        return ", ".join(filter(None, parts))


class DemPGELU(DemPActivation):
    """Drop-in for `nn.GELU`: y = x Phi(x); a unit is active where x > 0.

    Args:
        approximate: "none", or "tanh" for y = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2; ValueError else.
        noise_std, channel_dim: see `DemPActivation`, as for shapes, dtypes and errors.
    """

    def __init__(self, approximate: str = "none", noise_std: float = 0.0, channel_dim: int = 1) -> None:
        super().__init__(noise_std=noise_std, channel_dim=channel_dim)
        if approximate not in ("none", "tanh"):
            raise ValueError(f"DemPGELU: approximate must be 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate

    def _plain(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.approximate)

    def _counted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.gelu(x, self.approximate, self.channel_dim, self.noise_std)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"approximate={self.approximate!r}", super().extra_repr()]))


class DemPSiLU(DemPActivation):
    """Drop-in for `nn.SiLU`: y = x * sigmoid(x); a unit is active where x > 0. Arguments, shapes, dtypes and errors: see
    `DemPActivation`."""

    def __init__(self, noise_std: float = 0.0, channel_dim: int = 1) -> None:
        super().__init__(noise_std=noise_std, channel_dim=channel_dim)

    def _plain(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def _counted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.silu(x, self.channel_dim, self.noise_std)


class SelectiveAdd(nn.Module):
    """Residual addition a + b whose operands may have lost different channels.

    While both carry the same channels it is the plain addition. Once the skip b carries other channels than the
    output, `set_selection` gives the map: out[:, c] = a[:, c] + (b[:, index[c]] if index[c] >= 0 else 0). A channel
    that b lost was dead at its source, so adding zero is exact. No parameter, and nothing in the `state_dict` until
    channels are removed (`keep_channels`): then `channels` is in it. The three tensors are no buffers, of which averages
    are taken (`AveragedModel(use_buffers=True)`), in floating point.

    Args:
        channel_dim: dimension of the channels.
        inplace: write the sum into a, in training. Only right where nobody needs a, a backward pass included. Not done where it
            would change the sum's dtype, or where a is a view, as the output of a module with full backward hooks is.
        keep_dtype: the sum has the dtype of a, as that of `a.add_(b)` has, instead of the promoted one.
    """

    keep_dtype: bool = False
    index: Tensor | None = None
    inverse: Tensor | None = None
    channels: Tensor | None = None
    """(channels at first,) uint8: 1 where the sum still has the channel, plus 2 where the skip has it; None: nothing was
    removed. From it `shrink_to` and `load_state_dict` know the selection."""

    def __init__(self, channel_dim: int = 1, inplace: bool = False, keep_dtype: bool = False) -> None:
        super().__init__()
        self.channel_dim = int(channel_dim)
        self.inplace, self.keep_dtype = inplace, keep_dtype
        self.index = self.inverse = self.channels = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelectiveAdd:
        super()._apply(fn, recurse)
        for name in ("index", "inverse", "channels"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, fn(tensor))
        return self

    def set_selection(self, index: Tensor | None, skip_channels: int = 0) -> None:
        """Set where each output channel is found in the skip.

        Args:
            index: (C_out,) int64; position in the skip's channels, or -1 where the skip has lost the channel.
                None restores the plain addition.
            skip_channels: number of channels that the skip has.
        """
        if index is None:
            self.index = self.inverse = None
            return
        if index.dim() != 1 or index.dtype != torch.int64:
            raise ValueError(
                f"SelectiveAdd: index must be a 1-D int64 tensor, got {index.dim()}-D {index.dtype}"
            )
        if index.numel() and not (-1 <= int(index.min()) and int(index.max()) < skip_channels):
            raise ValueError(
                f"SelectiveAdd: index must lie in [-1, {skip_channels}), got values from {int(index.min())} "
                f"to {int(index.max())}"
            )
        inverse = torch.full((skip_channels,), -1, dtype=torch.int64, device=index.device)
        present = index >= 0
        inverse[index[present]] = torch.arange(index.numel(), device=index.device)[present]
        self.index, self.inverse = index, inverse

    def keep_channels(self, out: Tensor, skip: Tensor) -> None:
        """Follow a removal: of the channels that the sum and the skip have, (channels,) bool each, the others are gone."""
        if self.channels is None and self.index is not None:  # set by hand: what the channels were at first is not known
            place = torch.where(skip, skip.cumsum(0) - 1, -1)
            index = self.index[out]
            self.set_selection(torch.where(index < 0, -1, place[index]), int(skip.sum()))
            return
        channels = torch.full_like(out, 3, dtype=torch.uint8) if self.channels is None else self.channels.clone()
        for bit, kept in ((1, out), (2, skip)):
            channels[(channels & bit > 0).nonzero().squeeze(1)[~kept]] -= bit
        self.channels = channels
        self._select(channels)

    def _select(self, channels: Tensor) -> None:
        """Set the selection that `channels` tells."""
        out, skip = (channels.bitwise_and(bit).bool() for bit in (1, 2))
        place = torch.where(skip, skip.cumsum(0) - 1, -1)
        index, count = place[out], int(skip.sum())
        plain = torch.equal(index, torch.arange(count, device=index.device))
        self.set_selection(None if plain else index, count)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.channels is not None:
            destination[f"{prefix}channels"] = self.channels

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if self.channels is None:
            return
        key = f"{prefix}channels"
        found = state_dict.get(key)
        if found is None:
            missing_keys.append(key)
        elif not isinstance(found, Tensor) or found.shape != self.channels.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            error_msgs.append(f"size mismatch for {key}: must be of shape {tuple(self.channels.shape)}, got {got}")
        else:
            self.channels = found.detach().to(self.channels, copy=True)
            self._select(self.channels)
        if key in unexpected_keys:
            unexpected_keys.remove(key)

    def select(self, skip: Tensor) -> Tensor:
        """The skip with the channels of the sum."""
        if self.index is None or self.inverse is None:
            return skip
        if self.index.device != skip.device and not skip.is_meta:  # moved by what moves parameters and buffers only: fully_shard
            self.index, self.inverse = self.index.to(skip.device), self.inverse.to(skip.device)
        return functional.channel_select(skip, self.index, self.inverse, self.channel_dim)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        b = self.select(b)
        if self.inplace and self.training and (self.keep_dtype or a.dtype == b.dtype):
            if torch.compiler.is_compiling() or not a._is_view():
                return a.add_(b)
        total = a + b
        return total.to(a.dtype) if self.keep_dtype else total

    def extra_repr(self) -> str:
        if self.index is None:
            return "plain"
        return f"channels={self.index.numel()}, from_skip={int((self.index >= 0).sum())}"
