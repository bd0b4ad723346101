"""weight noise: t += std * live[row] * xi over a whole list of tensors, in one call.

    tensors: any shapes and strides, but not expanded, and no two that share memory (pieces of all are written at once); float32,
        bfloat16, float16 or float64; one device. A row is an index along dim 0 (a tensor without dimensions is one row).
    live: for every tensor a (rows,) bool tensor or None: rows that get noise.
    seed: (1,) int64 on the tensors' device.

`xi` are standard normals that depend on the seed, the tensor's place in the list, the row and the column alone
(`reference.noise`), so every backend and thread count draws the same.

Equivalent to `reference.weight_noise_`. It has no gradient: call it under `torch.no_grad()`.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .activation import DTYPES, dtype_name, shape_text

library = torch.library.Library("demp_kernels", "FRAGMENT")
library.define(
    "weight_noise_(Tensor(a!)[] tensors, Tensor?[] live, float std, Tensor seed) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
weight_noise_ = torch.ops.demp_kernels.weight_noise_.default


def check(tensors: Sequence[Tensor], live: Sequence[Tensor | None], std: float, seed: Tensor) -> None:
    """Raise ValueError for the first argument that is wrong. The compiled kernels use the same words."""
    if not (std >= 0 and math.isfinite(std)):
        raise ValueError(f"weight_noise_: std must be finite and >= 0, got {std:g}")
    if len(live) != len(tensors):
        raise ValueError(f"weight_noise_: live must have one entry a tensor ({len(tensors)}), got {len(live)}")
    device = tensors[0].device if tensors else seed.device
    if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != device:
        raise ValueError(
            f"weight_noise_: seed must be int64 of shape (1,) on {device}, got {dtype_name(seed.dtype)} of shape "
            f"{shape_text(seed.shape)} on {seed.device}"
        )
    for i, (t, rows) in enumerate(zip(tensors, live)):
        if t.dtype not in DTYPES:
            raise ValueError(
                f"weight_noise_: tensors[{i}] must be float32, bfloat16, float16 or float64, got {dtype_name(t.dtype)}"
            )
        if t.device != device:
            raise ValueError(f"weight_noise_: tensors[{i}] must be on {device} like the first, got {t.device}")
        if t.layout == torch.strided and t.numel() and any(step == 0 and size > 1 for size, step in zip(t.shape, t.stride())):
            raise ValueError(
                f"weight_noise_: tensors[{i}] must have memory for each of its elements, got shape {shape_text(t.shape)} with "
                f"strides {shape_text(t.stride())}"
            )
        count = t.shape[0] if t.dim() else 1
        if rows is not None and (rows.dtype != torch.bool or rows.shape != (count,) or rows.device != device):
            raise ValueError(
                f"weight_noise_: live[{i}] must be bool of shape ({count},) on {device}, got {dtype_name(rows.dtype)} "
                f"of shape {shape_text(rows.shape)} on {rows.device}"
            )


def _reference(tensors: Sequence[Tensor], live: Sequence[Tensor | None], std: float, seed: Tensor) -> None:
    check(tensors, live, std, seed)
    reference.weight_noise_(tensors, live, std, seed)


library.impl("weight_noise_", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("demp_kernels::weight_noise_", check, lib=library)
