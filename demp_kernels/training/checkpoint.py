"""Checkpoints of a network that changes its shape: written atomically, read without running any code from the file."""
from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..compaction import apply_saved, plan_to_dict
from ..graph import UnitGraph, remembered_inputs
from .controller import DemP

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]

FORMAT = "demp_kernels checkpoint"
VERSION = 1


class CheckpointError(RuntimeError):
    """The file is damaged, foreign, or belongs to another model. Nothing was changed."""


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    demp: DemP | None = None,
    *,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write widths, weights, optimiser, controller and torch's random state to `path`.

    The file appears whole or not at all: it is written beside its final name, flushed to the disk and renamed.

    Args:
        model: the (compacted) model.
        optimizer, demp: saved when given. The widths come from `demp`; without it the model is saved as it is and
            loads into a model of the same widths only.
        extra: plain values and tensors of the caller's own, returned by `load_checkpoint`.
    """
    path = Path(path)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "units": plan_to_dict(demp.graph) if demp is not None else None,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict() if optimizer is not None else None,
        "demp": demp.state_dict() if demp is not None else None,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "extra": extra or {},
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    demp: DemP | None = None,
    *,
    example_inputs: Any = None,
    restore_rng: bool = True,
) -> dict[str, Any]:
    """Bring a freshly built dense `model` (and optimiser, and controller) to the state that was saved.

    Args:
        path: a file from `save_checkpoint`. It is read with `weights_only=True`: no code in it ever runs.
        model: built as the saved one was at its start: same class, same `prepare`.
        optimizer, demp: filled when given and saved.
        example_inputs: for the analysis of a model that was not made by `prepare`, when `demp` is not given.

    Returns: the `extra` that was saved.
    Raises: FileNotFoundError; CheckpointError for a damaged or foreign file or one of another model.
    """
    content = _read(Path(path))
    graph = demp.graph if demp is not None else None
    if content["units"] is not None:
        if graph is None:
            inputs = remembered_inputs(model) if example_inputs is None else example_inputs
            if inputs is None:
                raise ValueError("example_inputs is required for a model that was not made by prepare(), got None")
            graph = UnitGraph.trace(model, inputs)
        try:
            apply_saved(model, optimizer, graph, content["units"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from error
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from error
    if optimizer is not None and content["optimizer"] is not None:
        optimizer.load_state_dict(content["optimizer"])
    if demp is not None and content["demp"] is not None:
        demp.load_state_dict(content["demp"])
    if restore_rng:
        torch.set_rng_state(content["rng"])
        if torch.cuda.is_available() and len(content["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(content["cuda_rng"])
    return content["extra"]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT}")
    if content["version"] > VERSION:
        raise CheckpointError(f"{path} is of version {content['version']}, this package reads up to {VERSION}")
    return content
