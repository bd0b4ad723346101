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
    random = np.random.default_rng(0)
    at_once = max(1, CHUNK // (3 * max(graph.flow.atom_of.size, 1)))
    gates: dict[str, str] = {}
    for start in range(0, len(graph.activations), at_once):
        chunk = graph.activations[start : start + at_once]
        dead = {}
        for place, activation in enumerate(chunk):
            units = activation.atoms.size
            half = random.random(units) < 0.5
            dead[start + place] = np.zeros((3 * len(chunk), units), bool)
            dead[start + place][3 * place : 3 * place + 3] = [np.ones(units, bool), half, ~half]
        live = graph.flow.live(dead, 3 * len(chunk))
        forced = np.broadcast_to(graph.is_pinned[graph.flow.atom_of], live.shape)
        useless = ~graph.flow.needed(live, forced)
        for place, activation in enumerate(chunk):
            scenarios = slice(3 * place, 3 * place + 3)
            masks = dead[start + place][scenarios]
            for name, slots in graph.rows.items():
                spans = [graph.flow.slots[slot].span for slot in slots]
                if name not in gates and all(np.array_equal(useless[scenarios, span], masks) for span in spans):
                    gates[name] = activation.name
    return gates
