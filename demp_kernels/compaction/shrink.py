"""`shrink_to`: a freshly built dense model becomes the compacted one of a plain `state_dict`."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph import AnalysisError, UnitGraph, remembered_inputs
from ..graph.units import Keep
from .plan import CompactionError
from .removal import Removal
from .state_checks import check_model_state

__all__ = ["shrink_to"]


def shrink_to(model: nn.Module, state_dict: Mapping[str, Any], example_inputs: Any = None) -> UnitGraph:
    """Cut a freshly built dense `model` to the widths of `state_dict` and load it: afterwards it is the model that the
    `state_dict` was taken of.

    The shapes say how many units every layer has. Which ones they are matters only where a residual addition selects
    channels: prepared models have that in their `state_dict` (`<addition>.channels`, once units were removed). Elsewhere
    the numbering is lost, and with it nothing that the model computes.

    Args:
        model: built as the saved one was before anything was removed: same class, same `prepare`.
        state_dict: of the compacted prepared model. That of `finalize` serves where no addition selects channels.
        example_inputs: a tensor or a tuple, for the analysis; not needed for a prepared model.

    Returns: the graph of the shrunk model, for `compact(..., graph=graph)`.
    Raises CompactionError if the `state_dict` is of another model, or does not tell what is left (units of several layers
    that alternate in one tensor, as behind a channel shuffle); nothing is changed then. TypeError, ValueError: wrong
    arguments.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"shrink_to: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"shrink_to: state_dict must be a mapping of tensors, got {type(state_dict).__name__}")
    inputs = remembered_inputs(model) if example_inputs is None else example_inputs
    if inputs is None:
        raise ValueError("example_inputs is required for a model that was not made by prepare(), got None")
    try:
        graph = UnitGraph.trace(model, inputs)
        removal = Removal(model, graph, _keep(graph, state_dict))
        check_model_state(model, state_dict, removal.shape, removal.selections)
    except (AnalysisError, ValueError) as error:
        raise CompactionError(f"shrink_to: {error}") from error
    removal.carry_out()
    model.load_state_dict(state_dict)
    return graph


def _keep(graph: UnitGraph, state: Mapping[str, Any]) -> Keep:
    """The classes that stay. Raises ValueError if the shapes do not fit the graph, or do not tell."""
    kept = np.ones(graph.classes, bool)
    known = graph.is_pinned.copy()
    for selection in graph.selections:
        _read_channels(graph, selection, state.get(f"{selection.name}.channels"), kept, known)
    sizes = {key: _size(state, key) for key in graph.axes}
    members, counts = _interchangeable(graph, known)
    numbers = _solve(graph, sizes, kept, known, counts, [len(m) for m in members])
    for classes, number in zip(members, numbers):
        kept[classes[number:]] = False
    partly = {c for m, n in zip(members, numbers) if 0 < n < len(m) for c in m.tolist()}
    for (name, dim), atoms in graph.axes.items():
        if not _in_order(atoms, members, partly):
            raise ValueError(f"the state_dict does not tell which entries of {name} are left: in its dimension {dim} the "
                             "units of several layers alternate; use load_checkpoint")
    return Keep(kept, {})


def _read_channels(graph: UnitGraph, selection: Any, channels: Any, kept: np.ndarray, known: np.ndarray) -> None:
    out, skip = graph.flow.atoms(selection.out), graph.flow.atoms(selection.skip)
    if channels is not None:
        if not isinstance(channels, Tensor) or channels.dtype != torch.uint8 or channels.shape != out.shape:
            raise ValueError(f"{selection.name}.channels must be a uint8 tensor of {out.size} entries")
        bits = channels.cpu().numpy()
        kept[out[bits & 1 == 0]] = False
        kept[skip[bits & 2 == 0]] = False
    known[out] = known[skip] = True


def _size(state: Mapping[str, Any], key: tuple[str, int]) -> int:
    name, dim = key
    tensor = state.get(name)
    if not isinstance(tensor, Tensor) or tensor.dim() <= dim:
        raise ValueError(f"the state_dict must have {name}, a tensor of {dim + 1} dimensions or more")
    return tensor.shape[dim]


def _interchangeable(graph: UnitGraph, known: np.ndarray) -> tuple[list[np.ndarray], list[dict[int, int]]]:
    """Groups of classes that are entries of the same tensors, equally often: the shapes cannot tell them apart.

    Returns (the classes of each group, ascending; for each group axis number -> entries a class has there).
    """
    signatures: dict[int, dict[int, int]] = {c: {} for c in np.nonzero(~known)[0].tolist()}
    for number, atoms in enumerate(graph.axes.values()):
        classes, times = np.unique(atoms, return_counts=True)
        for c, count in zip(classes.tolist(), times.tolist()):
            if c in signatures:
                signatures[c][number] = count
    groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for c, signature in signatures.items():
        groups.setdefault(tuple(signature.items()), []).append(c)
    return [np.array(classes) for classes in groups.values()], [dict(signature) for signature in groups]


def _solve(
    graph: UnitGraph, sizes: dict[tuple[str, int], int], kept: np.ndarray, known: np.ndarray,
    counts: list[dict[int, int]], most: list[int],
) -> list[int]:
    """How many classes of each group stay, so that every axis has its size: one unknown of one equation at a time."""
    numbers: list[int | None] = [None if signature else whole for signature, whole in zip(counts, most)]
    equations = []
    for number, (key, atoms) in enumerate(graph.axes.items()):
        left = sizes[key] - int((kept & known)[atoms].sum())
        equations.append((key, left, [g for g, signature in enumerate(counts) if number in signature], number))
    open_ones = True
    while open_ones:
        open_ones = False
        for (name, dim), left, groups, axis in equations:
            unknown = [g for g in groups if numbers[g] is None]
            rest = left - sum(counts[g][axis] * n for g in groups if (n := numbers[g]) is not None)
            full = sum(counts[g][axis] * most[g] for g in unknown)
            if not 0 <= rest <= full:
                raise ValueError(f"{name} of the state_dict has {sizes[name, dim]} entries in dimension {dim}, which does "
                                 "not fit the other tensors")
            if not unknown or (len(unknown) > 1 and 0 < rest < full):
                continue
            for g in unknown:
                share = most[g] if rest == full else rest // counts[g][axis]
                if rest != full and share * counts[g][axis] != rest:
                    raise ValueError(f"{name} of the state_dict must have a multiple of {counts[g][axis]} entries in "
                                     f"dimension {dim}, got {sizes[name, dim]}")
                numbers[g] = share
            open_ones = True
    if None in numbers:
        axis = next(iter(counts[numbers.index(None)]))
        raise ValueError(f"the state_dict does not tell which entries of {list(graph.axes)[axis][0]} are left: use "
                         "load_checkpoint")
    return [n for n in numbers if n is not None]


def _in_order(atoms: np.ndarray, members: list[np.ndarray], partly: set[int]) -> bool:
    """Whether the entries of an axis come in the same order, whichever classes of a group stay: each run of a group that
    stays in part holds all of its classes, in their order, once or several times."""
    of_group = {c: number for number, classes in enumerate(members) for c in classes.tolist()}
    labels = np.array([of_group.get(c, -1) if c in partly else -1 for c in atoms.tolist()])
    starts = np.concatenate([[0], np.nonzero(np.diff(labels))[0] + 1, [labels.size]])
    for first, behind in zip(starts[:-1], starts[1:]):
        if first < behind and labels[first] >= 0:
            run = atoms[first:behind]
            runs = run[np.concatenate([[True], np.diff(run) != 0])]
            classes = members[labels[first]]
            if not np.array_equal(runs, np.tile(classes, max(1, runs.size // classes.size))):
                return False
    return True
