"""Widths in a file: what a compacted model still has of the one that was analysed first, and the way back to it."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph import UnitGraph
from ..graph.units import Keep

__all__ = ["saved_keep", "widths_to_dict"]


def widths_to_dict(graph: UnitGraph) -> dict[str, dict[str, Any]]:
    """Which entries the compacted model still has of the one that was analysed first, as plain tensors and numbers:
    "kept": "parameter:dimension" -> (entries,) int64 numbers, "sizes": "parameter:dimension" -> entries at first."""
    keys = {key: f"{key[0]}:{key[1]}" for key in graph.axes}
    return {
        "kept": {text: torch.from_numpy(graph.axis_ids[key].copy()) for key, text in keys.items()},
        "sizes": {text: graph.axis_sizes[key] for key, text in keys.items()},
    }


def saved_keep(graph: UnitGraph, saved: Any) -> Keep:
    """What stays of the model of `graph`, so that it gets the widths that `widths_to_dict` told.

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


def _parts(saved: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    kept, sizes = (saved.get(name) if isinstance(saved, Mapping) else None for name in ("kept", "sizes"))
    if not (isinstance(kept, Mapping) and isinstance(sizes, Mapping)):
        raise ValueError(f"saved widths must be two mappings, 'kept' and 'sizes', got {type(saved).__name__}")
    return kept, sizes


def _numbers(text: str, kept: Any) -> np.ndarray:
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.dim() != 1 or kept.device.type == "meta":
        raise ValueError(f"saved widths must be 1-D int64 tensors, got {type(kept).__name__} for {text}")
    return kept.cpu().numpy()
