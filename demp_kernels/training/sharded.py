"""Checkpoints of sharded runs through torch.distributed.checkpoint (DCP): every rank writes its share of the tensors."""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..compaction import widths_to_dict
from ..compaction.entry import as_followers
from ..compaction.optimizer import as_optimizers
from ..compaction.removal import Removal
from ..compaction.saved import saved_keep
from ..compaction.state_checks import entry
from .checkpoint_file import CheckpointError, read_file, write_file
from .controller import DemP
from .distributed import from_first_rank, refit_wrappers, unwrap

__all__ = ["load_sharded", "save_sharded"]

WIDTHS = "demp.pt"
"""Beside DCP's files: widths, controller and `extra`. Written last, so that a folder without it is no checkpoint."""


def save_sharded(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    demp: DemP,
    *,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write model and optimisers by DCP, and widths, controller and `extra` by rank 0, into `folder`. What was saved
    there before is given up at once: save into a new folder each time to have one whatever happens.

    Called by every rank. The model may be wrapped (DistributedDataParallel): every tensor is written once, by one rank.
    Raises OSError, on all ranks, if rank 0 cannot write.
    """
    # imported here: not every build of torch has it
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    path, device = Path(folder) / WIDTHS, next(model.parameters()).device
    weights, moments = get_state_dict(unwrap(model), as_optimizers(optimizer))
    # until the new file is whole, the folder is no checkpoint
    _by_first_rank(lambda: path.unlink(missing_ok=True), path, device)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    demp.pool_counters()
    content = {"units": widths_to_dict(demp.graph), "demp": demp.state_dict(), "extra": extra or {}}
    _by_first_rank(lambda: write_file(path, content), path, device)


def load_sharded(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], demp: DemP
) -> dict[str, Any]:
    """Bring a freshly built dense model, its optimisers and its controller to the saved state, on any number of ranks.

    Called by every rank. Returns the `extra` that was saved. Raises CheckpointError, with nothing changed, if the widths
    do not fit the model or the optimisers keep other state than those that were saved. For that it makes the dense optimiser
    state first: loading takes the memory of the dense run. DCP's own files hold pickles: load only folders that you trust.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    path, inner, optimizers = Path(folder) / WIDTHS, unwrap(model), as_optimizers(optimizer)
    content = read_file(path)
    try:
        keep = saved_keep(demp.graph, entry(content, "units", dict))
        removal = Removal(inner, demp.graph, keep, optimizers=optimizers, followers=as_followers(demp.followers))
        demp.check_state_dict(entry(content, "demp", dict), removal.units)
        _check_optimizers(folder, inner, optimizers)
    except (ValueError, TypeError, RuntimeError, KeyError, AssertionError) as error:
        raise CheckpointError(f"{path} does not fit {type(inner).__name__}: {error}") from error
    removal.carry_out()
    refit_wrappers(model)
    weights, moments = get_state_dict(inner, optimizers)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(inner, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    demp.load_state_dict(content["demp"])
    return entry(content, "extra", dict)


def _check_optimizers(folder: str | os.PathLike[str], model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raises ValueError unless DCP has saved in `folder` what these optimisers keep for each parameter, and, of parameters that
    train, no more. DCP itself would find out after the model was cut to the saved widths."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    try:
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a pickle: damaged, it raises whatever comes up
        raise ValueError(f"its DCP metadata cannot be read ({type(error).__name__}: {error})") from error
    fresh = [one for one in optimizers if not one.state]
    try:
        moments: dict[str, Any] = get_optimizer_state_dict(model, optimizers)["state"]  # type: ignore[assignment]
    finally:
        for one in fresh:
            one.state.clear()  # torch made it by a step with gradients of zero, which counts as a step
    trained = {name.replace("_orig_mod.", "") for name, p in model.named_parameters() if p.requires_grad}
    names, found = trained | moments.keys(), dict[str, set[str]]()
    for key in saved:
        words = key.removeprefix("optimizer.state.").split(".") if key.startswith("optimizer.state.") else []
        for length in range(1, len(words)):
            if (name := ".".join(words[:length])) in names:
                found.setdefault(name, set()).add(words[length])
    for name in sorted(moments.keys() | (found.keys() & trained)):
        kept, there = set(moments.get(name, ())), found.get(name, set())
        if kept - there or (there - kept and name in trained):
            raise ValueError(f"optimizer must keep for {name} what was saved, {sorted(there) or 'nothing'}, got {sorted(kept) or 'nothing'}")


def _by_first_rank(change: Callable[[], None], path: Path, device: torch.device) -> None:
    """Rank 0 changes a file while the others wait. If it cannot, it raises what came up and the others OSError: they would wait
    for good."""
    failed: Exception | None = None
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        try:
            change()
        except Exception as error:
            failed = error
    if from_first_rank(torch.tensor([failed is not None], dtype=torch.uint8, device=device)).item():
        raise failed or OSError(f"save_sharded: rank 0 cannot write into {path.parent}")
