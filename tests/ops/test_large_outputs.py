"""Outputs of several MiB, which the CPU kernels write past the caches: the same values as everywhere else."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from demp_kernels import functional

SHAPES = {
    "nchw": (16, 64, 32, 36), "channels_last": (16, 64, 32, 36), "odd channels, last": (33, 37, 31, 31),
    "odd planes": (33, 37, 31, 31), "nc": (2048, 576),
}
DTYPES = [torch.float32, torch.bfloat16]


def image(layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    shape = SHAPES[layout]
    copies = 2 if dtype == torch.bfloat16 else 1  # as many bytes
    x = torch.randn(copies * shape[0], *shape[1:], generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if "last" in layout else x


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("layout", SHAPES)
def test_relu(layout: str, dtype: torch.dtype) -> None:
    x, grad = image(layout, dtype, 0).requires_grad_(), image(layout, dtype, 1)
    others = [d for d in range(x.dim()) if d != 1]
    for noise in (0.0, 0.1):
        y, active = functional.relu(x, noise_std=noise, seed=3)
        (found,) = torch.autograd.grad(y, x, grad)
        in_place, _ = functional.relu_(x.detach().clone(), noise_std=noise, seed=3)
        assert torch.equal(y, in_place) and (noise or torch.equal(y, F.relu(x)))
        assert torch.equal(active, (x > 0).sum(others))
        assert torch.equal(found, torch.where(x > 0, grad, 0)) and found.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("layout", SHAPES)
def test_norm_act(layout: str, dtype: torch.dtype) -> None:
    x, grad, residual = (image(layout, dtype, seed) for seed in range(3))
    leaves = [x, residual, torch.rand(x.shape[1]) + 0.5, torch.randn(x.shape[1])]
    ours, exact = ([t.clone().to(d or t.dtype).requires_grad_() for t in leaves] for d in (None, torch.float64))
    y, active, *_ = functional.norm_act(ours[0], ours[2], ours[3], ours[1])
    z = F.batch_norm(exact[0], None, None, exact[2], exact[3], training=True) + exact[1]
    rounding = {torch.float32: 2e-5, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(y.double(), F.relu(z), rtol=rounding, atol=4 * rounding)
    assert torch.equal(active, (y > 0).sum([d for d in range(x.dim()) if d != 1]))
    live = (y > 0).double()  # the same side of the kink for both, where z is all but zero
    found = torch.autograd.grad(y, ours, grad)
    wanted = torch.autograd.grad(z, exact, grad.double() * live)
    for one, other in zip(found, wanted):
        scale = float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=rounding, atol=rounding * scale)
