"""Random tensors for the tests of the ops: every shape, layout and value that a call can come with."""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

EXAMPLES = int(os.environ.get("DEMP_RANDOM_INPUTS", "40"))
"""Inputs a test. More than the default's, and they are others every time."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33)
LONG = (63, 64, 65, 129, 1025, 4097, 40_009)
"""Around the widths of vectors, bytes of bits, blocks, and enough for several threads."""
MOST = 200_000
LAYOUTS = ("contiguous", "channels last", "permuted", "sliced", "offset", "expanded")
VALUES = ("normal", "constant", "denormal", "huge", "special")


@dataclass(frozen=True)
class Recipe:
    """How a tensor is made; small enough to be read where a test fails."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    values: str
    seed: int

    def make(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        generator = torch.Generator().manual_seed(self.seed)
        return in_layout(filled(self.shape, dtype, self.values, generator), self.layout, generator)


@st.composite
def recipes(
    draw: Any, dims: tuple[int, int] = (2, 5), dtypes: Sequence[torch.dtype] = FLOATS, layouts: Sequence[str] = LAYOUTS,
    values: Sequence[str] = VALUES,
) -> Recipe:
    shape = draw(st.lists(st.sampled_from(SIZES), min_size=dims[0], max_size=dims[1]))
    if shape and draw(st.integers(0, 3)) == 0:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from(LONG))
    assume(math.prod(shape) <= MOST)
    return Recipe(
        tuple(shape), draw(st.sampled_from(dtypes)), draw(st.sampled_from(layouts)), draw(st.sampled_from(values)),
        draw(st.integers(0, 2**32 - 1)),
    )


def try_inputs(record_property: Callable[[str, object], None], inputs: st.SearchStrategy, check: Callable[..., None]) -> None:
    """`check` on random `inputs` under random numbers of threads; how many is recorded with the test."""
    tried, threads = 0, torch.get_num_threads()

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize="DEMP_RANDOM_INPUTS" not in os.environ, print_blob=True, database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs, st.sampled_from([1, 2, 5]))
    def one(drawn: tuple, count: int) -> None:
        nonlocal tried
        tried += 1
        torch.set_num_threads(count)
        check(*drawn)

    try:
        one()
    finally:
        torch.set_num_threads(threads)
    record_property("inputs tried", tried)


def filled(shape: Sequence[int], dtype: torch.dtype, values: str, generator: torch.Generator) -> Tensor:
    if not dtype.is_floating_point:
        return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
    limits = torch.finfo(dtype)
    scale = {"denormal": limits.tiny * 0.2, "huge": limits.max / 8}.get(values, 1.0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * scale
    if values == "constant":
        x = torch.full_like(x, float(torch.randn((), generator=generator)))
    if values == "special":
        special = torch.tensor([
            math.nan, math.inf, -math.inf, 0.0, -0.0, limits.tiny, -limits.tiny, limits.tiny * limits.eps, -limits.tiny * limits.eps,
            limits.max, limits.min, -1.0, 30.0, -30.0, -5.5, -9.5, -90.0,
        ], dtype=torch.float64)  # fmt: skip
        chosen = special[torch.randint(len(special), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < 0.3, chosen, x)
    return x.to(dtype)


def in_layout(x: Tensor, layout: str, generator: torch.Generator) -> Tensor:
    """The values of `x` (those of a part, repeated, if expanded) with the strides of a layout."""
    if layout == "channels last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "permuted" and x.dim():
        order = torch.randperm(x.dim(), generator=generator).tolist()
        return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])
    if layout == "sliced":
        wide = x.new_full([2 * size + 1 for size in x.shape], 1)
        part = wide[tuple(slice(1, None, 2) for _ in x.shape)]
        return part.copy_(x)
    if layout == "offset":
        first = int(torch.randint(1, 9, (), generator=generator))
        return x.new_empty(x.numel() + first)[first:].view(x.shape).copy_(x)
    if layout == "expanded" and x.dim() and x.numel():
        dim = int(torch.randint(x.dim(), (), generator=generator))
        return x.narrow(dim, 0, 1).expand(x.shape)
    return x


def bits(x: Tensor) -> Tensor:
    """What lies in memory, so that NaN is equal to itself and -0 is not 0."""
    return torch.empty(x.numel(), dtype=x.dtype).copy_(x.flatten()).view(torch.uint8)


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Equal, whatever the bits of NaN and the sign of zero."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def assert_near(got: Tensor, exact: Tensor, relative: float, absolute: Tensor | float = 0.0) -> None:
    """`got` is the float64 `exact` rounded to its type, within these errors: infinite only where that is too large, NaN where
    that is NaN."""
    limits = torch.finfo(got.dtype)
    value = got.double()
    allowed = (relative + limits.eps) * exact.abs() + absolute + limits.tiny * limits.eps
    right = (value - exact).abs() <= allowed
    right |= (value == exact) | (value.isnan() & exact.isnan())
    right |= value.isinf() & (value.sign() == exact.sign()) & (exact.abs() + allowed >= limits.max)
    assert bool(right.all()), f"{int((~right).sum())} of {right.numel()}: got {value[~right][:5]}, expected {exact[~right][:5]}"
