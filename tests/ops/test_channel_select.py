"""channel_select: every kernel against the reference, gradients, layouts, bad input."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from demp_kernels import functional, reference
from demp_kernels.ops.channel_select import _reference as fallback
from demp_kernels.ops.channel_select import channel_select

SHAPES = [((2, 9), 1), ((4, 7, 6), -1), ((4, 7, 6), 1), ((3, 8, 4, 5), 1), ((1, 63, 1, 1), 1), ((0, 5, 3, 3), 1),
          ((2, 5, 3, 3, 3), 1), ((3, 4, 5, 6), -1), ((5, 1025), 1), ((16, 33, 31, 31), 1), ((3, 0, 2), 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.complex128]


def maps(channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A map from about as many channels, some missing, in another order; and its inverse."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(channels, generator=generator)[: max(channels - 2, 0)]
    index = torch.cat([index, torch.tensor([-1, -1, -1])])[torch.randperm(index.numel() + 3, generator=generator)]
    inverse = torch.full((channels,), -1)
    inverse[index[index >= 0]] = torch.arange(index.numel())[index >= 0]
    return index, inverse


def layouts(x: Tensor) -> list[Tensor]:
    found = [x, x.transpose(0, 1).contiguous().transpose(0, 1)]
    if x.dim() in (4, 5):
        found.append(x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, dim", SHAPES, ids=str)
def test_values_and_layouts(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    index, inverse = maps(shape[dim])
    for x in layouts(torch.randn(shape).mul(100).to(dtype)):
        y = channel_select(x, index, inverse, dim)
        expected = reference.channel_select(x, index, dim)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        for c, source in enumerate(index.tolist()):
            plane = y.select(dim, c)
            assert torch.equal(plane, x.select(dim, source) if source >= 0 else torch.zeros_like(plane))


def test_a_missing_channel_is_zero_whatever_the_others_hold() -> None:
    for x in layouts(torch.full((2, 3, 2, 2), float("nan"))):
        y = channel_select(x, torch.tensor([-1, 1]), torch.tensor([-1, 1, -1]), 1)
        assert torch.equal(y[:, 0], torch.zeros(2, 2, 2)) and bool(y[:, 1].isnan().all())


@pytest.mark.parametrize("shape, dim", [((2, 5), 1), ((2, 4, 3, 3), 1), ((2, 3, 6), -1)], ids=str)
def test_gradient(shape: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    index, inverse = maps(shape[dim])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: functional.channel_select(x, index, inverse, dim), (x,))
    assert torch.autograd.gradgradcheck(lambda x: functional.channel_select(x, index, inverse, dim), (x,))


def test_opcheck() -> None:
    index, inverse = maps(6)
    for x in layouts(torch.randn(2, 6, 3, 3, requires_grad=True)):
        torch.library.opcheck(channel_select, (x.detach().requires_grad_(), index, inverse, 1))


I6 = torch.arange(6)
BAD = [
    ((torch.ones(2, 6), I6, I6, 2), "channel_select: channel_dim must be a dimension of x of shape (2, 6), got 2"),
    ((torch.ones(2, 6), I6.int(), I6, 1),
     "channel_select: index must be a 1-D int64 tensor on cpu, got int32 of shape (6,) on cpu"),
    ((torch.ones(2, 6), I6, I6.view(2, 3), 1),
     "channel_select: inverse must be a 1-D int64 tensor on cpu, got int64 of shape (2, 3) on cpu"),
    ((torch.ones(2, 5), I6, I6, 1), "channel_select: inverse must have an entry for each of the 5 channels of x, got 6"),
]


@pytest.mark.parametrize("arguments, text", BAD, ids=[text for _, text in BAD])
@pytest.mark.parametrize("backend", [channel_select, fallback], ids=["dispatched", "reference"])
def test_bad_input(backend: object, arguments: tuple, text: str) -> None:
    with pytest.raises((ValueError, RuntimeError)) as error:
        backend(*arguments)
    assert str(error.value).startswith(text)
    with pytest.raises(ValueError) as error:
        functional.channel_select(*arguments)
    assert str(error.value) == text


def test_compiles_without_a_graph_break() -> None:
    index, inverse = maps(6)
    compiled = torch.compile(lambda x: functional.channel_select(x, index, inverse) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 3, 3)
    assert torch.equal(compiled(x), channel_select(x, index, inverse, 1) + 1)
