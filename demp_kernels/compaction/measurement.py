"""What layers lose without some of their inputs, measured in their own forwards."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph import UnitGraph
from ..graph.units import Keep
from ..graph.values import Reader
from .batches import Batches, watch
from .plan import CompactionError
from .stand_ins import StandIns, unit_dim

__all__ = ["Loss", "Moments", "input_moments", "losses"]


@dataclass
class Moments:
    """Mean and summed squared deviation of each row, (..., rows), over columns that come in pieces (Chan et al. 1979)."""

    mean: Tensor
    deviation: Tensor
    count: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        variance, mean = torch.var_mean(rows.double(), 1, correction=0)
        count = torch.full((), rows.shape[1], dtype=torch.float64, device=rows.device)
        return cls(mean, variance * count, count)

    @classmethod
    def stack(cls, several: Sequence[Moments]) -> Moments:
        """Of the same columns, as one more dimension in front."""
        return cls(torch.stack([m.mean for m in several]), torch.stack([m.deviation for m in several]), several[0].count)

    def add(self, other: Moments) -> None:
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

    def rows(self, stay: np.ndarray) -> Moments:
        """Of some of the rows, (rows,) bool."""
        index = torch.from_numpy(stay).to(self.mean.device)
        return Moments(self.mean[..., index], self.deviation[..., index], self.count)

    def finite(self) -> bool:
        return bool(self.mean.isfinite().all() and self.deviation.isfinite().all())


@dataclass
class Loss:
    """What a layer loses, over all samples and positions.

    classes: the lost ones. output, lost: moments of its whole output and of what all
    lost inputs gave together, of the outputs that stay; parts: of what each lost class gave, (classes, outputs), if asked.
    With stand-ins, "gave" is less what the stand-in gives instead. scatter: (outputs,) squared distance of what the lost
    inputs gave a sample from what they gave the first one, summed: zero if they give every sample the same map.
    """

    classes: np.ndarray
    output: Moments
    lost: Moments
    parts: Moments | None
    scatter: Tensor


class _Meter:
    """Measures in a layer's forwards what it loses without some inputs.

    Args:
        path: of the layer. classes: (inputs,) the class of each. gone: (inputs,) bool. alone: measure each lost class on
            its own, too. stand_ins, number: the layer's stand-ins, if any, and whose of the models it is.
    """

    def __init__(
        self, path: str, classes: np.ndarray, gone: np.ndarray, alone: bool, stand_ins: StandIns | None, number: int
    ) -> None:
        self._path, self._gone, self._stand_ins, self._number = path, np.nonzero(gone)[0], stand_ins, number
        self._lost = np.unique(classes[gone])
        self._columns = [np.nonzero(classes == one)[0] for one in self._lost] if alone else []
        self._moments: list[Moments] = []
        self._first: Tensor | None = None
        self._scatter: Tensor | None = None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """A forward hook."""
        x, *rest = args or (kwargs["input"],)
        dim = unit_dim(layer, x)

        def part(columns: np.ndarray) -> Tensor:
            return self._part(layer, x, rest, dim, columns)

        lost = part(self._gone)
        found = [_moments(output, dim), _moments(lost, dim)]
        if self._columns:
            found.append(Moments.stack([_moments(part(columns), dim) for columns in self._columns]))
        for own, new in zip(self._moments, found):
            own.add(new)
        self._moments = self._moments or found
        # without a dimension of samples in front of the units' a forward is one sample
        samples = lost if dim > 0 else lost.unsqueeze(0)
        if self._first is None:
            self._first = samples[:1].clone()
        if samples.shape[1:] == self._first.shape[1:]:
            apart = (samples - self._first).double().pow(2).movedim(max(dim, 1), 0).flatten(1).sum(1)
        else:
            apart = torch.full((lost.shape[dim],), torch.inf, dtype=torch.float64, device=lost.device)
        self._scatter = apart if self._scatter is None else self._scatter + apart

    def finish(self, rows: np.ndarray, batches: Batches) -> Loss:
        """Over all processes, of the outputs `rows`, (outputs,) bool, alone. Raises CompactionError if nothing was
        measured, or no finite values."""
        if self._scatter is None:
            raise CompactionError(f"fold_batches must run {self._path}, which did not run on them")
        for moments in self._moments:
            moments.add_up(batches.add_up)
        batches.add_up([self._scatter])
        output, lost, *parts = (moments.rows(rows) for moments in self._moments)
        if not all(moments.finite() for moments in (output, lost, *parts)):
            raise CompactionError(f"fold_batches must give finite values, {self._path} gave others")
        scatter = self._scatter[torch.from_numpy(rows).to(self._scatter.device)]
        return Loss(self._lost, output, lost, parts[0] if parts else None, scatter)

    def _part(self, layer: nn.Module, x: Tensor, rest: Sequence[Any], dim: int, columns: np.ndarray) -> Tensor:
        """What a layer makes of some of its inputs, without the bias; half precision is widened."""
        stand_ins = self._stand_ins or StandIns.none(layer)
        read, weight = stand_ins.weight_of(layer, columns, self._number)
        if read is not None:
            x = x.index_select(dim, torch.from_numpy(read).to(x.device))
        linear = copy.copy(layer)  # shares everything; its forward is called without hooks
        linear._parameters = {"weight": nn.Parameter(weight), "bias": None}
        return linear.forward(x.to(weight.dtype), *rest)


def _moments(values: Tensor, dim: int) -> Moments:
    return Moments.of(values.movedim(dim, 0).flatten(1))


@torch.no_grad()
def losses(
    model: nn.Module, number: int, graph: UnitGraph, keep: Keep, batches: Batches, *, stand_ins: Mapping[str, StandIns],
    alone: Sequence[str] | None = None,
) -> Iterator[tuple[Reader, Loss]]:
    """The layers of the numbered model that lose inputs when `keep` stays and can be given a constant instead, and what
    they lose. With `alone` only these, class by class, too."""
    modules = dict(model.named_modules(remove_duplicate=False))
    readers: dict[str, Reader] = {}
    for reader in graph.readers:
        loses = reader.into is not None and not keep.atoms[graph.flow.atoms(reader.slot)].all()
        if loses and (alone is None or reader.path in alone):
            readers.setdefault(reader.path, reader)
    if missing := [path for path in readers if path not in modules]:
        raise ValueError(f"followers must be copies of the model, got a {type(model).__name__} without {missing[0]}")
    meters = {}
    for path, reader in readers.items():
        classes = graph.flow.atoms(reader.slot)
        meters[path] = _Meter(path, classes, ~keep.atoms[classes], alone is not None, stand_ins.get(path), number)
    watch(model, batches, [(modules[path], meter) for path, meter in meters.items()])
    for path, reader in readers.items():
        yield reader, meters[path].finish(keep.atoms[graph.axes[str(reader.into), 0]], batches)


@torch.no_grad()
def input_moments(model: nn.Module, paths: Sequence[str], batches: Batches) -> dict[str, Moments]:
    """Of all inputs of some layers, (inputs,) each."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Moments] = {}

    def look(path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            new = _moments(x, unit_dim(layer, x))
            if path in found:
                found[path].add(new)
            else:
                found[path] = new

        return hook

    watch(model, batches, [(modules[path], look(path)) for path in paths])
    for path in paths:
        found[path].add_up(batches.add_up)
    return found
