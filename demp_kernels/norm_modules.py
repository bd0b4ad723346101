"""`DemPBatchNormAct2d`: BatchNorm2d, an optional residual, a counting activation, as one op in training."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import functional
from .modules import DemPActivation, DemPGELU, DemPLeakyReLU, DemPReLU, DemPSiLU, SelectiveAdd

__all__ = ["DemPBatchNormAct2d"]

_MAKERS: dict[str, Callable[[], DemPActivation]] = {
    "relu": DemPReLU,
    "leaky_relu": DemPLeakyReLU,
    "gelu": DemPGELU,
    "gelu_tanh": lambda: DemPGELU("tanh"),
    "silu": DemPSiLU,
}


class DemPBatchNormAct2d(nn.BatchNorm2d):
    """y = act(batch_norm(x) [+ residual]), with the active elements of every channel counted.

    In training mode it is one op (`functional.norm_act`): nothing between x and y is stored, and backward recomputes
    what it needs. In evaluation mode, for tiny inputs on the CPU, where the calls cost more than the work, and for inputs
    that the op does not take (a residual of another dtype), it is exactly

        self.act(self.add(nn.BatchNorm2d.forward(self, x), residual))

    so both agree to rounding. A BatchNorm2d whose state it can load and give: same parameters, buffers, keys, and the same
    running statistics (also with momentum=None, and with num_batches_tracked).

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for nn.BatchNorm2d.
        activation: "relu", "leaky_relu" (slope 0.01), "gelu", "gelu_tanh", "silu", or a DemP activation with
            channel_dim 1, which becomes the child `act`.
        noise_std: standard deviation of the noise on active elements, in training, of an activation given by name; see
            `DemPActivation`.

    Children: `act` holds the counters (`act.active`, `act.dead()`), which are no state; `add` the selection of the
    residual's channels after pruning (`SelectiveAdd.set_selection`), in the `state_dict` as `add.channels` once there is one.

    Shapes: x (N, C, H, W), contiguous or channels_last -> y of the same shape, dtype and layout. residual: x's shape, or
    with the skip's channels if `add` has a selection.

    Raises ValueError for an unknown activation, an input that is not 4-D, or a single value a channel.

    `nn.SyncBatchNorm.convert_sync_batchnorm` turns any BatchNorm into one without activation: convert first, then
    `prepare`, which leaves synchronised layers unfused: their statistics take a collective between the op's two passes.
    The activation behind them counts on each rank, and `DemP` adds the counts up, so that ranks train as one process on
    the global batch would.
    """

    act: DemPActivation
    add: SelectiveAdd

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | DemPActivation = "relu",
        noise_std: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if isinstance(activation, str):
            if activation not in _MAKERS:
                raise ValueError(
                    f"DemPBatchNormAct2d: activation must be one of {', '.join(_MAKERS)}, got {activation!r}"
                )
            act = _MAKERS[activation]()
            act.noise_std = float(noise_std)
        else:
            act = activation
        _kind(act)
        self.act = act
        self.add = SelectiveAdd()

    @classmethod
    def fuse(cls, norm: nn.BatchNorm2d, act: DemPActivation, add: SelectiveAdd | None = None) -> DemPBatchNormAct2d:
        """The fused module of a BatchNorm2d, the activation behind it and the addition between them. It shares the
        parameters and buffers of `norm` and takes over `act` and `add`."""
        fused = cls(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, act, device="meta"
        )
        for name, parameter in norm._parameters.items():
            fused.register_parameter(name, parameter)
        for name, buffer in norm._buffers.items():
            fused.register_buffer(name, buffer, persistent=name not in norm._non_persistent_buffers_set)
        if add is not None:
            fused.add = add
        fused.training = norm.training
        return fused

    def unfuse(self) -> nn.BatchNorm2d:
        """A plain BatchNorm2d that shares this one's parameters and buffers."""
        norm = nn.BatchNorm2d(
            self.num_features, self.eps, self.momentum, self.affine, self.track_running_stats, device="meta"
        )
        for name, parameter in self._parameters.items():
            norm.register_parameter(name, parameter)
        for name, buffer in self._buffers.items():
            norm.register_buffer(name, buffer)
        return norm.train(self.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not (self.training and self.act.training and self._fits(x, residual)):
            y = super().forward(x)
            return self.act(y if residual is None else self.add(y, residual))
        self._check_input_dim(x)
        if residual is not None:
            residual = self.add.select(residual)
        activation, slope = _kind(self.act)
        y, active, mean, var = functional.norm_act(
            x, self.weight, self.bias, residual, activation, slope, self.eps, self.act.noise_std
        )
        per_channel = x.numel() // max(x.shape[1], 1)
        self.act.count(active, per_channel)
        if self.track_running_stats and self.running_mean is not None:
            self._update_statistics(mean, var, per_channel)
        return y

    def _fits(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether the op takes these operands, and gains. The composition takes (or refuses) everything that PyTorch does."""
        if functional.is_tiny(x) and x.dtype in (torch.float32, torch.float64):  # 16-bit ones would be rounded in between
            return not (x.dim() == 4 and x.shape[1] == self.num_features < x.numel())
        if residual is None:
            return True
        if residual.dtype != x.dtype or residual.device != x.device or residual.dim() != x.dim():
            return False
        channels = x.shape[1] if self.add.inverse is None else self.add.inverse.numel()
        return residual.shape == (x.shape[0], channels, *x.shape[2:])

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, var: Tensor, count: int) -> None:
        factor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        if count and self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), factor)


def _kind(act: DemPActivation) -> tuple[str, float]:
    """How the op calls an activation module, and its slope. Raises ValueError for one that the op does not have."""
    if isinstance(act, DemPActivation) and act.channel_dim == 1:
        if isinstance(act, DemPReLU):
            return "relu", 0.0
        if isinstance(act, DemPLeakyReLU):
            return "leaky_relu", act.negative_slope
        if isinstance(act, DemPGELU):
            return "gelu" if act.approximate == "none" else "gelu_tanh", 0.0
        if isinstance(act, DemPSiLU):
            return "silu", 0.0
    raise ValueError(f"DemPBatchNormAct2d: activation must be a DemP activation with channel_dim=1, got {act}")
