"""What tells that memory ran out: the CPU's allocator has no type for it, and the compiled kernels allocate through torch's stable
ABI, which makes a RuntimeError of everything: with the allocator's words from torch 2.13 on, before with the failed call alone.
"""
from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_out_of_memory", "raise_out_of_memory"]

_WORDS = re.compile(r"out of memory|allocate memory|bad_alloc|allocate\.h|aten::((new_)?empty|contiguous).*API call failed")


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None)


def raise_out_of_memory(error: Exception, x: Any) -> None:
    """Raises `error` if memory ran out: where it is that of a GPU, which x is on, as the torch.OutOfMemoryError that training
    loops catch."""
    if not is_out_of_memory(error):
        return
    on_gpu = "CUDA out of memory" in str(error) or (isinstance(x, Tensor) and x.is_cuda)
    if on_gpu and not isinstance(error, torch.OutOfMemoryError):
        raise torch.OutOfMemoryError(str(error)) from error
    raise error
