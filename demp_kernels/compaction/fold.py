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
from .measurement import Loss, inputs_of, losses
from .plan import CompactionError, Plan, Shift
from .report import Folded
from .stand_ins import StandIns

__all__ = ["Folding"]

EXACT = 2e-6
"""A change of a layer's output, as a share of its standard deviation or of what it loses, whichever is more, that is no
more than rounding in single precision: up to 1.1e-6 was seen, in convolutions of 7x7 and over 100 inputs."""


class Folding:
    """What stays of a model whose dead units need not be zero, and what the layers that read them are given instead.

    Args:
        models: the model and its followers, each of which is measured on its own: their units have other constants.
        dead: activation -> (units,) bool.
        max_change: a layer whose output would change by more than this, as a share of its standard deviation, keeps some
            of the inputs.

    keep: what stays. folded: layer -> what was done, of the first model. kept: activation -> why dead units of it stay.

    Layers are measured until nothing more has to stay:

    - One that loses constants for which a bias is not exact gets stand-ins. If these are not exact either, the constants
      stay: it would need a bias for every position.
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
        self._stand_ins: dict[str, StandIns] = {}
        self._tried: set[str] = set()
        self._plain: dict[str, float] = {}
        self._alone: dict[str, _Alone] = {}
        self._stay: dict[tuple[str, str], np.ndarray] = {}
        nonzero = _nonzero(models, graph, dead, batches)
        # what goes at most: with other widths other units may go in their place
        most = graph.keep(dead, nonzero=nonzero)
        self._inputs = [inputs_of(model, graph, most, batches) for model in models]
        self._constant = {path: np.all([found[path].constant for found in self._inputs], 0) for path in self._inputs[0]}
        again = True
        while again:
            self.keep = graph.keep(
                dead, round_to=round_to, min_units=min_units, nonzero=nonzero, stay=_by_layer(self._stay)
            )
            self._found = [self._measure(number) for number in range(len(models))]
            again = self._makes_constants_exact() or self._keeps_the_worst()
        self.folded = {
            path: Folded(str(read.reader.into), int((~read.inputs).sum()), read.change, self._plain[path], read.stand_ins)
            for path, read in self._found[0].items() if self._plain[path] > 0
        }
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
        for reader, loss in losses(
            model, number, self._graph, self.keep, self._batches, constant=self._constant, stand_ins=stand_ins
        ):
            inputs = self.keep.atoms[self._graph.flow.atoms(reader.slot)]
            outputs = self.keep.atoms[self._graph.axes[str(reader.into), 0]]
            standing = 0 if reader.path not in stand_ins else int((stand_ins[reader.path].at >= 0).sum())
            found[reader.path] = _Read(reader, loss, inputs, outputs, standing)
            if number == 0 and not standing:
                self._plain[reader.path] = found[reader.path].change_without
        return found

    # --- each of these says whether another round is needed ---

    def _makes_constants_exact(self) -> bool:
        stay, again = _by_layer(self._stay), False
        for path, read in self._found[0].items():
            exact = min(max(EXACT, read.loss.precision) * max(1.0, self._plain[path]), self._max_change)
            lost = read.loss.classes[read.loss.constant]
            is_exact = all(found[path].change_of_constants <= exact for found in self._found)
            if is_exact or np.isin(lost, stay.get(path, ())).all():
                continue
            again = True
            if path not in self._tried and self._gives_stand_ins(path, lost):
                continue
            if self._stand_ins.pop(path, None) is not None:
                del self._stay[path, STANDS_IN]
            self._keep_inputs(path, IS_A_MAP, lost)
        return again

    def _gives_stand_ins(self, path: str, lost: np.ndarray) -> bool:
        """For the lost classes of constants, if the layer can have any."""
        self._tried.add(path)
        reader = self._found[0][path].reader
        if reader.weight is None:
            return False
        classes = self._graph.flow.atoms(reader.slot)
        layer = self._models[0].get_submodule(path)
        means = [found[path].mean for found in self._inputs]
        chosen = StandIns.choose(layer, means, self._constant[path], np.isin(classes, lost))
        if chosen is None:
            return False
        self._stand_ins[path] = chosen
        self._stay[path, STANDS_IN] = np.unique(classes[chosen.at[chosen.at >= 0]])
        return True

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

    def _one_by_one(self, paths: Sequence[str]) -> dict[str, _Alone]:
        """What each class of inputs that some layers lose changes alone, in that model where it is most."""
        squares: dict[str, np.ndarray] = {}
        numbers: dict[str, np.ndarray] = {}
        for number, model in enumerate(self._models):
            for reader, loss in losses(
                model, number, self._graph, self.keep, self._batches, constant=self._constant, stand_ins=self._stand_ins,
                alone=paths,
            ):
                assert loss.parts is not None  # asked for
                found = _share(loss.parts.deviation.sum(-1), loss.output.deviation.sum()).cpu().numpy()
                squares[reader.path] = np.maximum(squares.get(reader.path, found), found)
                numbers[reader.path] = loss.classes
        return {path: _Alone(numbers[path], squares[path]) for path in squares}


STANDS_IN = "{path} needs {count} in place of others: no bias is exact at every position"
IS_A_MAP = "{path} would need a bias of its own at every position otherwise"


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
    def change_of_constants(self) -> float:
        """The change that the constant ones among the lost inputs make."""
        return self._share_of(self.loss.lost_constants.deviation.sum())

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
            if output.shape[dim] != masks[name].numel():
                return  # another call of the module
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
            watch(model, batches.arguments, hooks)
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
        counts = {key: int(np.isin(left, classes).sum()) for key, classes in stay.items()}
        most_first = sorted(((count, key) for key, count in counts.items() if count), key=lambda found: -found[0])
        found = [reason.format(path=path, count=count) for count, (path, reason) in most_first]
        rigid = [r.reason for r in graph.readers if r.into is None and np.isin(left, graph.flow.atoms(r.slot)).any()]
        if not (found or rigid) and name in keep.widened:
            continue
        why = [*rigid, *found, "more than layers with a bias reads them"][0]
        reasons[name] = f"{left.size} dead {'unit' if left.size == 1 else 'units'}: not zero, and {why}"
    return reasons
