"""Which call of an activation is which: evaluation and training are analysed one after the other, and number them alike."""
from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterator

import numpy as np

from .values import Activation

__all__ = ["ActivationCalls"]

_Key = tuple[str, str | None]
"""Path of a module, or name of a function in it; kind of the function, None for a module."""


class ActivationCalls:
    """The activations that are called, in the order in which they were first. modules: names that are not given to functions."""

    def __init__(self, modules: Container[str]) -> None:
        self.activations: list[Activation] = []
        self._modules = modules
        self._graph = 0
        """Number of the graph that is walked, from 1."""
        self._next: Counter[_Key] = Counter()
        """Calls so far in this graph."""
        self._numbers: dict[tuple[_Key, int], int] = {}
        self._calls: dict[_Key, list[tuple[int, set[str], np.ndarray]]] = {}
        """Of each call: graph, the layers in front of it, units."""

    def next_graph(self) -> None:
        self._next.clear()
        self._graph += 1

    def number(self, path: str, kind: str | None, atoms: np.ndarray, dim: int, behind: set[str]) -> int:
        """The number of the activation that is called now, with units `atoms` along `dim`, behind these layers; one known from the
        first graph is found again. `kind` is None for a module; a function gets the name `<path>.<kind>`, `<path>.<kind>_1`, ..."""
        base = path if kind is None else ".".join(filter(None, [path, kind]))
        key = base, kind
        call = self._next[key]
        self._next[key] += 1
        self._calls.setdefault(key, []).append((self._graph, behind, atoms))
        known = self._numbers.get((key, call))
        if known is None or self.activations[known].atoms.shape != atoms.shape:
            name = base
            if kind is not None:
                numbered = itertools.chain([base], (f"{base}_{i}" for i in itertools.count(1)))
                taken = {a.name for a in self.activations}
                name = next(n for n in numbered if n not in self._modules and n not in taken)
            self._numbers[key, call] = len(self.activations)
            self.activations.append(Activation(name, atoms, dim))
        return self._numbers[key, call]

    def shifted(self) -> Iterator[tuple[np.ndarray, str]]:
        """Units and the reason why they must stay, of activations that training calls more, or fewer, times than evaluation, or
        behind other layers: it is not known which of the calls are the same."""
        for (base, _), calls in self._calls.items():
            first, second = ([behind for graph, behind, _ in calls if graph == number] for number in (1, 2))
            if second and first and first != second:
                times = f"{len(first)} times in evaluation, {len(second)} in training"
                how = times if len(first) != len(second) else "behind other layers in training"
                for *_, atoms in calls:
                    yield atoms, f"{base} is called {how}"
