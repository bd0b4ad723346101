"""Weight noise: what it adds to which rows, and what it leaves alone."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from demp_kernels import functional, reference


def test_adds_the_noise_of_the_definition() -> None:
    weight, bias = torch.zeros(5, 3, 2, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    functional.weight_noise_([weight, bias], 0.5, seed=42)
    seed = torch.tensor([42])
    torch.testing.assert_close(weight.view(5, 6), 0.5 * reference.noise(5, 6, 1, seed), rtol=0, atol=2e-6)
    torch.testing.assert_close(bias.view(7, 1), 0.5 * reference.noise(7, 1, 2, seed), rtol=0, atol=2e-6)


def test_dead_rows_stay_as_they_are() -> None:
    weight = torch.randn(6, 4)
    before, live = weight.clone(), torch.tensor([True, False, True, True, False, True])
    functional.weight_noise_([weight], 0.1, [live], 1)
    assert torch.equal(weight[~live], before[~live]) and (weight[live] != before[live]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda t: str(t)[6:])
def test_moments(dtype: torch.dtype) -> None:
    weight = torch.zeros(300, 400, dtype=dtype)
    functional.weight_noise_([weight], 0.25, seed=3)
    z = weight.double() * 4
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n) and abs(z.var() - 1) < 5 * math.sqrt(2 / n) + 1e-3


def test_strides_are_respected() -> None:
    base = torch.zeros(8, 6)
    functional.weight_noise_([base.t()[1:4]], 1.0, seed=0)
    assert not base[:, 0].any() and not base[:, 4:].any() and (base[:, 1:4] != 0).all()


def test_autograd_notices() -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    y = (weight * weight).sum()
    functional.weight_noise_([weight], 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_nothing_to_do() -> None:
    functional.weight_noise_([], 1.0)
    weight = torch.ones(2, 2)
    functional.weight_noise_([weight, torch.zeros(0, 3)], 0.0, seed=1)
    assert torch.equal(weight, torch.ones(2, 2))


def test_opcheck() -> None:
    arguments = ([torch.randn(4, 3), torch.randn(5)], [torch.ones(4, dtype=torch.bool), None], 0.1, torch.tensor([1]))
    torch.library.opcheck(torch.ops.demp_kernels.weight_noise_.default, arguments)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda t: functional.weight_noise_([t], -1.0), "std must be finite and >= 0, got -1"),
        (lambda t: functional.weight_noise_([t], math.inf), "std must be finite and >= 0, got inf"),
        (lambda t: functional.weight_noise_([t], 1.0, []), r"live must have one entry a tensor \(1\), got 0"),
        (lambda t: functional.weight_noise_([t], 1.0, [torch.ones(3)]), r"live\[0\] must be bool of shape \(2,\)"),
        (lambda t: functional.weight_noise_([t, t[0].expand(4, 3)], 1.0),
         r"tensors\[1\] must have memory for each of its elements, got shape \(4, 3\) with strides \(0, 1\)"),
        (lambda t: functional.weight_noise_([t.int()], 1.0), r"tensors\[0\] must be float32.*got int32"),
        (lambda t: functional.weight_noise_([t], 1.0, seed=torch.zeros(1)), "seed must be int64 of shape"),
    ],
)
def test_bad_input_changes_nothing(call: Callable[[Any], Any], text: str) -> None:
    weight = torch.ones(2, 3)
    with pytest.raises(ValueError, match=text):
        call(weight)
    assert torch.equal(weight, torch.ones(2, 3))
