"""The same call gives the same bits, on any number of threads the same counts and the same noise.

Not the same on another number of threads: norm_act's sums over a channel, which are added up in another order. Its statistics and
gradients may differ in the last bits, and so may y, and a count where z is zero but for rounding (test_norm_act.py).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from demp_kernels import functional
from demp_kernels.ops.activation import count_

THREADS = (1, 2, 5)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def image(layout: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Large enough for several shares of work, and no multiple of anything."""
    shape = (40_009, 67) if layout == "rows" else (7, 33, 61, 59)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x


def activation(name: str, x: Tensor) -> list[Tensor]:
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y, active = getattr(functional, name)(leaf, noise_std=0.4, seed=9)
    y.backward(x)
    counted = torch.full_like(active, 2**40)
    count_(x, 1, counted, None)
    return [y.detach(), active, leaf.grad, counted]


def norm_act(x: Tensor) -> list[Tensor]:
    channels = x.shape[1]
    leaves = [x.clone(memory_format=torch.preserve_format), torch.linspace(-1, 1, channels), torch.linspace(1, -1, channels), x * 0.5]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y, active, mean, var = functional.norm_act(*leaves, noise_std=0.4, seed=9)
    y.backward(x)
    return [y.detach(), active, mean, var, *(leaf.grad for leaf in leaves)]


def weight_noise(x: Tensor) -> list[Tensor]:
    tensors = [x.clone(memory_format=torch.preserve_format), torch.zeros(3), x.flatten()[1::2].clone()]
    functional.weight_noise_(tensors, 0.1, [torch.arange(len(x)) % 3 > 0, None, None], seed=5)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("layout", ["rows", "planes", "channels last"])
@pytest.mark.parametrize("op", ["relu", "leaky_relu", "silu", "weight noise"])
def test_the_same_bits_on_any_number_of_threads(threads: Callable[[int], None], op: str, layout: str, dtype: torch.dtype) -> None:
    x, results = image(layout, dtype), []
    for count in (*THREADS, THREADS[-1]):
        threads(count)
        results.append(weight_noise(x) if op == "weight noise" else activation(op, x))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("layout", ["rows", "planes", "channels last"])
def test_norm_act_has_the_same_bits_on_one_number_of_threads(threads: Callable[[int], None], layout: str) -> None:
    x = image(layout)
    for count in THREADS:
        threads(count)
        first = norm_act(x)
        assert all(torch.equal(a, b) for a, b in zip(first, norm_act(x)))
