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
from ..graph.process_wide import without_compilation
from ..graph.units import Keep
from ..graph.values import Reader
from .plan import CompactionError, Plan, Shift
from .report import Folded

__all__ = ["Batches", "Folding", "as_batches"]


def _of_one_process(tensors: list[Tensor]) -> None:
    """Sums over the processes of a run, where there is one: they are as they should be."""


@dataclass
class Batches:
    """Positional arguments of forwards, and how float64 tensors are summed in place over processes that have other ones."""

    arguments: list[tuple[Any, ...]]
    add_up: Callable[[list[Tensor]], None] = _of_one_process


def as_batches(batches: Any, add_up: Callable[[list[Tensor]], None] = _of_one_process) -> Batches:
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
        max_change: a layer whose output would change by more than this, as a share of its standard deviation, keeps some
            of the inputs.

    keep: what stays. folded: layer -> what was done, of the first model.

    A layer that would change too much loses those inputs first that change it least, each measured alone: as many as the
    sum of their squared changes allows. They may add up to more, which is measured; then as many as the sum of the
    changes itself allows, which is a bound for every subset (triangle inequality).

    Raises CompactionError if a layer's output is not finite on the batches. Nothing is changed.
    """

    def __init__(
        self, models: Sequence[nn.Module], graph: UnitGraph, dead: Mapping[str, Tensor], batches: Batches, *,
        round_to: int, min_units: int, max_change: float,
    ) -> None:
        nonzero = _nonzero(models, graph, dead, batches)
        alone: dict[str, _Alone] = {}
        stay: dict[str, np.ndarray] = {}
        while True:
            self.keep = graph.keep(dead, round_to=round_to, min_units=min_units, nonzero=nonzero, stay=stay)
            self._found = [_measure(model, graph, self.keep, batches) for model in models]
            over = {
                path: loss.classes for found in self._found for path, loss in found.items() if loss.folded.change > max_change
            }
            if not over:
                break
            for path, lost in over.items():
                if path in stay and np.isin(lost, stay[path]).all():
                    raise CompactionError(f"{path} would change by more than {max_change:g}: inputs that must be zero are not")
            # others may be lost than before: widths are kept by other units
            new = [path for path, lost in over.items() if path not in alone or not np.isin(lost, alone[path].classes).all()]
            alone |= _one_by_one(models, graph, self.keep, batches, new) if new else {}
            for path in over:
                stay[path] = np.union1d(stay.get(path, np.empty(0, np.int64)), alone[path].too_much(max_change))
        self.folded = {path: loss.folded for path, loss in self._found[0].items() if loss.folded.change_without > 0}
        self.kept = _reasons(graph, nonzero, self.keep, stay, max_change)

    def add_to(self, plan: Plan, model: int, modules: Mapping[str, nn.Module]) -> None:
        """The shifts of the numbered model, whose modules these are, become part of a plan."""
        for loss in self._found[model].values():
            if loss.by.any():
                path, _, leaf = loss.folded.into.rpartition(".")
                plan.shifts.append(Shift(getattr(modules[path], leaf), loss.by))


@dataclass
class _Moments:
    """Mean and summed squared deviation of each row, (..., rows), over columns that come in pieces (Chan et al. 1979)."""

    mean: Tensor
    deviation: Tensor
    count: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Moments:
        variance, mean = torch.var_mean(rows.double(), 1, correction=0)
        count = torch.full((), rows.shape[1], dtype=torch.float64, device=rows.device)
        return cls(mean, variance * count, count)

    @classmethod
    def stack(cls, several: Sequence[_Moments]) -> _Moments:
        """Of the same columns, as one more dimension in front."""
        return cls(torch.stack([m.mean for m in several]), torch.stack([m.deviation for m in several]), several[0].count)

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
    """What a layer is given for the inputs that it loses, of `classes`: (outputs that stay,) `by`, added to a tensor."""

    classes: np.ndarray
    by: Tensor
    folded: Folded


class _Alone:
    """What a layer would change by without each of some classes of inputs alone.

    classes: ascending in that. squares: the squared changes, as shares of the output's variance. asked: how often.
    """

    def __init__(self, classes: np.ndarray, squares: np.ndarray) -> None:
        order = np.argsort(squares)
        self.classes, self.squares = classes[order], squares[order]
        self.asked = 0

    def too_much(self, most: float) -> np.ndarray:
        """The classes to keep so that the layer changes by `most`: if they were uncorrelated; whatever they are, the
        second time; all of them the third, should rounding have been in the way."""
        self.asked += 1
        sums = (np.cumsum(self.squares), np.cumsum(np.sqrt(self.squares)))
        limits = (most**2, most)
        fit = (sums[self.asked - 1] <= limits[self.asked - 1]).sum() if self.asked <= 2 else 0
        return self.classes[int(fit):]


class _Meter:
    """Measures in a layer's forwards what it loses without some inputs.

    Args:
        classes: (inputs,) the class of each. gone: (inputs,) bool. alone: measure each lost class on its own, too.

    gone: inputs that are lost. lost: their classes. moments: over samples and positions, of the whole output, of what all
    lost inputs gave, (outputs,) each, and with `alone` of what each lost class gave, (classes, outputs).
    """

    def __init__(self, classes: np.ndarray, gone: np.ndarray, alone: bool) -> None:
        self.gone = np.nonzero(gone)[0]
        self.lost = np.unique(classes[gone])
        self._columns = [np.nonzero(classes == number)[0] for number in self.lost] if alone else []
        self.moments: list[_Moments] = []

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """A forward hook."""
        x, *rest = args or (kwargs["input"],)
        assert isinstance(layer.weight, Tensor)
        dim = x.dim() - 1 if isinstance(layer, nn.Linear) else x.dim() - layer.weight.dim() + 1

        def moments(values: Tensor) -> _Moments:
            return _Moments.of(values.movedim(dim, 0).flatten(1))

        found = [moments(output), moments(_part(layer, x, rest, dim, self.gone))]
        if self._columns:
            found.append(_Moments.stack([moments(_part(layer, x, rest, dim, columns)) for columns in self._columns]))
        for own, new in zip(self.moments, found):
            own.add(new)
        self.moments = self.moments or found

    def finish(self, path: str, rows: np.ndarray, batches: Batches) -> list[_Moments]:
        """The moments over all processes, of the outputs `rows`, (outputs,) bool, alone. Raises CompactionError if nothing
        was measured, or no finite values."""
        if not self.moments:
            raise CompactionError(f"fold_batches must run {path}, which did not run on them")
        for moments in self.moments:
            moments.add_up(batches.add_up)
            stay = torch.from_numpy(rows).to(moments.mean.device)
            moments.mean, moments.deviation = moments.mean[..., stay], moments.deviation[..., stay]
            if not (moments.mean.isfinite().all() and moments.deviation.isfinite().all()):
                raise CompactionError(f"fold_batches must give finite values, {path} gave others")
        return self.moments


def _part(layer: nn.Module, x: Tensor, rest: Sequence[Any], dim: int, columns: np.ndarray) -> Tensor:
    """What a layer makes of some of its inputs, without the bias; half precision is widened."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    index = torch.from_numpy(columns).to(x.device)
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach()
    if getattr(layer, "groups", 1) == 1:
        x = x.index_select(dim, index)
        weight = weight.index_select(0 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1, index)
    else:
        x = torch.zeros_like(x).index_copy(dim, index, x.index_select(dim, index))
    linear = copy.copy(layer)  # shares everything; its forward is called without hooks
    linear._parameters = {"weight": nn.Parameter(weight.to(dtype)), "bias": None}
    return linear.forward(x.to(dtype), *rest)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; of nothing 0 / 0 = 0."""
    return torch.where(part == 0, 0.0, part / whole)


@torch.no_grad()
def _meters(
    model: nn.Module, graph: UnitGraph, keep: Keep, batches: Batches, paths: Collection[str] | None = None
) -> Iterator[tuple[Reader, _Meter, list[_Moments]]]:
    """The layers that lose inputs when `keep` stays and can be given a constant instead, and what was measured there. With
    `paths` only these, class by class."""
    modules = dict(model.named_modules(remove_duplicate=False))
    readers: dict[str, Reader] = {}
    for reader in graph.readers:
        loses = reader.into is not None and not keep.atoms[graph.flow.atoms(reader.slot)].all()
        if loses and (paths is None or reader.path in paths):
            readers.setdefault(reader.path, reader)
    if missing := [path for path in readers if path not in modules]:
        raise ValueError(f"followers must be copies of the model, got a {type(model).__name__} without {missing[0]}")
    meters = {}
    for path, reader in readers.items():
        classes = graph.flow.atoms(reader.slot)
        meters[path] = _Meter(classes, ~keep.atoms[classes], paths is not None)
    _run(model, batches, [(modules[path], meter) for path, meter in meters.items()])
    for path, reader in readers.items():
        rows = keep.atoms[graph.axes[str(reader.into), 0]]
        yield reader, meters[path], meters[path].finish(path, rows, batches)


def _measure(model: nn.Module, graph: UnitGraph, keep: Keep, batches: Batches) -> dict[str, _Loss]:
    """Layer -> its loss when `keep` stays."""
    losses = {}
    for reader, meter, (output, lost) in _meters(model, graph, keep, batches):
        left, whole = lost.deviation.sum(), output.deviation.sum()
        without = left + (lost.count * lost.mean**2).sum()
        change, change_without = (float(_share(part, whole).sqrt()) for part in (left, without))
        folded = Folded(str(reader.into), meter.gone.size, change, change_without)
        losses[reader.path] = _Loss(meter.lost, reader.sign * lost.mean, folded)
    return losses


def _one_by_one(
    models: Sequence[nn.Module], graph: UnitGraph, keep: Keep, batches: Batches, paths: Collection[str]
) -> dict[str, _Alone]:
    """What each class of inputs that the layers `paths` lose changes alone, in that model where it is most."""
    squares: dict[str, np.ndarray] = {}
    numbers: dict[str, np.ndarray] = {}
    for model in models:
        for reader, meter, (output, _, parts) in _meters(model, graph, keep, batches, paths):
            found = _share(parts.deviation.sum(-1), output.deviation.sum()).cpu().numpy()
            squares[reader.path] = np.maximum(squares.get(reader.path, found), found)
            numbers[reader.path] = meter.lost
    return {path: _Alone(numbers[path], squares[path]) for path in squares}


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
    with _watched(hooks), evaluation_mode(model), without_compilation():
        for arguments in batches.arguments if hooks else ():
            model(*arguments)


@contextmanager
def _watched(hooks: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _reasons(
    graph: UnitGraph, nonzero: Mapping[str, Tensor], keep: Keep, stay: Mapping[str, np.ndarray], max_change: float
) -> dict[str, str]:
    """Activation -> why dead units that are not zero stay, where that is because of what reads them."""
    reasons = {}
    for name, mask in nonzero.items():
        activation = next(a for a in graph.activations if a.name == name)
        left = activation.atoms[np.nonzero(mask.numpy() & keep.atoms[activation.atoms])[0]]
        if not left.size or graph.is_pinned[left].any():
            continue
        why = "more than layers with a bias reads them"
        for reader in graph.readers:
            read = np.isin(left, graph.flow.atoms(reader.slot))
            if reader.into is None and read.any():
                why = reader.reason
                break
            if np.isin(left, stay.get(reader.path, ())).any():
                why = f"without them {reader.path} would change by more than {max_change:g}"
                break
        reasons[name] = f"{left.size} dead units: they are not zero, and {why}"
    return reasons
