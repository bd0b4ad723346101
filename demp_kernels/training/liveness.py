"""Which units are alive: in the last step, over a window of training steps, or on scanned batches."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..compaction.state_checks import entry
from ..modules import DemPActivation

__all__ = ["StepLiveness", "activations_of", "check_counters", "not_finite", "scan_dead", "window_dead"]


def activations_of(model: nn.Module) -> dict[str, DemPActivation]:
    """The counting activations of a model by name, each module once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DemPActivation)}


def window_dead(model: nn.Module) -> dict[str, Tensor]:
    """Criterion `window`: dead iff no element was active in any training step since the counters were reset.

    Returns name -> (C,) bool for every activation that was looked at. Stricter than a scan, and free: the counters are
    filled by the training forwards.
    """
    masks = {name: module.dead() for name, module in activations_of(model).items()}
    return {name: mask for name, mask in masks.items() if mask is not None}


@torch.no_grad()
def scan_dead(model: nn.Module, batches: Iterable[Any] | Callable[[], Iterable[Any]]) -> dict[str, Tensor]:
    """Criterion `scan`, the authors': dead iff the output's sum over samples and space is <= 0 in every batch.

    Args:
        model: is run in evaluation mode; every module's mode is restored.
        batches: inputs (a tensor or a tuple of positional arguments), or a function that returns fresh ones. Use
            un-augmented training images, 1,280 or more in all.

    Returns name -> (C,) bool. Raises ValueError if there was no batch.
    """
    dead: dict[str, Tensor] = {}

    def watch(name: str, channel_dim: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            others = [d for d in range(output.dim()) if d != channel_dim % output.dim()]
            # not (sum > 0) would call NaN dead; a unit that gives NaN is alive and has to be seen
            silent = output.sum(others, dtype=torch.float64 if output.device.type == "cpu" else torch.float32) <= 0
            dead[name] = silent if name not in dead else dead[name] & silent

        return hook

    modes = {module: module.training for module in model.modules()}
    handles = [
        module.register_forward_hook(watch(name, module.channel_dim)) for name, module in activations_of(model).items()
    ]
    try:
        model.eval()
        for batch in batches() if callable(batches) else batches:
            model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if not dead:
        raise ValueError("scan_batches must give at least one batch, got none")
    return dead


@torch.no_grad()
def not_finite(model: nn.Module) -> tuple[str, ...]:
    """Names of parameters and buffers that hold NaN or infinity. One pass over them, one synchronisation for each device and type.

    A NaN in an activation counts as active, so that such a unit is never taken for dead; what made it, or came of it, stays
    in the weights or in the running statistics, where this finds it.
    """
    alike: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    names = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
            names.append(name)
            alike.setdefault((tensor.device, tensor.dtype), {})[name] = tensor
    fine: dict[str, bool] = {}
    for tensors in alike.values():
        largest = torch.stack(torch._foreach_norm(list(tensors.values()), float("inf")))
        fine.update(zip(tensors, largest.isfinite().tolist()))
    return tuple(name for name in names if not fine[name])


def check_counters(counters: dict[str, Any], model: nn.Module, units: dict[str, int]) -> None:
    """Raises ValueError unless `counters`, from a file, fit the model once it has these `units`."""
    modules = activations_of(model)
    for name, counts in counters.items():
        active, seen = (entry(counts, key, Tensor, f"DemP state of {name}") for key in ("active", "seen"))
        if name not in modules or active.dim() != 1 or seen.dim() != 0 or {active.dtype, seen.dtype} != {torch.int64}:
            raise ValueError(f"counters must be int64 tensors of activations of the model, got other ones for {name!r}")
        if len(active) != units.get(name, len(active)):
            raise ValueError(f"DemP state has {len(active)} units for {name}, the model {units[name]}")


class StepLiveness:
    """Which units were active since the last look, without stopping the device.

    Compares each counter with a copy of what it was: two calls for the whole list of counters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: dict[str, Tensor] = {}

    def take(self) -> dict[str, Tensor]:
        """name -> (C,) bool: active at least once since the last `take`."""
        counters = {name: m.active for name, m in activations_of(self._model).items() if m.active is not None}
        live = {}
        for name, counter in counters.items():
            before = self._before.get(name)
            live[name] = counter != before if before is not None and before.shape == counter.shape else counter > 0
        stale = [n for n, c in counters.items() if n not in self._before or self._before[n].shape != c.shape]
        for name in stale:
            self._before[name] = torch.empty_like(counters[name])
        if counters:
            torch._foreach_copy_([self._before[name] for name in counters], list(counters.values()))
        return live

    def restart(self) -> None:
        """Forget the copies: the counters were reset or resized."""
        self._before.clear()
