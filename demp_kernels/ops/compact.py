"""compact: the kept rows and columns of a whole list of tensors, in one call.

    out[i] = sources[i].index_select(0, rows[i]).index_select(1, columns[i])

    sources: tensors with at least one dimension (two where columns are given); any dtype and strides; one device. A
        conv weight's rows are its outputs, its columns its inputs.
    rows, columns: for each tensor a 1-D int64 tensor of indices, or None: all. On the sources' device.
    Returns new tensors; channels_last sources stay channels_last, all others come out contiguous.

compact_: the same within the tensors' own memory. The kept entries of each tensor, in the order of its layout, move to the
front of its memory; what lies behind them is undefined afterwards, and on Linux its pages go back to the system. The CPU's
kernel allocates nothing, so it cannot run out of memory; elsewhere the reference takes one row's worth.

    sources: contiguous or channels_last. rows, columns: ascending.

Neither has a gradient. Equivalent to `reference.compact` and `reference.compact_`.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .activation import dtype_name, shape_text

library = torch.library.Library("demp_kernels", "FRAGMENT")
library.define(
    "compact(Tensor[] sources, Tensor?[] rows, Tensor?[] columns) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)
library.define(
    "compact_(Tensor(a!)[] sources, Tensor?[] rows, Tensor?[] columns) -> ()", tags=(torch.Tag.pt2_compliant_tag,)
)
compact = torch.ops.demp_kernels.compact.default
compact_ = torch.ops.demp_kernels.compact_.default


def check(
    sources: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    columns: Sequence[Tensor | None],
    op: str = "compact",
) -> None:
    """Raise ValueError for the first argument that is wrong. The compiled kernel uses the same words."""
    for name, indices in (("rows", rows), ("columns", columns)):
        if len(indices) != len(sources):
            raise ValueError(f"{op}: {name} must have one entry a source ({len(sources)}), got {len(indices)}")
    for i, source in enumerate(sources):
        needed = 2 if columns[i] is not None else 1
        if source.dim() < needed:
            raise ValueError(
                f"{op}: sources[{i}] must have at least {needed} dimensions, got shape {shape_text(source.shape)}"
            )
        if source.device != sources[0].device:
            raise ValueError(f"{op}: sources[{i}] must be on {sources[0].device} like the first, got {source.device}")
        for name, index in (("rows", rows[i]), ("columns", columns[i])):
            if index is not None and (index.dim() != 1 or index.dtype != torch.int64 or index.device != source.device):
                raise ValueError(
                    f"{op}: {name}[{i}] must be a 1-D int64 tensor on {source.device}, got "
                    f"{dtype_name(index.dtype)} of shape {shape_text(index.shape)} on {index.device}"
                )


def _check_in_place(
    sources: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Sequence[Tensor | None]
) -> None:
    check(sources, rows, columns, "compact_")
    for i, source in enumerate(sources):
        if not source.is_contiguous(memory_format=reference.memory_format(source)):
            raise ValueError(f"compact_: sources[{i}] must be contiguous or channels_last")
        for name, index in (("rows", rows[i]), ("columns", columns[i])):
            if index is not None and not bool((index.diff() > 0).all()):
                raise ValueError(f"compact_: {name}[{i}] must be ascending")


def _reference(
    sources: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Sequence[Tensor | None]
) -> list[Tensor]:
    check(sources, rows, columns)
    return reference.compact(sources, rows, columns)


def _reference_(
    sources: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Sequence[Tensor | None]
) -> None:
    _check_in_place(sources, rows, columns)
    reference.compact_(sources, rows, columns)


def _fake(sources: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Sequence[Tensor | None]) -> list[Tensor]:
    check(sources, rows, columns)
    outputs = []
    for source, row, column in zip(sources, rows, columns):
        shape = list(source.shape)
        for dim, index in enumerate((row, column)):
            if index is not None:
                shape[dim] = index.shape[0]
        outputs.append(source.new_empty(shape).contiguous(memory_format=reference.memory_format(source)))
    return outputs


library.impl("compact", _reference, "CompositeExplicitAutograd")
library.impl("compact_", _reference_, "CompositeExplicitAutograd")
torch.library.register_fake("demp_kernels::compact", _fake, lib=library)
torch.library.register_fake("demp_kernels::compact_", lambda sources, rows, columns: None, lib=library)
