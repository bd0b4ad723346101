"""Why dead units stay: the op that needs them, and where it is in the model's source."""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .flow import Slot, Step

if TYPE_CHECKING:
    from .units import Keep, UnitGraph

__all__ = ["explain"]

SAMPLES = 2
"""Units of one activation that are looked at: each costs a pass over the entries."""


def explain(graph: UnitGraph, masks: dict[int, np.ndarray], keep: Keep) -> dict[str, str]:
    """Activation -> how many of its dead units stay, and why.

    Args:
        masks: activation number -> (units,) bool, the dead ones, as `UnitGraph.masks` gives them.
        keep: what `UnitGraph.keep` gave for them.
    """
    kept = keep.atoms
    found: dict[str, str] = {}
    search: _Search | None = None
    for number, mask in masks.items():
        activation = graph.activations[number]
        stay = activation.atoms[mask & kept[activation.atoms]]
        if not stay.size:
            continue
        reasons: dict[str, None] = {}
        for c in stay[np.unique(np.linspace(0, stay.size - 1, SAMPLES).astype(int))].tolist():
            if graph.is_pinned[c]:
                reasons[graph.reasons.get(c, "a tensor that cannot be cut")] = None
                continue
            search = search or _Search(graph, masks, keep)
            reasons[search.why(c)] = None
        found[activation.name] = f"{stay.size} dead units: " + "; ".join(reasons)
    return found


def _entries(slot: Slot, index: np.ndarray | slice) -> np.ndarray:
    """The entries that an index of a link means."""
    return np.arange(slot.start, slot.start + slot.size)[index]


class _Search:
    """Goes back from the values that somebody needs to the op that made them something else than zero."""

    def __init__(self, graph: UnitGraph, masks: dict[int, np.ndarray], keep: Keep) -> None:
        self.graph, self.masks, self.kept, self.live = graph, masks, keep.atoms, keep.live
        flow = graph.flow
        self.needed = keep.atoms
        """Classes that would stay without any widths to keep."""
        if keep.widened:
            self.needed = flow.kept(self.live[None], graph.classes, np.nonzero(graph.is_pinned)[0])[0]
        self.read = np.nonzero(self.live & self._read())[0]
        self.classes_read = flow.atom_of[self.read]
        self.steps = {step.slot: step for step in flow.steps}
        self.starts = np.array([slot.start for slot in flow.slots])

    def why(self, c: int) -> str:
        """Why class `c`, which is not pinned, stays."""
        if not self.needed[c]:
            return self._width(c)
        for entry in self.read[self.classes_read == c].tolist():
            if (text := self._met(entry)) is not None:
                return text
        return self._alive(c) or "other layers need them"

    def _read(self) -> np.ndarray:
        """(entries,) bool: those that a layer sums up, or that entries of another class are made from."""
        flow = self.graph.flow
        read = flow.contracted.copy()
        need = flow.needed(self.live[None], self.needed[flow.atom_of][None])[0]
        for step in flow.steps:
            for link in step.links:
                if link.source is not None and link.target is not None:
                    source, target = _entries(flow.slots[link.slot], link.source), _entries(flow.slots[step.slot], link.target)
                    read[source[need[target] & (flow.atom_of[source] != flow.atom_of[target])]] = True
        return read

    def _met(self, entry: int) -> str | None:
        """The last op before `entry` at which something that is zero met something that is not; None: there is none."""
        seen = set()
        while entry not in seen:
            seen.add(entry)
            slot = int(np.searchsorted(self.starts, entry, side="right")) - 1
            while not self.graph.flow.slots[slot].size:
                slot -= 1  # empty slots begin where the next one does
            step = self.steps.get(slot)
            sources = [] if step is None else self._sources(step, entry - self.graph.flow.slots[slot].start)
            alive = [source for source in sources if self.live[source]]
            if step is not None and sources and len(alive) < len(sources):
                return self._text(step, alive)
            if not alive:
                return None
            entry = alive[0]
        return None

    def _sources(self, step: Step, place: int) -> list[int]:
        """Entries that entry `place` of a step's slot is made from."""
        found: list[int] = []
        for link in step.links:
            slot = self.graph.flow.slots[link.slot]
            if link.source is None or link.target is None:
                found.append(slot.start + place)
            elif isinstance(link.source, slice) and isinstance(link.target, slice):  # runs, which have a start
                if link.target.start <= place < link.target.stop:
                    found.append(slot.start + link.source.start + place - link.target.start)
            else:
                out = self.graph.flow.slots[step.slot]
                found += _entries(slot, link.source)[_entries(out, link.target) == out.start + place].tolist()
        return found

    def _text(self, step: Step, alive: list[int]) -> str:
        if not alive:
            return f"{step.origin} makes something else of zero"
        return f"{step.origin} joins them with values that are not zero"

    def _width(self, c: int) -> str:
        """The width that wants class `c`."""
        for floor in self.graph.floors:
            if c in floor.atoms and self.kept[floor.atoms].sum() <= floor.count:
                return floor.reason
        for balance in self.graph.balances:
            if c in balance.rows or c in balance.columns:
                return f"the groups of {balance.weight} keep equal sizes"
        return "for its width (round_to, min_units)"

    def _alive(self, c: int) -> str | None:
        """Units that are not dead and go together with class `c`."""
        for number, a in enumerate(self.graph.activations):
            mask = self.masks.get(number)
            if (mask is None and c in a.atoms) or (mask is not None and c in a.atoms[~mask]):
                return f"they go together with units of {a.name} that are not dead"
        return None
