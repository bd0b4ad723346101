"""What an analysis is made of: values with units, parameters, and the widths that must be kept."""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

__all__ = ["Activation", "Balance", "Floor", "Parameter", "ParameterAxis", "Reader", "Selection", "Value", "along"]


@dataclass
class Value:
    """A tensor of the graph.

    atoms: broadcastable to `shape`; a dimension of size 1 is uniform, another one carries units.
    slot: its entries in the flow, one per element of `atoms`.
    storage: a token shared by the views of one memory.
    """

    shape: tuple[int, ...]
    atoms: np.ndarray
    slot: int
    storage: object = field(default_factory=object)

    @property
    def unit_dims(self) -> list[int]:
        return [d for d, size in enumerate(self.atoms.shape) if size > 1]

    def axis(self, dim: int) -> np.ndarray:
        """Atoms along one dimension, (shape[dim],). All others must be uniform."""
        return np.broadcast_to(self.atoms.reshape(-1), (self.shape[dim],))


@dataclass
class Parameter:
    """A parameter or buffer of the model, before it is used as a value. `dims[d]` is the parameter's own dimension
    that dimension d of this (possibly transposed) view of it shows."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]


@dataclass
class ParameterAxis:
    """Atoms of the entries along one dimension of a parameter or buffer."""

    name: str
    dim: int
    atoms: np.ndarray


@dataclass
class Activation:
    """One call of an activation: `name` is the module's path, `dim` the dimension of its units, `slots` its output in each
    captured graph."""

    name: str
    atoms: np.ndarray
    dim: int
    slots: list[int] = field(default_factory=list)


@dataclass
class Reader:
    """A layer that contracts the units of `slot`, and what can make up for a constant that it no longer reads.

    path: of the layer's module. into: its bias (sign 1), or the running mean of the BatchNorm behind it (sign -1); None:
    nothing can, because of `reason`. weight: of the layer, if nothing else uses it and it is no computed tensor.
    """

    slot: int
    path: str
    into: str | None
    sign: int = 1
    reason: str = ""
    weight: str | None = None


@dataclass
class Selection:
    """A SelectiveAdd: `skip` is the slot of its second operand, `out` that of the selected one. `device`: of the operands, at
    the analysis."""

    name: str
    skip: int
    out: int
    device: torch.device

    def device_in(self, model: nn.Module) -> torch.device:
        """Where the operands are now: a model on one device may have moved since."""
        # mostly the first parameter tells; a walk over all of convnext's modules for each sum took a third of its plan
        if any(parameter.device == self.device for parameter in model.parameters()):
            return self.device
        return next((parameter.device for parameter in model.parameters()), self.device)


@dataclass
class Floor:
    """At least `count` of `atoms` must stay (all, if there are fewer)."""

    atoms: np.ndarray
    count: int
    reason: str


@dataclass
class Balance:
    """A grouped convolution: its groups keep equal numbers of inputs, and of outputs. `rows`, `columns`: (groups, units a
    group), what the weight has along dimension 0 and along dimension 1: outputs and inputs, of a transposed convolution
    inputs and outputs. A group of which nothing stays goes as a whole."""

    weight: str
    rows: np.ndarray
    columns: np.ndarray


def along(atoms: np.ndarray, dim: int, rank: int) -> np.ndarray:
    """A vector as an array of the given rank that varies along `dim` only."""
    shape = [1] * rank
    shape[dim] = atoms.size
    return atoms.reshape(shape)
