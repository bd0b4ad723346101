"""Which activation decides about the rows of a parameter."""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .units import UnitGraph

__all__ = ["find_gates"]

# Scenarios are run together as long as their entries fit in this many bytes.
CHUNK = 1 << 25


def find_gates(graph: UnitGraph) -> dict[str, str]:
    """Parameter name -> the first activation whose dead unit r alone makes row r (dim 0) of the parameter useless.

    Found by asking: each activation in turn is taken to be dead as a whole, and dead in two random halves. A parameter
    whose rows become useless exactly as the units die is gated by it.
    """
    rows = {name: atoms for (name, dim), atoms in graph.axes.items() if dim == 0}
    pinned = np.nonzero(graph.is_pinned)[0]
    random = np.random.default_rng(0)
    at_once = max(1, CHUNK // (3 * max(graph.flow.atom_of.size, 1)))
    gates: dict[str, str] = {}
    for start in range(0, len(graph.activations), at_once):
        chunk = range(start, min(start + at_once, len(graph.activations)))
        dead = {}
        for place, number in enumerate(chunk):
            units = graph.activations[number].atoms.size
            dead[number] = np.zeros((3 * len(chunk), units), bool)
            half = random.random(units) < 0.5
            dead[number][3 * place : 3 * place + 3] = [np.ones(units, bool), half, ~half]
        live = graph.flow.live(dead, 3 * len(chunk))
        kept = graph.flow.kept(live, graph.classes, pinned)
        for place, number in enumerate(chunk):
            masks = dead[number][3 * place : 3 * place + 3]
            for name, atoms in rows.items():
                if name in gates or atoms.size != masks.shape[1] or not atoms.size:
                    continue
                if np.array_equal(~kept[3 * place : 3 * place + 3][:, atoms], masks):
                    gates[name] = graph.activations[number].name
    return gates
