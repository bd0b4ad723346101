"""Ranks of a data-parallel run agree on what is dead, draw the same noise, and get a wrapper that fits the smaller model.

Every function does nothing in a process that is not part of a group.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "any_rank", "every_rank", "forget_compiled", "from_first_rank", "is_compiled", "is_distributed", "largest_over_ranks",
    "mean_over_ranks", "refit_wrappers", "require_all_ranks", "sum_counters", "to_first_rank", "unwrap",
]


MODULE_HOOKS = tuple(name for name in vars(nn.Module()) if "_hook" in name)
"""Attributes in which a module keeps the hooks that were registered on it, and of which kind they are."""


NEWER_ARGUMENTS = ("skip_all_reduce_unused_params", "batched_grad_copy")
"""Arguments of DistributedDataParallel, and its attributes, in the newer ones of the supported torch releases."""


POWER_SGD = ("error_dict", "p_memory_dict", "q_memory_dict")
"""What the state of DDP's PowerSGD hook keeps for each bucket, in the bucket's length."""


def is_distributed() -> bool:
    """Whether this process is one of several in a group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_first_rank(value: Tensor) -> Tensor:
    """Rank 0's value on every rank."""
    if is_distributed():
        dist.broadcast(value, src=0)
    return value


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a scalar over the ranks, on every rank."""
    if not is_distributed():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def largest_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each of some numbers over the ranks, the same on every rank to the last bit, in one collective."""
    if not is_distributed():
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def any_rank(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """name -> bool mask, True where it is True on any rank. One collective for all masks."""
    return _reduce_masks(masks, dist.ReduceOp.MAX) if is_distributed() else masks


def every_rank(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """name -> bool mask, True where it is True on all ranks."""
    return _reduce_masks(masks, dist.ReduceOp.MIN) if is_distributed() else masks


def sum_counters(counters: list[Tensor]) -> None:
    """Replace each tensor, all of one dtype, by its sum over the ranks. One collective for all of them."""
    if not is_distributed() or not counters:
        return
    flat = torch.cat([c.flatten().to(counters[0].device) for c in counters])
    dist.all_reduce(flat)
    for counter, total in zip(counters, flat.split([c.numel() for c in counters])):
        counter.copy_(total.view_as(counter))


def to_first_rank(counters: list[Tensor]) -> None:
    """In a group: give rank 0 the sums over the ranks, and the others zeros, so that the sums over the ranks stay the same."""
    sum_counters(counters)
    if counters and dist.get_rank():
        torch._foreach_zero_(counters)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and DistributedDataParallel's wrappers, or the model itself."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def require_all_ranks(model: nn.Module) -> None:
    """Raises ValueError for a DistributedDataParallel over some of the ranks only: decisions are taken by all of them."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, DistributedDataParallel) and (some := dist.get_world_size(model.process_group)) != dist.get_world_size():
        raise ValueError(
            f"model must be in DistributedDataParallel over all {dist.get_world_size()} ranks, got a process_group of {some}"
        )


def forget_compiled(model: nn.Module) -> None:
    """Drop torch.compile's code if it compiled this model, whose shapes have changed for good.

    The code fits widths that will not come back, but would count towards the limit of recompilations
    (`torch._dynamo.config.recompile_limit`, 8), beyond which the compiler runs a model as it is and says so only in a log.
    Everything else that was compiled in this process is compiled again too.
    """
    if is_compiled(model):
        torch.compiler.reset()


def is_compiled(model: nn.Module) -> bool:
    """Whether there is a wrapper of torch.compile around the model, or it was compiled by its own method."""
    inner = unwrap(model)
    while model is not inner:
        if hasattr(model, "_orig_mod"):
            return True
        model = model.get_submodule("module")
    return inner._compiled_call_impl is not None


def refit_wrappers(model: nn.Module) -> None:
    """Make what is around a model fit its new shapes: DistributedDataParallel, and torch.compile's code."""
    _rebuild_data_parallel(model)
    forget_compiled(model)


def _rebuild_data_parallel(model: nn.Module) -> None:
    """Make a DistributedDataParallel object fit its module's new shapes, in place; other models are left alone.

    The reducer was built for the old shapes: its buckets and its hooks on the gradients are replaced by initialising
    the same object again with the arguments it was made with, so that the caller's variable stays the model.
    """
    if not isinstance(model, DistributedDataParallel):
        model = getattr(model, "_orig_mod", model)
    if not isinstance(model, DistributedDataParallel):
        return
    # torch 2.14 has a new name for it, and warns of the old one
    buffers = "forward_sync_buffers" if hasattr(model, "forward_sync_buffers") else "broadcast_buffers"
    arguments: dict[str, Any] = {
        "device_ids": model.device_ids,
        "output_device": model.output_device,
        "dim": model.dim,
        buffers: getattr(model, buffers),
        "process_group": model.process_group,
        # given, even the default keeps DDP from making its first bucket small, so that the exchange begins early
        "bucket_cap_mb": None if getattr(model, "bucket_bytes_cap_default", False) else model.bucket_bytes_cap / (1024 * 1024),
        "find_unused_parameters": model.find_unused_parameters,
        "gradient_as_bucket_view": model.gradient_as_bucket_view,
        "static_graph": model.static_graph,
        "mixed_precision": model.mixed_precision,
        "init_sync": False,  # all ranks removed the same entries of the same tensors
        **{name: getattr(model, name) for name in NEWER_ARGUMENTS if hasattr(model, name)},
    }
    if caps := getattr(model, "bucket_bytes_cap_list", None):
        arguments["bucket_cap_mb_list"] = [cap / (1024 * 1024) for cap in caps]
    training, module = model.training, model.module
    communication: list[tuple[Any, Any]] = list(model._comm_hooks)
    hooks = {name: value for name, value in vars(model).items() if name in MODULE_HOOKS}
    del model.reducer
    DistributedDataParallel.__init__(model, module, **arguments)
    model.training = training
    vars(model).update(hooks)
    for hook, state in communication:
        if isinstance(getattr(state, "error_dict", None), dict):
            for kept in POWER_SGD:
                getattr(state, kept).clear()
            state.iter = 0  # it compresses from start_powerSGD_iter on: the first steps have other buckets
        model.register_comm_hook(state, hook)


def _reduce_masks(masks: dict[str, Tensor], operation: Any) -> dict[str, Tensor]:
    if not masks:
        return masks
    first = next(iter(masks.values())).device
    flat = torch.cat([mask.to(first) for mask in masks.values()]).to(torch.uint8)
    dist.all_reduce(flat, op=operation)
    parts = flat.bool().split([m.numel() for m in masks.values()])
    return {name: part.to(masks[name].device) for name, part in zip(masks, parts)}
