"""Which entries carry zero, and which are needed: two passes over the values of a network.

A *slot* is one value of the network with one entry per unit position; all slots lie end to end in one array of
entries. A *step* says where the entries of a slot come from. The forward pass finds the entries that are not zero
(`live`) when given units are dead; the backward pass finds the entries that somebody needs. An atom is kept when any
of its entries is needed, and every entry of a kept atom must then have its right value, so the backward pass is
repeated until nothing more is needed. Keeping more than necessary is always exact.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Flow", "Link", "Slot", "Step"]


@dataclass
class Slot:
    """One value: its first entry, and how many it has."""

    start: int
    size: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass
class Link:
    """Entry `target[i]` of a step's slot is made from entry `source[i]` of slot `slot`; None: entry i from entry i.

    A closed flow has slices for runs of entries: all of densenet121's 597 links with indices are runs, and a pass over
    slices takes a third of the time of one over indices. same_classes: a run whose two sides are entries of the same
    classes, so that both lose the same ones, whatever goes.
    """

    slot: int
    source: np.ndarray | slice | None = None
    target: np.ndarray | slice | None = None
    same_classes: bool = False

    def narrow(self) -> None:
        """Use slices if both sides are runs."""
        source, target = (i if i is None or isinstance(i, slice) else _run(i) for i in (self.source, self.target))
        if source is not None and target is not None:
            self.source, self.target = source, target


@dataclass
class Step:
    """How the entries of slot `slot` are made.

    kind: "sum" (zero where everything it is made from is zero: additions, copies, functions with f(0) = 0),
        "product" (zero where any factor is zero), or "affine" (never known to be zero: BatchNorm, a bias, sigmoid).
    activation: number of the activation whose dead units are zero here.
    origin: the op that it stands for, as a report names it.
    """

    slot: int
    kind: str
    links: list[Link] = field(default_factory=list)
    activation: int | None = None
    origin: str = ""


class Flow:
    """The slots and steps of one network, in the order in which they are computed."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.steps: list[Step] = []
        self.atom_of = np.empty(0, np.int64)
        self.contracted = np.empty(0, bool)
        """Entries read by a convolution or linear layer, which needs those that are not zero."""
        self.rigid = np.empty(0, bool)
        """Those of them of which a reader cannot do without a constant."""
        self.foreign = np.empty(0, bool)
        """Those of them that something else than a layer reads."""
        self._atoms: list[np.ndarray] = []
        self._sinks: set[int] = set()
        self._rigid_sinks: set[int] = set()
        self._foreign_sinks: set[int] = set()

    # --- building ---

    def add_slot(self, atoms: np.ndarray) -> int:
        start = self.slots[-1].start + self.slots[-1].size if self.slots else 0
        self.slots.append(Slot(start, atoms.size))
        self._atoms.append(atoms.ravel())
        return len(self.slots) - 1

    def contract(self, slot: int, *, takes_constants: bool = False, by_layer: bool = False) -> None:
        """A slot is read by a sum over its entries. takes_constants: what a constant entry gives can be added elsewhere.
        by_layer: the sum is that of a layer, with weights of its own."""
        if not by_layer:
            self._foreign_sinks.add(slot)
        self._sinks.add(slot)
        if not takes_constants:
            self._rigid_sinks.add(slot)

    def close(self, roots: np.ndarray, pinned: np.ndarray, wanted: set[int]) -> None:
        """Building is over: replace atoms by their classes, and forget slots that nothing can be removed from.

        Args:
            roots: class of each atom. pinned: (atoms,) bool, classes that always stay.
            wanted: slots to remember even if all of their entries are pinned.
        """
        self.atom_of = roots[np.concatenate(self._atoms)] if self._atoms else np.empty(0, np.int64)
        self.contracted, self.rigid, self.foreign = np.zeros((3, self.atom_of.size), bool)
        sinks = ((self._sinks, self.contracted), (self._rigid_sinks, self.rigid), (self._foreign_sinks, self.foreign))
        for slots, entries in sinks:
            for slot in slots:
                entries[self.slots[slot].span] = True
        self._atoms.clear()
        dropped = {
            i for i, slot in enumerate(self.slots) if i not in wanted and pinned[self.atom_of[slot.span]].all()
        }
        self._drop(dropped)
        for step in self.steps:
            for link in step.links:
                link.narrow()
                if isinstance(link.source, slice):
                    left, right = self.atoms(link.slot)[link.source], self.atoms(step.slot)[link.target]
                    link.same_classes = np.array_equal(left, right)

    def _drop(self, dropped: set[int]) -> None:
        """Empty some slots whose entries are all pinned. What they are made from is needed where it is not zero, and
        they are taken never to be zero themselves."""
        stays = np.ones(self.atom_of.size, bool)
        for slot in dropped:
            stays[self.slots[slot].span] = False
        steps = []
        for step in self.steps:
            for link in step.links:
                if step.slot in dropped:
                    span = self.slots[link.slot].span
                    assert not isinstance(link.source, slice)  # links become narrow later
                    read = span if link.source is None else span.start + link.source
                    self.contracted[read] = self.rigid[read] = self.foreign[read] = True
                elif link.slot in dropped and step.kind == "sum":
                    step.kind = "affine"
            if step.slot not in dropped:
                step.links = [link for link in step.links if link.slot not in dropped]
                steps.append(step)
        self.steps = steps
        before = np.concatenate([[0], np.cumsum(stays)])
        self.slots = [
            Slot(int(before[s.start]), int(before[s.start + s.size] - before[s.start])) for s in self.slots
        ]
        self._select(stays)

    def _select(self, entries: np.ndarray) -> None:
        self.atom_of, self.contracted = self.atom_of[entries], self.contracted[entries]
        self.rigid, self.foreign = self.rigid[entries], self.foreign[entries]

    def atoms(self, slot: int) -> np.ndarray:
        return self.atom_of[self.slots[slot].span]

    # --- passes: every array has scenarios along its first dimension ---

    def live(self, dead: dict[int, np.ndarray], scenarios: int = 1) -> np.ndarray:
        """(scenarios, entries) bool: entries not known to be zero when the units `dead[activation]`, (scenarios,
        units) or (units,) bool, are zero."""
        live = np.ones((scenarios, self.atom_of.size), bool)
        spans = [slot.span for slot in self.slots]
        for step in self.steps:
            out = live[:, spans[step.slot]]
            if step.kind == "sum" and step.links:
                out[:] = False
                for link in step.links:
                    _gather(link, live[:, spans[link.slot]], out)
            elif step.kind == "product":
                for link in step.links:
                    factor = np.zeros_like(out)
                    _gather(link, live[:, spans[link.slot]], factor)
                    out &= factor
            if step.activation is not None and step.activation in dead:
                out &= ~dead[step.activation]
        return live

    def kept(
        self,
        live: np.ndarray,
        atoms: int,
        pinned: np.ndarray,
        widen: Callable[[np.ndarray], np.ndarray] | None = None,
        folded: np.ndarray | None = None,
    ) -> np.ndarray:
        """(scenarios, atoms) bool: the classes that have to stay.

        Args:
            live: from `live`.
            atoms: how many atoms there are.
            pinned: atoms that always stay.
            widen: given the kept atoms (atoms,), returns those to keep besides (rounding of widths); only with one
                scenario.
            folded: see `needed`.
        """
        kept = np.zeros((live.shape[0], atoms), bool)
        kept[:, pinned] = True
        while True:
            before = kept.sum()
            forced = kept[:, self.atom_of]
            scenario, entry = np.nonzero(self.needed(live, forced, folded) & ~forced)
            kept[scenario, self.atom_of[entry]] = True
            if kept.sum() > before:
                continue
            extra = widen(kept[0]) if widen is not None else np.empty(0, np.int64)
            if not extra.size:
                return kept
            kept[0, extra] = True

    def needed(self, live: np.ndarray, forced: np.ndarray, folded: np.ndarray | None = None) -> np.ndarray:
        """(scenarios, entries) bool: entries whose value matters, given those that must be right anyway. `folded`: like
        `live`, entries that the layers which contract them do without, though they are not zero."""
        read = self.contracted if folded is None else self.contracted & ~folded
        need = forced | (live & read)
        may = live | forced  # a zero entry contributes nothing, present or not
        spans = [slot.span for slot in self.slots]
        for step in reversed(self.steps):
            out = need[:, spans[step.slot]]
            for link in step.links:
                _scatter(link, out, need[:, spans[link.slot]], may[:, spans[link.slot]])
        return need

    # --- shrinking ---

    def shrink(self, kept: np.ndarray) -> None:
        """Drop the entries of the atoms that are not kept."""
        entries = kept[self.atom_of]
        place = np.concatenate([[0], np.cumsum(entries)])  # of each entry among those that stay
        linked = [
            (link, self.slots[link.slot], self.slots[step.slot])
            for step in self.steps for link in step.links if link.source is not None
        ]
        _shrink_runs([pair for pair in linked if pair[0].same_classes], place)
        for link, source, target in linked:
            if not link.same_classes:
                _shrink(link, source.span, target.span, entries, place)
        offsets = place[[slot.start for slot in self.slots] + [entries.size]].tolist()
        self.slots = [Slot(a, b - a) for a, b in zip(offsets[:-1], offsets[1:])]
        self._select(entries)


def _run(index: np.ndarray) -> slice | None:
    """The slice of consecutive entries; None if they are not."""
    if not index.size:
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == index.size and (np.diff(index) == 1).all() else None


def _gather(link: Link, source: np.ndarray, out: np.ndarray) -> None:
    """Set the entries of `out`, (scenarios, entries), that are made from set ones of `source`."""
    if link.source is None:
        out |= source
    elif isinstance(link.source, slice):
        part = out[:, link.target]
        np.logical_or(part, source[:, link.source], out=part)
    else:
        scenario, pair = np.nonzero(source[:, link.source])
        out[scenario, link.target[pair]] = True


def _scatter(link: Link, out: np.ndarray, source: np.ndarray, may: np.ndarray) -> None:
    """Set the entries of `source`, of those that may be, from which set ones of `out` are made."""
    if link.source is None:
        source |= out & may
    elif isinstance(link.source, slice):
        part = source[:, link.source]
        np.logical_or(part, out[:, link.target] & may[:, link.source], out=part)
    else:
        scenario, pair = np.nonzero(out[:, link.target])
        source[scenario, link.source[pair]] = True
        source &= may


def _shrink_runs(linked: list[tuple[Link, Slot, Slot]], place: np.ndarray) -> None:
    """Runs of the same classes on both sides stay such runs: new ends, found for all links in one go."""
    ends = [(_ends(link.source, source), _ends(link.target, target)) for link, source, target in linked]
    moved = place[np.array(ends, np.int64).reshape(-1, 2, 3)]
    for (link, _, _), (source, target) in zip(linked, (moved[..., 1:] - moved[..., :1]).tolist()):
        link.source, link.target = slice(*source), slice(*target)


def _ends(run: np.ndarray | slice | None, slot: Slot) -> tuple[int, int, int]:
    """First entry of the slot, first and last of the run in it, among all entries."""
    assert isinstance(run, slice)
    return slot.start, slot.start + run.start, slot.start + run.stop


def _shrink(link: Link, source: slice, target: slice, entries: np.ndarray, place: np.ndarray) -> None:
    """The pairs of a link of which both entries stay. source, target: the slots' spans."""
    both = entries[source][link.source] & entries[target][link.target]
    first, second = (np.arange(s.stop - s.start)[i][both] for s, i in ((source, link.source), (target, link.target)))
    link.source = place[source.start + first] - place[source.start]
    link.target = place[target.start + second] - place[target.start]
    link.narrow()
