"""weight noise in Triton; see `demp_kernels/ops/weight_noise.py` for what it computes.

A list of tensors is one launch for each dtype in it. The kernel finds the tensors through a table of addresses, which is
copied to the device for every call: unlike the native kernel's, such a launch cannot be captured in a CUDA graph.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import is_dense
from ..weight_noise import check
from .launch import on_device_of, table_on, wanted_programs, wide
from .noise import normals

# Tunables: a program's step, quads of four rows (which share a Philox call) times one column. 512 give four warps 16
# elements a thread. Chosen by that reasoning; no GPU has timed it yet.
ITEMS = 512
FIELDS = 6


@triton.jit
def _add(table, seed, std, programs, DTYPE: tl.constexpr, WIDE: tl.constexpr, ITEMS: tl.constexpr, FIELDS: tl.constexpr):
    """Program (i, j): every programs-th step of tensor i, from the j-th on."""
    entry = table + tl.program_id(0) * FIELDS
    data = tl.load(entry).to(tl.pointer_type(DTYPE))
    live_address = tl.load(entry + 1)
    rows = tl.load(entry + 2)
    columns = tl.load(entry + 3)
    taps = tl.load(entry + 4)  # memory columns are (taps, columns / taps), logical ones (columns / taps, taps)
    stream = tl.load(entry + 5).to(tl.uint32)
    key = tl.load(seed)
    std = tl.full((), std, WIDE)
    items = (rows + 3) // 4 * columns
    channels = columns // taps
    for start in range(tl.program_id(1).to(tl.int64) * ITEMS, items, programs * ITEMS):
        item = start + tl.arange(0, ITEMS)
        quad = item // columns
        column = item - quad * columns
        tap = column // channels
        logical = (column - tap * channels) * taps + tap
        z0, z1, z2, z3 = normals(quad, logical, stream, key)
        for m in tl.static_range(4):
            row = quad * 4 + m
            wanted = row < rows
            if live_address != 0:
                wanted = wanted & (tl.load(live_address.to(tl.pointer_type(tl.uint8)) + row, mask=wanted, other=0) != 0)
            at = data + row * columns + column
            z = z0 if m == 0 else (z1 if m == 1 else (z2 if m == 2 else z3))
            value = tl.load(at, mask=wanted, other=0.0).to(WIDE) + std * z.to(WIDE)
            tl.store(at, value.to(DTYPE), mask=wanted)


_DTYPES = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip


def weight_noise_(tensors: Sequence[Tensor], live: Sequence[Tensor | None], std: float, seed: Tensor) -> None:
    check(tensors, live, std, seed)
    if std == 0:
        return
    dense = [t if is_dense(t) else t.contiguous() for t in tensors]
    live = [None if rows is None else rows.contiguous() for rows in live]
    with on_device_of(seed):
        for dtype in _DTYPES:
            table, items = [], 0
            for i, (t, rows) in enumerate(zip(dense, live)):
                if t.dtype != dtype or t.numel() == 0:
                    continue
                count = t.shape[0] if t.dim() else 1
                columns = t.numel() // count
                taps = 1 if t.is_contiguous() else columns // t.shape[1]
                table.append([t.data_ptr(), 0 if rows is None else rows.data_ptr(), count, columns, taps, 1 + i])
                items = max(items, (count + 3) // 4 * columns)
            if not table:
                continue
            programs = max(1, min(triton.cdiv(items, ITEMS), 2 * wanted_programs(seed)))
            _add[(len(table), programs)](
                table_on(seed.device, table), seed, float(std), programs,
                DTYPE=_DTYPES[dtype], WIDE=wide(dtype), ITEMS=ITEMS, FIELDS=FIELDS,
            )
    for t, copy in zip(tensors, dense):
        if copy is not t:
            t.copy_(copy)
