"""compact: every kernel against the reference, all layouts and element sizes, awkward shapes, bad input."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from demp_kernels import reference
from demp_kernels.ops.compact import _reference as fallback
from demp_kernels.ops.compact import _reference_ as fallback_
from demp_kernels.ops.compact import compact, compact_

SHAPES = [(1,), (7,), (0,), (5, 9), (1, 1), (63, 1025), (0, 4), (4, 0), (4, 6, 3), (4, 6, 3, 3), (8, 16, 1, 1),
          (33, 17, 5, 5), (3, 4, 2, 3, 3), (2, 300, 7, 7)]
I2, I4 = torch.tensor([0, 1]), torch.tensor([0], dtype=torch.int32)
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.complex128, torch.bool]


def layouts(x: Tensor) -> list[Tensor]:
    """x contiguous, channels_last, transposed in memory, and as a slice of something larger."""
    found = [x]
    if x.dim() in (4, 5):
        found.append(x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d))
    if x.dim() >= 2:
        found.append(x.transpose(0, 1).contiguous().transpose(0, 1))
        found.append(torch.cat([x, x], 1)[:, : x.shape[1]])
    return found


def indices(size: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(size)
    some = torch.randperm(size, generator=generator)[: (size + 1) // 2].sort().values
    return [None, some, torch.empty(0, dtype=torch.int64), torch.arange(size).flip(0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_and_index(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).mul(100).to(dtype)
    jobs = [
        (source, rows, columns)
        for source in layouts(x)
        for rows in indices(shape[0])
        for columns in (indices(shape[1]) if len(shape) > 1 else [None])
    ]
    found = compact(*map(list, zip(*jobs)))
    for (source, rows, columns), out in zip(jobs, found):
        expected = source if rows is None else source.index_select(0, rows)
        expected = expected if columns is None else expected.index_select(1, columns)
        assert torch.equal(out, expected) and out.dtype == dtype
        assert out.is_contiguous(memory_format=reference.memory_format(source))
        assert out.untyped_storage().data_ptr() != source.untyped_storage().data_ptr() or not out.numel()


def test_large_tensors_are_shared_out_among_threads() -> None:
    x = torch.randn(700, 513, 3, 3)
    rows, columns = torch.arange(0, 700, 3), torch.arange(513)[torch.arange(513) % 5 != 1]
    for source in layouts(x):
        (out,) = compact([source], [rows], [columns])
        assert torch.equal(out, source[rows][:, columns])


@pytest.mark.parametrize("backend", [compact_, fallback_], ids=["dispatched", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place_the_kept_entries_come_to_the_front(shape: tuple[int, ...], dtype: torch.dtype, backend: object) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    jobs = [
        (source.clone(), rows, columns)
        for source in layouts(x)[: 2 if x.dim() in (4, 5) else 1]
        for rows in indices(shape[0])[:3]
        for columns in (indices(shape[1])[:3] if len(shape) > 1 else [None])
    ]
    wanted = reference.compact(*map(list, zip(*jobs)))
    backend(*map(list, zip(*jobs)))
    for (source, _, _), out in zip(jobs, wanted):
        assert torch.equal(source.as_strided(out.shape, out.stride()), out)


@pytest.mark.parametrize("step", [2, 5])
def test_in_place_on_large_tensors(step: int) -> None:
    rows, columns = torch.arange(0, 700, step), torch.arange(513)[torch.arange(513) % step != 1]
    sources = [torch.randn(700, 513, 3, 3), torch.randn(700, 513, 1, 1), torch.randn(700, 513).half()]
    sources.append(sources[0].contiguous(memory_format=torch.channels_last))
    wanted = reference.compact(sources, [rows] * 4, [columns] * 4)
    compact_(sources, [rows] * 4, [columns] * 4)
    for source, out in zip(sources, wanted):
        assert torch.equal(source.as_strided(out.shape, out.stride()), out)


def test_in_place_refuses() -> None:
    for source, rows, text in [
        (torch.ones(3, 4).t(), I2, r"compact_: sources\[0\] must be contiguous or channels_last"),
        (torch.ones(3, 4), I2.flip(0), r"compact_: rows\[0\] must be ascending"),
        (torch.ones(3, 4), I4, r"compact_: rows\[0\] must be a 1-D int64 tensor on cpu"),
    ]:
        for backend in (compact_, fallback_):
            with pytest.raises((ValueError, RuntimeError), match=text):
                backend([source], [rows], [None])


def test_an_index_may_be_a_strided_view() -> None:
    (out,) = compact([torch.arange(10.0)], [torch.arange(10)[::3]], [None])
    assert out.tolist() == [0, 3, 6, 9]


def test_opcheck() -> None:
    x, rows = torch.randn(4, 6, 3, 3), torch.tensor([0, 2])
    torch.library.opcheck(compact_, ([x.clone()], [rows], [rows]))
    torch.library.opcheck(compact, ([x, x.contiguous(memory_format=torch.channels_last)], [rows, None], [None, rows]))


BAD = [
    (([torch.ones(3)], [], [None]), "compact: rows must have one entry a source (1), got 0"),
    (([torch.ones(3)], [None], [None, None]), "compact: columns must have one entry a source (1), got 2"),
    (([torch.ones(3)], [None], [I2]), "compact: sources[0] must have at least 2 dimensions, got shape (3,)"),
    (
        ([torch.ones(3), torch.ones(3, device="meta")], [I2, None], [None, None]),
        "compact: sources[1] must be on cpu like the first, got meta",
    ),
    (([torch.ones(())], [I2], [None]), "compact: sources[0] must have at least 1 dimensions, got shape ()"),
    (([torch.ones(3)], [I4], [None]), "compact: rows[0] must be a 1-D int64 tensor on cpu, got int32 of shape (1,) on cpu"),
    (([torch.ones(2, 2)], [None], [I2.view(1, 2)]),
     "compact: columns[0] must be a 1-D int64 tensor on cpu, got int64 of shape (1, 2) on cpu"),
]


@pytest.mark.parametrize("arguments, text", BAD, ids=[text for _, text in BAD])
@pytest.mark.parametrize("backend", [compact, fallback], ids=["dispatched", "reference"])
def test_bad_input(backend: object, arguments: tuple, text: str) -> None:
    with pytest.raises((ValueError, RuntimeError)) as error:
        backend(*copy.copy(arguments))
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("index", [[5], [-1]])
def test_an_index_out_of_range_is_refused(index: list[int]) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        compact([torch.ones(3)], [torch.tensor(index)], [None])
