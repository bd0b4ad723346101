"""Widths in a file: what a compacted model still has of the one that was analysed first, and the way back to it."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph import UnitGraph
from ..graph.units import Keep
from .commit import commit
from .optimizer import StateCut
from .plan import make_plan
from .validate import validate

__all__ = ["Restoration", "plan_to_dict", "saved_keep"]


def plan_to_dict(graph: UnitGraph) -> dict[str, dict[str, Any]]:
    """Which entries the compacted model still has of the one that was analysed first, as plain tensors and numbers:
    "kept": "parameter:dimension" -> (entries,) int64 numbers, "sizes": "parameter:dimension" -> entries at first."""
    keys = {key: f"{key[0]}:{key[1]}" for key in graph.axes}
    return {
        "kept": {text: torch.from_numpy(graph.axis_ids[key].copy()) for key, text in keys.items()},
        "sizes": {text: graph.axis_sizes[key] for key, text in keys.items()},
    }


def saved_keep(graph: UnitGraph, saved: Any) -> Keep:
    """What stays of the model of `graph`, so that it gets the widths that `plan_to_dict` told.

    Raises ValueError if `saved` is no such description, or one of another model.
    """
    kept, sizes = _parts(saved)
    keys = {f"{name}:{dim}": (name, dim) for name, dim in graph.axes}
    for found in (kept, sizes):
        if keys.keys() != found.keys():
            odd = sorted(map(str, keys.keys() ^ found.keys()))
            raise ValueError(f"saved widths must be of this model: {odd[0]} is in only one of them")
    atoms = np.ones(graph.classes, bool)
    for text, key in keys.items():
        if sizes[text] != graph.axis_sizes[key]:
            raise ValueError(
                f"saved widths must be of this model: {text} had {sizes[text]} entries, the model's has "
                f"{graph.axis_sizes[key]}"
            )
        gone = ~np.isin(graph.axis_ids[key], _numbers(text, kept[text]))
        atoms[graph.axes[key][gone]] = False
    for text, key in keys.items():
        left = graph.axis_ids[key][atoms[graph.axes[key]]]
        if not np.array_equal(left, kept[text].cpu().numpy()):
            raise ValueError(f"saved widths must be of this model: the entries of {text} do not fit its other tensors")
    return Keep(atoms, {})


class Restoration:
    """A change of a model's widths that is planned and tried, and carried out when everything else has been checked.

    Raises CompactionError or ValueError if `model` cannot have these widths. Nothing is changed before `carry_out`.
    """

    def __init__(self, model: nn.Module, graph: UnitGraph, keep: Keep, followers: Sequence[nn.Module] = ()) -> None:
        self.graph, self.keep = graph, keep
        self.plan = make_plan(model, graph, keep)
        self.selections = {f"{change.name}.channels": (change.out.numel(),) for change in self.plan.selections}
        """Keys of additions in the model's `state_dict` afterwards, and their shapes."""
        for follower in followers:
            self.plan.add(make_plan(follower, graph, keep))
        self.plan.require_dense()
        if self.plan.cuts and not graph.proved:
            validate(model, graph, self.plan)
        self._shapes = {id(cut.tensor): cut.shape for cut in self.plan.cuts}

    @property
    def units(self) -> dict[str, int]:
        """Units of each activation afterwards."""
        return {a.name: int(self.keep.atoms[a.atoms].sum()) for a in self.graph.activations}

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape that a parameter or buffer of the model will have."""
        return self._shapes.get(id(tensor), tuple(tensor.shape))

    def carry_out(self, states: list[StateCut]) -> None:
        if self.plan.cuts or self.plan.selections:
            commit(self.plan, states)
            self.graph.shrink(self.keep.atoms)


def _parts(saved: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    kept, sizes = (saved.get(name) if isinstance(saved, Mapping) else None for name in ("kept", "sizes"))
    if not (isinstance(kept, Mapping) and isinstance(sizes, Mapping)):
        raise ValueError(f"saved widths must be two mappings, 'kept' and 'sizes', got {type(saved).__name__}")
    return kept, sizes


def _numbers(text: str, kept: Any) -> np.ndarray:
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.dim() != 1 or kept.device.type == "meta":
        raise ValueError(f"saved widths must be 1-D int64 tensors, got {type(kept).__name__} for {text}")
    return kept.cpu().numpy()
