"""Atoms: sets of tensor entries that can only be removed together.

Every entry of every axis that carries units gets an atom number. Rules that need two entries to stay or go together
(an addition, a BatchNorm's scale beside its channel) tie their atoms; `resolve` turns the ties into classes.
Atom 0 is the pinned one: entries tied to it are never removed.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["PINNED", "Atoms"]

PINNED = 0


@dataclass
class Atoms:
    """The atoms of one analysis and the ties between them."""

    count: int = 1
    ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    pins: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def fresh(self, *shape: int) -> np.ndarray:
        """New atoms, independent of all others, as an array of the given shape."""
        size = int(np.prod(shape, dtype=np.int64))
        new = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        return new

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Entries of `a` and `b` (broadcast against each other) stay or go together."""
        if a is b:
            return
        a, b = np.broadcast_arrays(a, b)
        different = a != b
        if different.any():
            self.ties.append((a[different], b[different]))

    def pin(self, atoms: np.ndarray, reason: str) -> None:
        """Keep `atoms` for good; `reason` is what a report says about them."""
        atoms = np.unique(atoms)
        atoms = atoms[atoms != PINNED]
        if atoms.size:
            self.pins.append((atoms, reason))

    def resolve(self) -> tuple[np.ndarray, dict[int, str]]:
        """Returns (roots, reasons): `roots[atom]` is the smallest atom tied to it, directly or not (0: pinned for no
        stated reason), and `reasons[root]` says why a class is pinned."""
        pairs = self.ties
        a = np.concatenate([p[0].ravel() for p in pairs]) if pairs else np.empty(0, np.int64)
        b = np.concatenate([p[1].ravel() for p in pairs]) if pairs else np.empty(0, np.int64)
        roots = connected(self.count, a, b)
        reasons: dict[int, str] = {}
        for atoms, reason in self.pins:
            for root in np.unique(roots[atoms]).tolist():
                reasons.setdefault(root, reason)
        return roots, reasons


def connected(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Smallest member of each element's class, (count,) int64, when a[i] and b[i] belong together for every i.

    Hooking to the smaller root and pointer jumping, whole arrays at a time: densenet121 ties 10^5 pairs, which a
    Python union-find would walk one by one.
    """
    parent = np.arange(count, dtype=np.int64)
    while a.size:
        root_a, root_b = parent[a], parent[b]
        open_pairs = root_a != root_b
        a, b, root_a, root_b = a[open_pairs], b[open_pairs], root_a[open_pairs], root_b[open_pairs]
        if not a.size:
            break
        np.minimum.at(parent, np.maximum(root_a, root_b), np.minimum(root_a, root_b))
        while True:
            jumped = parent[parent]
            if np.array_equal(jumped, parent):
                break
            parent = jumped
    return parent
