"""What the launchers share: the device they launch on, and how many programs are worth starting."""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton.language as tl
from torch import Tensor

LARGE = 2**30
"""Counts from here on are indexed with 64 bits: 32 are cheaper, and a stride past the end must not wrap."""


def on_device_of(x: Tensor) -> AbstractContextManager:
    """The device guard: Triton launches on the current device and stream."""
    if x.device.type == "cpu":  # the interpreter
        return nullcontext()
    return torch.get_device_module(x.device).device(x.device)


def wanted_programs(x: Tensor) -> int:
    """Programs that keep x's device busy: eight of four warps a multiprocessor."""
    if x.device.type == "cpu":
        return 4
    properties = torch.get_device_module(x.device).get_device_properties(x.device)
    count = getattr(properties, "multi_processor_count", None) or getattr(properties, "gpu_eu_count", 64)
    return 8 * count


def table_on(device: torch.device, rows: list[list[int]]) -> Tensor:
    """An int64 table on the device. From pinned memory, since a copy from other memory waits for all that was launched."""
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def wide(dtype: torch.dtype) -> tl.dtype:
    """The type that arithmetic is done in."""
    return tl.float64 if dtype == torch.float64 else tl.float32
