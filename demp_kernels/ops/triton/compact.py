"""compact in Triton; see `demp_kernels/ops/compact.py` for what it computes.

    target[r, a, c, u] = source[rows[r], a, columns[c], u], zero where an index is not one of the source's

for contiguous targets (row, between, column, unit) in units of 1 to 8 bytes: `between` is the taps of a channels_last
weight. A list is one launch for each size of unit in it, through a table of addresses that is copied to the device for
every call; `channel_select` uses the same step without a table.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import reference
from ..activation import shape_text
from ..compact import check
from .launch import LARGE, on_device_of, table_on, wanted_programs

# Tunables: units a program copies in a step, eight a thread of four warps. Chosen so that 4-byte units keep 32 bytes a
# thread in flight; no GPU has timed it yet.
BLOCK = 1024
FIELDS = 10
UNITS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@triton.jit
def gather_step(
    source, target, rows, columns, has_rows, has_columns, source_rows, target_rows, between, source_columns,
    target_columns, column_units, start, BLOCK: tl.constexpr,
):  # fmt: skip
    """Units `start` ... `start` + BLOCK - 1 of one target."""
    row_units = between * target_columns * column_units
    base = start // row_units
    # Within a step 32 bits are enough unless a row is longer, and a 64-bit division takes a hundred instructions.
    rest = (start - base * row_units).to(tl.int32) + tl.arange(0, BLOCK)
    row = rest // row_units.to(tl.int32)
    rest = rest - row * row_units.to(tl.int32)
    place = rest // column_units.to(tl.int32)
    unit = rest - place * column_units.to(tl.int32)
    group = place // target_columns.to(tl.int32)
    column = (place - group * target_columns.to(tl.int32)).to(tl.int64)
    row = base + row
    inside = row < target_rows
    at = row * row_units + rest
    if has_rows:
        row = tl.load(rows + row, mask=inside, other=0)
    if has_columns:
        column = tl.load(columns + column, mask=inside, other=0)
    known = inside & (row >= 0) & (row < source_rows) & (column >= 0) & (column < source_columns)
    kept = tl.load(source + ((row * between + group) * source_columns + column) * column_units + unit, mask=known, other=0)
    tl.store(target + at, kept, mask=inside)


@triton.jit
def _gather_list(table, programs, UNIT: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """Program (i, j): every programs-th step of entry i, from the j-th on."""
    entry = table + tl.program_id(0) * FIELDS
    source = tl.load(entry).to(tl.pointer_type(UNIT))
    target = tl.load(entry + 1).to(tl.pointer_type(UNIT))
    rows = tl.load(entry + 2)
    columns = tl.load(entry + 3)
    source_rows = tl.load(entry + 4)
    target_rows = tl.load(entry + 5)
    between = tl.load(entry + 6)
    source_columns = tl.load(entry + 7)
    target_columns = tl.load(entry + 8)
    column_units = tl.load(entry + 9)
    total = target_rows * between * target_columns * column_units
    for start in range(tl.program_id(1).to(tl.int64) * BLOCK, total, programs * BLOCK):
        gather_step(
            source, target, rows.to(tl.pointer_type(tl.int64)), columns.to(tl.pointer_type(tl.int64)), rows != 0, columns != 0,
            source_rows, target_rows, between, source_columns, target_columns, column_units, start, BLOCK,
        )  # fmt: skip


def compact(sources: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Sequence[Tensor | None]) -> list[Tensor]:
    check(sources, rows, columns)
    targets: list[Tensor] = []
    kept: list[Tensor] = []  # dense copies that the launches read
    tables: dict[int, list[list[int]]] = {unit: [] for unit in UNITS}
    for given, row, column in zip(sources, rows, columns):
        format = reference.memory_format(given)
        last = format != torch.contiguous_format
        source = given if last else given.contiguous()
        indices = [None if index is None else index.contiguous() for index in (row, column)]
        kept += [source, *(index for index in indices if index is not None)]
        shape = list(source.shape)
        for dim, index in enumerate(indices):
            if index is not None:
                shape[dim] = index.numel()
        target = torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=format)
        targets.append(target)
        if target.numel() == 0:
            continue
        inner, size, matrix = math.prod(shape[2:]), source.element_size(), source.dim() > 1
        column_bytes = size if last else inner * size
        unit = unit_of(column_bytes, source, target)
        check_rows(f"compact: sources[{len(targets) - 1}]", given, math.prod(shape[1:]) * size // unit)
        tables[unit].append([
            source.data_ptr(), target.data_ptr(), *(0 if index is None else index.data_ptr() for index in indices),
            source.shape[0], shape[0], inner if last else 1, source.shape[1] if matrix else 1, shape[1] if matrix else 1,
            column_bytes // unit,
        ])  # fmt: skip
    for unit, table in tables.items():
        if not table:
            continue
        steps = max(triton.cdiv(math.prod(entry[i] for i in (5, 6, 8, 9)), BLOCK) for entry in table)
        with on_device_of(sources[0]):
            programs = max(1, min(steps, 2 * wanted_programs(sources[0])))
            entries = table_on(sources[0].device, table)
            _gather_list[(len(table), programs)](entries, programs, UNIT=UNITS[unit], BLOCK=BLOCK, FIELDS=FIELDS)
    return targets


def check_rows(name: str, source: Tensor, row_units: int) -> None:
    """A row's places are 32-bit numbers in `gather_step`. Raises ValueError for a longer one."""
    if row_units >= LARGE:
        raise ValueError(f"{name} has rows too long to index, got shape {shape_text(source.shape)}")


def unit_of(column_bytes: int, *tensors: Tensor) -> int:
    """The largest unit that a column and the tensors' addresses are multiples of."""
    return next(u for u in UNITS if column_bytes % u == 0 and all(t.data_ptr() % u == 0 for t in tensors))
