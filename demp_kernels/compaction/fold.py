"""Folding: what removed units still gave, measured where it is read and given by something else from then on.

A layer y = W x + b that loses the inputs D loses l = W[:, D] x[D] of its output. If these inputs are constant, so is l, and
b + l is exact. If they are constant but l is not the same everywhere (zero padding), one of them stands in for the others
(`StandIns`), which is exact, too; where that does not help, such inputs stay. If they are nearly constant (tails of GELU,
SiLU, leaky ReLU), b + mean(l) is the best that a bias can do, and the root mean square of l - mean(l), beside the deviation
of y, says what is left over. l is measured on batches at the layer itself, so whatever lies between the unit and the layer
(pooling, flattening, dropout, gates, padding) is in it.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph import UnitGraph
from ..graph.units import Keep
from ..graph.values import Reader
from .batches import Batches, watch
from .measurement import Loss, input_moments, losses
from .plan import CompactionError, Plan, Shift
from .report import Folded
from .stand_ins import StandIns

__all__ = ["Folding"]

EXACT = 1e-6
"""A change of a layer's output, as a share of its standard deviation, that is no more than rounding in single precision."""


class Folding:
    """What stays of a model whose dead units need not be zero, and what the layers that read them are given instead.

    Args:
        models: the model and its followers, each of which is measured on its own: their units have other constants.
        dead: activation -> (units,) bool.
        max_change: a layer whose output would change by more than this, as a share of its standard deviation, keeps some
            of the inputs.

    keep: what stays. folded: layer -> what was done, of the first model. kept: activation -> why dead units of it stay.

    Layers are measured until nothing more has to stay:

    - One whose loss differs more between positions than between samples gets stand-ins, if they halve the change.
    - One whose loss still is a map, other than rounding but the same for every sample, keeps these inputs: it would be
      exact with a bias for every position only.
    - One that would change too much loses those inputs first that change it least, each measured alone: as many as the
      sum of their squared changes allows. They may add up to more, which is measured; then as many as the sum of the
      changes itself allows, which is a bound for every subset (triangle inequality).

    Raises CompactionError if a layer's output is not finite on the batches. Nothing is changed.
    """

    def __init__(
        self, models: Sequence[nn.Module], graph: UnitGraph, dead: Mapping[str, Tensor], batches: Batches, *,
        round_to: int, min_units: int, max_change: float,
    ) -> None:
        self._models, self._graph, self._batches, self._max_change = models, graph, batches, max_change
        self._exact = min(EXACT, max_change)
        self._stand_ins: dict[str, StandIns] = {}
        self._before: dict[str, _Read] = {}
        self._settled: set[str] = set()
        self._alone: dict[str, _Alone] = {}
        self._stay: dict[tuple[str, str], np.ndarray] = {}
        nonzero = _nonzero(models, graph, dead, batches)
        again = True
        while again:
            self.keep = graph.keep(
                dead, round_to=round_to, min_units=min_units, nonzero=nonzero, stay=_by_layer(self._stay)
            )
            self._found = [self._measure(number) for number in range(len(models))]
            again = self._judges_stand_ins() or self._keeps_maps() or self._keeps_the_worst()
        self.folded = {}
        for path, read in self._found[0].items():
            without = (self._before[path] if path in self._stand_ins else read).change_without
            if without > 0:
                into, inputs = str(read.reader.into), int((~read.inputs).sum())
                self.folded[path] = Folded(into, inputs, read.change, without, read.stand_ins)
        self.kept = _reasons(graph, nonzero, self.keep, self._stay)

    def add_to(self, plan: Plan, number: int, modules: Mapping[str, nn.Module]) -> None:
        """The shifts of the numbered model, whose modules these are, become part of a plan."""
        for path, read in self._found[number].items():
            if (by := read.reader.sign * read.loss.lost.mean).any():
                owner, _, leaf = str(read.reader.into).rpartition(".")
                plan.shifts.append(Shift(getattr(modules[owner], leaf), by))
            if path in self._stand_ins:
                plan.shifts += self._stand_ins[path].shifts(modules[path], read.inputs, read.outputs, number)

    def _measure(self, number: int) -> dict[str, _Read]:
        """Layer -> its loss in the numbered model when `keep` stays."""
        model, stand_ins = self._models[number], self._stand_ins
        found = {}
        for reader, loss in losses(model, number, self._graph, self.keep, self._batches, stand_ins=stand_ins):
            inputs = self.keep.atoms[self._graph.flow.atoms(reader.slot)]
            outputs = self.keep.atoms[self._graph.axes[str(reader.into), 0]]
            standing = 0 if reader.path not in stand_ins else int((stand_ins[reader.path].at >= 0).sum())
            found[reader.path] = _Read(reader, loss, inputs, outputs, standing)
        return found

    # --- each of these says whether another round is needed ---

    def _judges_stand_ins(self) -> bool:
        """Takes away those that did not help, and gives others to the layers that may need them."""
        changes = self._most(lambda read: read.change)
        useless = [
            path for path in self._stand_ins
            if path not in self._settled and changes.get(path, 0.0) > self._before[path].change / 2
        ]
        self._settled |= set(self._stand_ins)
        for path in useless:
            del self._stand_ins[path], self._stay[path, STANDS_IN]
        maps = self._most(lambda read: read.change if read.loss.scatter.sum() < read.loss.lost.deviation.sum() else 0.0)
        new = [
            path for path, change in maps.items()
            if path not in self._before and change > self._exact and self._found[0][path].reader.weight is not None
        ]
        inputs = [input_moments(model, new, self._batches) for model in self._models] if new else []
        for path in new:
            read = self._before[path] = max((found[path] for found in self._found), key=lambda read: read.change)
            spread = (inputs[0][path].deviation / inputs[0][path].count).sqrt()
            lost = np.nonzero(~read.inputs)[0]
            layer = self._models[0].get_submodule(path)
            chosen = StandIns.choose(layer, [found[path].mean for found in inputs], spread, lost)
            if chosen is not None:
                self._stand_ins[path] = chosen
                classes = self._graph.flow.atoms(read.reader.slot)
                self._stay[path, STANDS_IN] = np.unique(classes[chosen.at[chosen.at >= 0]])
        return bool(useless or any(path in self._stand_ins for path in new))

    def _keeps_maps(self) -> bool:
        changes, scatters = self._most(lambda read: read.change), self._most(lambda read: read.scatter)
        stay = _by_layer(self._stay)
        maps = [
            path for path, change in changes.items()
            if change > self._exact >= scatters[path]
            and not np.isin(self._found[0][path].loss.classes, stay.get(path, ())).all()
        ]
        for path in maps:
            self._keep_inputs(path, IS_A_MAP, self._found[0][path].loss.classes)
        return bool(maps)

    def _keeps_the_worst(self) -> bool:
        reason = f"without them {{path}} would change by more than {self._max_change:g}"
        over = {
            path: read.loss.classes for found in self._found for path, read in found.items() if read.change > self._max_change
        }
        for path, lost in over.items():
            if (path, reason) in self._stay and np.isin(lost, self._stay[path, reason]).all():
                raise CompactionError(f"{path} would change by more than {self._max_change:g}: inputs that must be zero are not")
        # others may be lost than before: widths are kept by other units
        new = [
            path for path, lost in over.items()
            if path not in self._alone or not np.isin(lost, self._alone[path].classes).all()
        ]
        self._alone |= self._one_by_one(new) if new else {}
        for path in over:
            self._keep_inputs(path, reason, self._alone[path].too_much(self._max_change))
        return bool(over)

    def _keep_inputs(self, path: str, reason: str, classes: np.ndarray) -> None:
        self._stay[path, reason] = np.union1d(self._stay.get((path, reason), np.empty(0, np.int64)), classes)

    def _most(self, of: Callable[[_Read], float]) -> dict[str, float]:
        """Layer -> something of it, in that model where it is most."""
        return {path: max(of(found[path]) for found in self._found) for path in self._found[0]}

    def _one_by_one(self, paths: Sequence[str]) -> dict[str, _Alone]:
        """What each class of inputs that some layers lose changes alone, in that model where it is most."""
        squares: dict[str, np.ndarray] = {}
        numbers: dict[str, np.ndarray] = {}
        for number, model in enumerate(self._models):
            for reader, loss in losses(
                model, number, self._graph, self.keep, self._batches, stand_ins=self._stand_ins, alone=paths
            ):
                assert loss.parts is not None  # asked for
                found = _share(loss.parts.deviation.sum(-1), loss.output.deviation.sum()).cpu().numpy()
                squares[reader.path] = np.maximum(squares.get(reader.path, found), found)
                numbers[reader.path] = loss.classes
        return {path: _Alone(numbers[path], squares[path]) for path in squares}


STANDS_IN = "{path} reads them in place of those removed"
IS_A_MAP = "without them {path} would need a bias of its own at every position"


@dataclass
class _Read:
    """A layer's loss. inputs, outputs: (size,) bool, those that stay. stand_ins: how many of the inputs are such."""

    reader: Reader
    loss: Loss
    inputs: np.ndarray
    outputs: np.ndarray
    stand_ins: int

    @property
    def change(self) -> float:
        """Of the output, as a share of its standard deviation, beside a bias."""
        return self._share_of(self.loss.lost.deviation.sum())

    @property
    def change_without(self) -> float:
        """The same without a bias."""
        lost = self.loss.lost
        return self._share_of(lost.deviation.sum() + (lost.count * lost.mean**2).sum())

    @property
    def scatter(self) -> float:
        """How far apart samples are in what the layer loses: 0 for a constant or a map."""
        return self._share_of(self.loss.scatter.sum())

    def _share_of(self, part: Tensor) -> float:
        return float(_share(part, self.loss.output.deviation.sum()).sqrt())


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


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; of nothing 0 / 0 = 0."""
    return torch.where(part == 0, 0.0, part / whole)


@torch.no_grad()
def _nonzero(
    models: Sequence[nn.Module], graph: UnitGraph, dead: Mapping[str, Tensor], batches: Batches
) -> dict[str, Tensor]:
    """Those of the dead units that some model gives a value other than zero on the batches, or that cannot be looked at:
    the outputs of functional activations."""
    masks = {graph.activations[i].name: torch.from_numpy(mask) for i, mask in graph.masks(dead).items()}
    counts: dict[str, Tensor] = {}

    def count(name: str, dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            others = [d for d in range(output.dim()) if d != dim]
            found = (output != 0).sum(others).double()
            counts[name] = counts[name] + found if name in counts else found

        return hook

    for model in models:
        modules = dict(model.named_modules(remove_duplicate=False))
        hooks = [
            (modules[a.module], count(a.name, a.dim)) for a in graph.activations if a.name in masks and a.module in modules
        ]
        if any(mask.any() for mask in masks.values()):
            watch(model, batches, hooks)
    batches.add_up(list(counts.values()))
    return {
        name: mask & (counts[name].cpu() > 0) if name in counts and counts[name].shape == mask.shape else mask
        for name, mask in masks.items()
    }


def _by_layer(stay: Mapping[tuple[str, str], np.ndarray]) -> dict[str, np.ndarray]:
    """Layer -> classes that it keeps, whatever the reason."""
    found: dict[str, np.ndarray] = {}
    for (path, _), classes in stay.items():
        found[path] = np.union1d(found.get(path, classes), classes)
    return found


def _reasons(
    graph: UnitGraph, nonzero: Mapping[str, Tensor], keep: Keep, stay: Mapping[tuple[str, str], np.ndarray]
) -> dict[str, str]:
    """Activation -> why dead units that are not zero stay, where that is because of what reads them."""
    reasons = {}
    for name, mask in nonzero.items():
        activation = next(a for a in graph.activations if a.name == name)
        left = activation.atoms[np.nonzero(mask.numpy() & keep.atoms[activation.atoms])[0]]
        if not left.size or graph.is_pinned[left].any():
            continue
        counts = {reason.format(path=path): np.isin(left, classes).sum() for (path, reason), classes in stay.items()}
        found = sorted((reason for reason, count in counts.items() if count), key=lambda reason: -counts[reason])
        rigid = [r.reason for r in graph.readers if r.into is None and np.isin(left, graph.flow.atoms(r.slot)).any()]
        if not (found or rigid) and name in keep.widened:
            continue
        why = [*rigid, *found, "more than layers with a bias reads them"][0]
        reasons[name] = f"{left.size} dead units: they are not zero, and {why}"
    return reasons
