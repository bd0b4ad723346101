"""Checkpoints of a network that changes its shape: written atomically, read without running any code from the file."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import require_module
from ..compaction import widths_to_dict
from ..compaction.entry import as_followers
from ..compaction.optimizer import as_optimizers, with_inner
from ..compaction.removal import Removal
from ..compaction.saved import saved_keep
from ..compaction.state_checks import check_model_state, check_optimizer_states, check_tensors, entry
from ..graph import UnitGraph, remembered_inputs
from .checkpoint_file import CheckpointError, read_file, write_file
from .controller import DemP
from .distributed import refit_wrappers, unwrap
from .random_state import check_random_state, random_state, restore_random_state

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    demp: DemP | None = None,
    *,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write widths, weights, optimisers, controller and the random states (torch, CUDA, numpy, Python) to `path`.

    The file appears whole or not at all: it is written beside its final name, flushed to the disk and renamed. What a
    killed process left of an earlier save is removed.

    Args:
        model: the (compacted) model, wrapped or not.
        optimizer, demp: saved when given. The widths come from `demp`; without it the model is saved as it is and
            loads into a model of the same widths only. Where rank 0 saves for several ranks, call `demp.pool_counters()` on
            all of them before: what each saw since the last look is in counters of its own.
        extra: plain values and tensors of the caller's own, returned by `load_checkpoint`.

    Raises OSError if the file cannot be written (disk full, no permission): what was at `path` before is unchanged.
    """
    require_module("model", model)
    if demp is not None and not isinstance(demp, DemP):
        raise TypeError(f"demp must be a DemP, got {type(demp).__name__}")
    write_file(Path(path), {
        "units": widths_to_dict(demp.graph) if demp is not None else None,
        "model": unwrap(model).state_dict(),
        "optimizers": [one.state_dict() for one in as_optimizers(optimizer)],
        "demp": demp.state_dict() if demp is not None else None,
        "rng": random_state(),
        "extra": extra or {},
    })


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    demp: DemP | None = None,
    *,
    example_inputs: Any = None,
    restore_rng: bool = True,
) -> dict[str, Any]:
    """Bring a freshly built dense `model` (and optimiser, and controller) to the state that was saved.

    Everything is checked before the first change: a file that does not fit leaves all as it was.

    Args:
        path: a file from `save_checkpoint`. It is read with `weights_only=True`: no code in it ever runs.
        model: built as the saved one was at its start: same class, same `prepare`. It may be wrapped (torch.compile,
            DistributedDataParallel); each rank loads.
        optimizer, demp: filled when given and saved. Copies that follow (`DemP(followers=...)`) get the widths; their
            values are the caller's, for example in `extra`.
        example_inputs: for the analysis of a model that was not made by `prepare`, when `demp` is not given.
        restore_rng: continue the random generators, too: with those of the process that saved. Where rank 0 saved for several
            ranks that draw different numbers, restore rank 0's only.

    Returns: the `extra` that was saved.
    Raises: FileNotFoundError; CheckpointError for a damaged or foreign file or one of another model; ValueError where the
        analysis needs `example_inputs` and there are none.
    """
    content = read_file(Path(path))
    wrapper, model, optimizers = model, unwrap(model), as_optimizers(optimizer)
    graph = demp.graph if demp is not None else None
    if graph is None and content.get("units") is not None:
        inputs = remembered_inputs(model) if example_inputs is None else example_inputs
        if inputs is None:
            raise ValueError("example_inputs is required for a model that was not made by prepare(), got None")
        graph = UnitGraph.trace(model, inputs)
    try:
        removal = _checked(content, model, optimizers, demp, graph)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from error

    if removal is not None:
        removal.carry_out()
        refit_wrappers(wrapper)
    model.load_state_dict(content["model"])
    for one, state in zip(optimizers, content["optimizers"]):
        one.load_state_dict(state)
        for inner in with_inner([one]):
            _align_moments(inner)
    if demp is not None and content["demp"] is not None:
        demp.load_state_dict(content["demp"])
    if restore_rng:
        restore_random_state(content["rng"])
    return content["extra"]


def _checked(
    content: dict[str, Any], model: nn.Module, optimizers: list[Optimizer], demp: DemP | None, graph: UnitGraph | None
) -> Removal | None:
    """How the model gets its widths, or None if the file tells none. Raises an error if any part does not fit."""
    for part in ("units", "model", "optimizers", "demp", "rng"):
        if part not in content:
            raise ValueError(f"it must have {part!r}")
        check_tensors(part, content[part])
    optional = (dict, type(None))
    units, state = entry(content, "units", optional), entry(content, "demp", optional)
    entry(content, "extra", dict)
    followers = as_followers(demp.followers if demp is not None else None)
    removal = None
    if graph is not None and units is not None:
        shrinking = [] if content["optimizers"] else optimizers  # states that are about to be replaced need not shrink
        removal = Removal(model, graph, saved_keep(graph, units), optimizers=shrinking, followers=followers)
    shape = (lambda tensor: tuple(tensor.shape)) if removal is None else removal.shape
    check_model_state(model, content.get("model"), shape, {} if removal is None else removal.selections)
    check_optimizer_states(optimizers, content.get("optimizers"), shape)
    if demp is not None and state is not None:
        demp.check_state_dict(state, demp.live_units if removal is None else removal.units)
    check_random_state(content.get("rng"))
    return removal


def _align_moments(optimizer: Optimizer) -> None:
    """Give state of a parameter's shape the parameter's strides: fused optimisers walk both as they lie in memory, so that
    moments saved from another memory format would meet the wrong weights."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
