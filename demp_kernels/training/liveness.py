"""Which units are alive: in the last step, over a window of training steps, or on scanned batches."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compaction.batches import as_arguments, watch
from ..compaction.entry import counted_dead
from ..compaction.state_checks import entry
from ..graph import UnitGraph
from ..graph.units import ActivationUnits
from ..modules import DemPActivation
from .distributed import every_rank, sum_counters

__all__ = [
    "StepLiveness", "activations_of", "alike_on_ranks", "allocate_counters", "calls_by_name", "check_counters", "counters_of", "not_finite",
    "of_calls", "scan_dead", "several_widths", "window_dead",
]


def activations_of(model: nn.Module) -> dict[str, DemPActivation]:
    """The counting activations of a model by name, each module once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DemPActivation)}


def one_width(calls: Mapping[str, list[ActivationUnits]]) -> dict[str, int]:
    """Activations whose analysed calls are of one width, and that width. It is these that ranks exchange: which they are does not
    depend on what a rank has called."""
    widths = {name: {call.atoms.size for call in of_name} for name, of_name in calls.items()}
    return {name: found.pop() for name, found in widths.items() if len(found) == 1}


def counters_of(model: nn.Module, calls: Mapping[str, list[ActivationUnits]]) -> list[Tensor]:
    """`active` and `seen` of every activation of one width, in the model's order. A call that was not analysed may have been of
    another: then ones stand for the counters, so that no rank takes a unit for dead."""
    modules = activations_of(model)
    device = next(model.parameters()).device
    counters: list[Tensor] = []
    for name, width in one_width(calls).items():
        active, seen = modules[name].active, modules[name].seen
        if active is None or seen is None or active.numel() != width or modules[name].mixed:
            active, seen = torch.ones(width, dtype=torch.int64, device=device), torch.ones((), dtype=torch.int64, device=device)
        counters += [active, seen]
    return counters


def allocate_counters(model: nn.Module, calls: Mapping[str, list[ActivationUnits]]) -> None:
    """Give every activation of one width counters before anything is called: so that ranks exchange the same ones where not every
    rank has called each of them yet, and so that none is made inside a CUDA graph, whose replays would zero it."""
    modules = activations_of(model)
    for name, width in one_width(calls).items():
        if modules[name].active is None:
            modules[name].allocate(width, next(model.parameters()).device)


def calls_by_name(model: nn.Module, graph: UnitGraph) -> dict[str, list[ActivationUnits]]:
    """Name of each activation, as `activations_of` has it -> its calls, which follow the removals."""
    calls = graph.calls_of(model)
    return {name: calls.get(module, []) for name, module in activations_of(model).items()}


def alike_on_ranks(
    calls: Mapping[str, list[ActivationUnits]], live: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """The masks of activations of one width, on every rank the same ones: all live where the counter is of another."""
    return {
        name: live[name] if name in live and live[name].numel() == width else torch.ones(width, dtype=torch.bool, device=device)
        for name, width in one_width(calls).items()
    }


def of_calls(calls: Mapping[str, list[ActivationUnits]], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks by the name of an activation as masks by the names of its calls."""
    return {call.name: mask for name, mask in masks.items() for call in calls[name]}


def several_widths(calls: Mapping[str, list[ActivationUnits]]) -> dict[str, list[int]]:
    """Activations that are called with different numbers of units, and these numbers: one counter cannot tell them apart."""
    one = one_width(calls)
    return {name: [call.atoms.size for call in of_name] for name, of_name in calls.items() if of_name and name not in one}


def window_dead(model: nn.Module, graph: UnitGraph) -> dict[str, Tensor]:
    """Criterion `window`: dead iff no element was active, on any rank, in any training step since the counters were reset.

    Every rank's counters become the sums over the ranks. Returns name -> (units,) bool for the activations that were looked
    at, which are those of one width. Stricter than a scan, and free: the counters are filled by the training forwards.
    """
    calls = calls_by_name(model, graph)
    sum_counters(counters_of(model, calls))
    pooled = {call.name for name in one_width(calls) for call in calls[name]}
    return {name: mask for name, mask in counted_dead(model, graph).items() if name in pooled}


@torch.no_grad()
def scan_dead(
    model: nn.Module, graph: UnitGraph, batches: Iterable[Any] | Callable[[], Iterable[Any]]
) -> dict[str, Tensor]:
    """Criterion `scan`, the authors': dead iff the output's sum over samples and space is <= 0 in every batch, on every rank.

    Args:
        model: is run in evaluation mode; every module's mode is restored.
        batches: inputs (a tensor or a tuple of positional arguments), or a function that returns fresh ones. Use
            un-augmented training images, 1,280 or more in all.

    Returns name -> (units,) bool. Raises ValueError if there was no batch.
    """
    dead: dict[str, Tensor] = {}
    made: Counter[nn.Module] = Counter()
    """Calls of this forward."""

    def look(calls: list[ActivationUnits]) -> Callable[..., None]:
        def hook(module: DemPActivation, _args: Any, _kwargs: Any, output: Tensor) -> None:
            made[module] += 1
            if made[module] > len(calls) or output.shape[module.channel_dim] != calls[made[module] - 1].atoms.size:
                return  # not a call that was analysed; those were in this order, and those of training alone behind them
            name = calls[made[module] - 1].name
            others = [d for d in range(output.dim()) if d != module.channel_dim % output.dim()]
            # not (sum > 0) would call NaN dead; a unit that gives NaN is alive and has to be seen
            silent = output.sum(others, dtype=torch.float64 if output.device.type == "cpu" else torch.float32) <= 0
            dead[name] = silent if name not in dead else dead[name] & silent

        return hook

    calls = graph.calls_of(model)
    hooks = [(module, look(calls[module])) for module in activations_of(model).values() if module in calls]

    def forwards() -> Iterator[tuple[Any, ...]]:
        # one after the other: a scan's images need not fit into memory together
        for batch in batches() if callable(batches) else batches:
            made.clear()
            yield as_arguments(batch)

    watch(model, forwards(), hooks)
    if hooks and not dead:
        raise ValueError("scan_batches must give at least one batch, got none")
    return every_rank(dead)


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

    Compares each counter with a copy of what it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.restart()

    def take(self) -> dict[str, Tensor]:
        """name -> (C,) bool: active at least once since the last `take`."""
        counters = {name: m.active for name, m in self._activations.items() if m.active is not None}
        live = {}
        for name, counter in counters.items():
            before = self._before.get(name)
            live[name] = counter != before if before is not None and _alike(before, counter) else counter > 0
        stale = [n for n, c in counters.items() if n not in self._before or not _alike(self._before[n], c)]
        for name in stale:
            self._before[name] = torch.empty_like(counters[name])
        if counters:
            torch._foreach_copy_([self._before[name] for name in counters], list(counters.values()))
        return live

    def restart(self) -> None:
        """Forget the copies: the counters were reset or resized."""
        self._activations = activations_of(self._model)  # a walk over all modules takes longer than what each step does
        self._before: dict[str, Tensor] = {}


def _alike(a: Tensor, b: Tensor) -> bool:
    """A counter follows the inputs to their device, and the widths of calls."""
    return a.shape == b.shape and a.device == b.device
