"""Folding: what removed units still gave, measured where it is read and added to the biases there.

A layer y = W x + b that loses the inputs D loses l = W[:, D] x[D] of its output. If these inputs are constant, so is l, and
b + l is exact. If they are nearly constant (tails of GELU, SiLU, leaky ReLU), b + mean(l) is the best that a bias can do,
and the root mean square of l - mean(l), beside the deviation of y, says what is left over. l is measured on batches at the
layer itself, so whatever lies between the unit and the layer (pooling, flattening, dropout, gates, padding) is in it.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph import UnitGraph
from ..graph.capture import evaluation_mode
from ..graph.units import Keep
from ..graph.values import Reader
from .plan import CompactionError, Plan, Shift
from .report import Folded

__all__ = ["Batches", "Folding", "as_batches"]


def _alone(tensors: list[Tensor]) -> None:
    """Sums over the processes of a run, where there is one."""


@dataclass
class Batches:
    """Positional arguments of forwards, and how float64 tensors are summed in place over processes that have other ones."""

    arguments: list[tuple[Any, ...]]
    add_up: Callable[[list[Tensor]], None] = _alone


def as_batches(batches: Any, add_up: Callable[[list[Tensor]], None] = _alone) -> Batches:
    """Batches out of an iterable of inputs (tensors, or tuples of positional arguments) or a function that returns one.

    Raises TypeError for anything else, ValueError if there is no batch.
    """
    if isinstance(batches, Batches):
        return batches
    found = batches() if callable(batches) else batches
    if not isinstance(found, Iterable) or isinstance(found, (str, Mapping, Tensor)):
        raise TypeError(f"fold_batches must be batches of inputs or a function that returns them, got {type(found).__name__}")
    arguments = [tuple(batch) if isinstance(batch, (tuple, list)) else (batch,) for batch in found]
    if not arguments:
        raise ValueError("fold_batches must have at least one batch, got none")
    return Batches(arguments, add_up)


class Folding:
    """What stays of a model whose dead units need not be zero, and what the layers that read them are given instead.

    Args:
        models: the model and its followers, each of which is measured on its own: their units have other constants.
        dead: activation -> (units,) bool.
        max_change: a layer whose output would change by more than this, as a share of its standard deviation, keeps its
            inputs.

    keep: what stays. folded: layer -> what was done, of the first model.

    Raises CompactionError if a layer's output is not finite on the batches. Nothing is changed.
    """

    def __init__(
        self, models: Sequence[nn.Module], graph: UnitGraph, dead: Mapping[str, Tensor], batches: Batches, *,
        round_to: int, min_units: int, max_change: float,
    ) -> None:
        nonzero = _nonzero(models, graph, dead, batches)
        whole: set[str] = set()
        while True:
            self.keep = graph.keep(dead, round_to=round_to, min_units=min_units, nonzero=nonzero, whole=whole)
            self._found = [_measure(model, graph, self.keep, batches) for model in models]
            over = {path for found in self._found for path, loss in found.items() if loss.folded.change > max_change}
            if over <= whole:
                break
            whole |= over
        self.folded = {path: loss.folded for path, loss in self._found[0].items() if loss.folded.change_without > 0}
        self.kept = _reasons(graph, nonzero, self.keep, whole, max_change)

    def add_to(self, plan: Plan, model: int, modules: Mapping[str, nn.Module]) -> None:
        """The shifts of the numbered model, whose modules these are, become part of a plan."""
        for loss in self._found[model].values():
            if loss.by.any():
                path, _, leaf = loss.folded.into.rpartition(".")
                plan.shifts.append(Shift(getattr(modules[path], leaf), loss.by))


@dataclass
class _Moments:
    """Mean and summed squared deviation of each row, over columns that come in pieces (Chan et al. 1979)."""

    mean: Tensor
    deviation: Tensor
    count: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Moments:
        variance, mean = torch.var_mean(rows.double(), 1, correction=0)
        count = torch.full((), rows.shape[1], dtype=torch.float64, device=rows.device)
        return cls(mean, variance * count, count)

    def add(self, other: _Moments) -> None:
        total = self.count + other.count
        apart = other.mean - self.mean
        self.deviation += other.deviation + apart**2 * self.count * other.count / total
        self.mean += apart * other.count / total
        self.count = total

    def add_up(self, over: Callable[[list[Tensor]], None]) -> None:
        """The same over the columns of all processes."""
        own, count, total = self.mean, self.count, self.mean * self.count
        self.count = count.clone()
        over([total, self.count])
        self.mean = total / self.count
        self.deviation += count * (own - self.mean) ** 2
        over([self.deviation])


@dataclass
class _Loss:
    """What a layer is given for inputs that it loses: `by` is added to `into`, (outputs that stay,)."""

    by: Tensor
    folded: Folded


class _Meter:
    """Measures in a layer's forwards what it loses without the inputs `gone`, (inputs,) bool.

    lost, output: moments of what is lost and of the whole output, over samples and positions.
    """

    def __init__(self, gone: np.ndarray) -> None:
        self.gone = torch.from_numpy(gone)
        self.lost: _Moments | None = None
        self.output: _Moments | None = None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """A forward hook: computes the layer once more, on the lost inputs alone and without the bias."""
        x, *rest = args or (kwargs["input"],)
        assert isinstance(layer.weight, Tensor)
        dim = x.dim() - 1 if isinstance(layer, nn.Linear) else x.dim() - layer.weight.dim() + 1
        dtype = torch.promote_types(x.dtype, torch.float32)
        linear = copy.copy(layer)  # shares everything; its forward is called without hooks
        linear._parameters = {"weight": nn.Parameter(layer.weight.detach().to(dtype)), "bias": None}
        stays = ~self.gone.to(x.device).view([-1 if d == dim else 1 for d in range(x.dim())])
        lost = linear.forward(x.to(dtype).masked_fill(stays, 0), *rest)
        moments = [_Moments.of(t.movedim(dim, 0).flatten(1)) for t in (lost, output)]
        if self.lost is None or self.output is None:
            self.lost, self.output = moments
        else:
            self.lost.add(moments[0])
            self.output.add(moments[1])

    def conclude(self, reader: Reader, rows: np.ndarray, batches: Batches) -> _Loss:
        """The loss, with the outputs `rows`, (outputs,) bool, that stay. Raises CompactionError if nothing was measured."""
        if self.lost is None or self.output is None or reader.into is None:
            raise CompactionError(f"fold_batches must run {reader.path}, which did not run on them")
        for moments in (self.lost, self.output):
            moments.add_up(batches.add_up)
        stay = torch.from_numpy(rows).to(self.lost.mean.device)
        mean, left, whole = self.lost.mean[stay], self.lost.deviation[stay], self.output.deviation[stay].sum()
        if not (mean.isfinite().all() and whole.isfinite()):
            raise CompactionError(f"fold_batches must give finite values, {reader.path} gave others")
        without = left + self.lost.count * mean**2
        change, change_without = (
            float((part.sum() / whole).sqrt().nan_to_num(0.0, posinf=float("inf"))) for part in (left, without)
        )
        return _Loss(reader.sign * mean, Folded(reader.into, int(self.gone.sum()), change, change_without))


@torch.no_grad()
def _measure(model: nn.Module, graph: UnitGraph, keep: Keep, batches: Batches) -> dict[str, _Loss]:
    """Layer -> its loss when `keep` stays, for those that lose inputs and can be given a constant instead."""
    modules = dict(model.named_modules(remove_duplicate=False))
    readers: dict[str, Reader] = {}
    for reader in graph.readers:
        if reader.into is not None and not keep.atoms[graph.flow.atoms(reader.slot)].all():
            readers.setdefault(reader.path, reader)
    if missing := [path for path in readers if path not in modules]:
        raise ValueError(f"followers must be copies of the model, got a {type(model).__name__} without {missing[0]}")
    meters = {path: _Meter(~keep.atoms[graph.flow.atoms(reader.slot)]) for path, reader in readers.items()}
    _run(model, batches, [(modules[path], meter) for path, meter in meters.items()])
    return {
        path: meters[path].conclude(reader, keep.atoms[graph.axes[str(reader.into), 0]], batches)
        for path, reader in readers.items()
    }


@torch.no_grad()
def _nonzero(
    models: Sequence[nn.Module], graph: UnitGraph, dead: Mapping[str, Tensor], batches: Batches
) -> dict[str, Tensor]:
    """Those of the dead units that some model gives a value other than zero on the batches, or that cannot be looked at:
    the outputs of functional activations."""
    masks = {graph.activations[i].name: torch.from_numpy(mask) for i, mask in graph.masks(dead).items()}
    counts: dict[str, Tensor] = {}

    def watch(name: str, dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            others = [d for d in range(output.dim()) if d != dim]
            found = (output != 0).sum(others).double()
            counts[name] = counts[name] + found if name in counts else found

        return hook

    for model in models:
        modules = dict(model.named_modules(remove_duplicate=False))
        hooks = [
            (modules[a.module], watch(a.name, a.dim)) for a in graph.activations if a.name in masks and a.module in modules
        ]
        if any(mask.any() for mask in masks.values()):
            _run(model, batches, hooks)
    batches.add_up(list(counts.values()))
    return {
        name: mask & (counts[name].cpu() > 0) if name in counts and counts[name].shape == mask.shape else mask
        for name, mask in masks.items()
    }


def _run(model: nn.Module, batches: Batches, hooks: Sequence[tuple[nn.Module, Callable[..., None]]]) -> None:
    """Forwards in evaluation mode, watched."""
    # compiled code would not call hooks that came after it
    with _watched(hooks), evaluation_mode(model), torch.compiler.set_stance("force_eager"):
        for arguments in batches.arguments if hooks else ():
            model(*arguments)


@contextmanager
def _watched(hooks: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _reasons(
    graph: UnitGraph, nonzero: Mapping[str, Tensor], keep: Keep, whole: Collection[str], max_change: float
) -> dict[str, str]:
    """Activation -> why dead units that are not zero stay, where that is because of what reads them."""
    reasons = {}
    for name, mask in nonzero.items():
        activation = next(a for a in graph.activations if a.name == name)
        stay = activation.atoms[np.nonzero(mask.numpy() & keep.atoms[activation.atoms])[0]]
        if not stay.size or graph.is_pinned[stay].any():
            continue
        for reader in graph.readers:
            if (reader.into is None or reader.path in whole) and np.isin(graph.flow.atoms(reader.slot), stay).any():
                why = reader.reason or f"without them {reader.path} would change by more than {max_change:g}"
                reasons[name] = f"{stay.size} dead units: they are not zero, and {why}"
                break
        else:
            reasons[name] = f"{stay.size} dead units: they are not zero, and more than layers with a bias reads them"
    return reasons
