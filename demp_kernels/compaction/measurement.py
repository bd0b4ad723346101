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

__all__ = ["Inputs", "Loss", "Moments", "inputs_of", "losses"]


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
class Inputs:
    """All inputs of a layer. mean: (inputs,). constant: (inputs,) bool, the same in every sample, be it another value at
    every position. Rounding is none; of one sample alone only what is the same everywhere is known to be constant."""

    mean: Tensor
    constant: np.ndarray


@dataclass
class Loss:
    """What a layer loses, over all samples and positions.

    classes: the lost ones; constant: (classes,) bool. output, lost, lost_constants: moments of its whole output and of what
    all lost inputs and the constant ones gave, of the outputs that stay; parts: of what each lost class gave, (classes,
    outputs), if asked. With stand-ins, "gave" is less what the stand-in gives instead. precision: of the layer's products.
    """

    classes: np.ndarray
    constant: np.ndarray
    output: Moments
    lost: Moments
    lost_constants: Moments
    parts: Moments | None
    precision: float


class _InputMeter:
    """Looks at all inputs of a layer in its forwards. Samples lie along the first dimension; where that is the units', a
    forward is one sample."""

    def __init__(self) -> None:
        self._moments: Moments | None = None
        self._first: dict[torch.Size, Tensor] = {}

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """A forward hook."""
        x = args[0] if args else kwargs["input"]
        dim = unit_dim(layer, x)
        new = _moments(x, dim)
        samples = x if dim > 0 else x.unsqueeze(0)
        compared = len(samples) if samples.shape[1:] in self._first else len(samples) - 1
        first = self._first.setdefault(samples.shape[1:], samples[:1].clone())
        apart = (samples - first).double().pow(2).movedim(max(dim, 1), 0).flatten(1).sum(1)
        counted = torch.full((), compared, dtype=torch.float64, device=x.device)
        if self._moments is None:
            self._moments, self._apart, self._compared, self._eps = new, apart, counted, torch.finfo(x.dtype).eps
        else:
            self._moments.add(new)
            self._apart, self._compared = self._apart + apart, self._compared + counted

    def finish(self, path: str, batches: Batches) -> Inputs:
        """Over all processes. Raises CompactionError if the layer did not run."""
        if self._moments is None:
            raise CompactionError(f"fold_batches must run {path}, which did not run on them")
        moments = self._moments
        moments.add_up(batches.add_up)
        batches.add_up([self._apart, self._compared])
        size = moments.deviation + moments.count * moments.mean**2
        differs = self._apart if self._compared > 0 else moments.deviation
        known = bool(self._compared > 0) or bool(moments.count > 1)
        constant = (differs <= (2 * self._eps) ** 2 * size) & known
        return Inputs(moments.mean, constant.cpu().numpy())


class _Meter:
    """Measures in a layer's forwards what it loses without some inputs.

    Args:
        path: of the layer. classes: (inputs,) the class of each. gone, constant: (inputs,) bool. alone: measure each lost
            class on its own, too. stand_ins, number: the layer's stand-ins, if any, and whose of the models it is.
    """

    def __init__(
        self, path: str, classes: np.ndarray, gone: np.ndarray, constant: np.ndarray, alone: bool,
        stand_ins: StandIns | None, number: int,
    ) -> None:
        self._path, self._stand_ins, self._number = path, stand_ins, number
        self._lost = np.unique(classes[gone])
        self._constant = ~np.isin(self._lost, classes[gone & ~constant])
        self._gone, self._gone_constants = np.nonzero(gone)[0], np.nonzero(np.isin(classes, self._lost[self._constant]))[0]
        self._columns = [np.nonzero(classes == one)[0] for one in self._lost] if alone else []
        self._moments: list[Moments] = []
        self._precision = 0.0

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """A forward hook."""
        x, *rest = args or (kwargs["input"],)
        dim = unit_dim(layer, x)

        def part(columns: np.ndarray) -> Moments:
            return _moments(self._part(layer, x, rest, dim, columns), dim)

        lost = part(self._gone)
        if len(self._gone_constants) == len(self._gone):
            constants = copy.deepcopy(lost)
        elif len(self._gone_constants):
            constants = part(self._gone_constants)
        else:
            constants = Moments(torch.zeros_like(lost.mean), torch.zeros_like(lost.deviation), lost.count.clone())
        found = [_moments(output, dim), lost, constants]
        if self._columns:
            found.append(Moments.stack([part(columns) for columns in self._columns]))
        for own, new in zip(self._moments, found):
            own.add(new)
        self._moments = self._moments or found
        self._precision = max(self._precision, _precision(x))

    def finish(self, rows: np.ndarray, batches: Batches) -> Loss:
        """Over all processes, of the outputs `rows`, (outputs,) bool, alone. Raises CompactionError if nothing was
        measured, or no finite values."""
        if not self._moments:
            raise CompactionError(f"fold_batches must run {self._path}, which did not run on them")
        for moments in self._moments:
            moments.add_up(batches.add_up)
        output, lost, constants, *parts = (moments.rows(rows) for moments in self._moments)
        if not all(moments.finite() for moments in (output, lost, *parts)):
            raise CompactionError(f"fold_batches must give finite values, {self._path} gave others")
        return Loss(self._lost, self._constant, output, lost, constants, parts[0] if parts else None, self._precision)

    def _part(self, layer: nn.Module, x: Tensor, rest: Sequence[Any], dim: int, columns: np.ndarray) -> Tensor:
        """What a layer makes of some of its inputs, without the bias; half precision is widened."""
        stand_ins = self._stand_ins or StandIns.none(layer)
        read, weight = stand_ins.weight_of(layer, columns, self._number)
        if read is not None:
            x = x.index_select(dim, torch.from_numpy(read).to(x.device))
        linear = copy.copy(layer)  # shares everything; its forward is called without hooks
        linear._parameters = {"weight": nn.Parameter(weight), "bias": None}
        with torch.autocast(x.device.type, enabled=False):
            return linear.forward(x.to(weight.dtype), *rest)


def _precision(x: Tensor) -> float:
    """Of products with x: what is the same may come out apart by so much of its size."""
    if x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        return 2.0**-10
    return torch.finfo(x.dtype).eps


def _moments(values: Tensor, dim: int) -> Moments:
    return Moments.of(values.movedim(dim, 0).flatten(1))


@torch.no_grad()
def inputs_of(model: nn.Module, graph: UnitGraph, keep: Keep, batches: Batches) -> dict[str, Inputs]:
    """Layer -> its inputs, for the layers that can be given a constant in place of some."""
    modules = _modules(model, graph)
    meters = {reader.path: _InputMeter() for reader in graph.readers if reader.into is not None and _loses(graph, reader, keep)}
    watch(model, batches.arguments, [(modules[path], meter) for path, meter in meters.items()])
    return {path: meter.finish(path, batches) for path, meter in meters.items()}


@torch.no_grad()
def losses(
    model: nn.Module, number: int, graph: UnitGraph, keep: Keep, batches: Batches, *, constant: Mapping[str, np.ndarray],
    stand_ins: Mapping[str, StandIns], alone: Sequence[str] | None = None,
) -> Iterator[tuple[Reader, Loss]]:
    """The layers of the numbered model that lose inputs when `keep` stays and can be given a constant instead, and what
    they lose. constant: layer -> (inputs,) bool. With `alone` only these, class by class, too."""
    modules = _modules(model, graph)
    readers: dict[str, Reader] = {}
    for reader in graph.readers:
        if reader.into is not None and _loses(graph, reader, keep) and (alone is None or reader.path in alone):
            readers.setdefault(reader.path, reader)
    meters = {}
    for path, reader in readers.items():
        classes = graph.flow.atoms(reader.slot)
        same = constant.get(path, np.zeros(classes.shape, bool))
        meters[path] = _Meter(path, classes, ~keep.atoms[classes], same, alone is not None, stand_ins.get(path), number)
    watch(model, batches.arguments, [(modules[path], meter) for path, meter in meters.items()])
    for path, reader in readers.items():
        yield reader, meters[path].finish(keep.atoms[graph.axes[str(reader.into), 0]], batches)


def _loses(graph: UnitGraph, reader: Reader, keep: Keep) -> bool:
    return not keep.atoms[graph.flow.atoms(reader.slot)].all()


def _modules(model: nn.Module, graph: UnitGraph) -> dict[str, nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if missing := [reader.path for reader in graph.readers if reader.into is not None and reader.path not in modules]:
        raise ValueError(f"followers must be copies of the model, got a {type(model).__name__} without {missing[0]}")
    return modules
