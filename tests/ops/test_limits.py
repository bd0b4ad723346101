"""At the ends of what numbers hold: counts above 2^32 and near 2^62, means far from zero, the limits of 16-bit types, denormals,
variances that overflow, NaN.

Not seen: more than 2^32 elements in the ops that write an output of their own, which would take its memory (their indices are
64-bit integers of the same loops); the GPU's kernels, which have tests of their own for NaN (tests/cuda, tests/triton).
"""
from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import demp_kernels as dk
from demp_kernels import functional, reference
from demp_kernels.ops import activation, backend, norm_act
from demp_kernels.ops.activation import count_

needs_kernels = pytest.mark.skipif("_C" not in backend.loaded, reason=f"no compiled kernels: {backend.reasons.get('_C')}")


# ---- counts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ones() -> Iterator[Any]:
    """ones(n, dtype): as many elements, all 1, over 32 MiB of memory that is mapped again and again."""
    if sys.platform != "linux":
        pytest.skip("maps one piece of memory to many addresses the way Linux does")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_size_t] + [ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    piece, mapped = 32 << 20, []

    def make(count: int, dtype: torch.dtype) -> Tensor:
        file = os.memfd_create("ones")
        os.write(file, torch.ones(piece // dtype.itemsize, dtype=dtype).view(torch.uint8).numpy().tobytes())
        pieces = -(-count * dtype.itemsize // piece)
        none, everything, shared, fixed, private = 0, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, 0x10, mmap.MAP_PRIVATE
        start = libc.mmap(None, pieces * piece, none, private | mmap.MAP_ANONYMOUS | 0x4000, -1, 0)  # 0x4000: no memory behind it
        for i in range(pieces):
            assert libc.mmap(start + i * piece, piece, everything, shared | fixed, file, 0) == start + i * piece
        os.close(file)
        mapped.append((start, pieces * piece))
        storage = torch._C._construct_storage_from_data_pointer(start, torch.device("cpu"), pieces * piece)
        return torch.empty(0, dtype=dtype).set_(storage, 0, (count,), (1,))

    yield make
    for start, size in mapped:
        libc.munmap(start, size)


@needs_kernels
@pytest.mark.parametrize("shape", [(2**31 + 9, 1), (1, 1, 2**31 + 9)], ids=str)
def test_counts_of_more_than_2_to_the_31_elements(ones: Any, shape: tuple[int, ...]) -> None:
    x = ones(math.prod(shape), torch.bfloat16).view(shape)
    expected = torch.full((shape[1],), x.numel() // shape[1])
    counted, seen = torch.full((shape[1],), 2**40), torch.tensor(2**62)
    count_(x, 1, counted, seen)
    assert torch.equal(counted, expected + 2**40) and int(seen) == 2**62 + int(expected[0])
    _, active = functional.relu_(x)  # in place: ones stay ones
    assert torch.equal(active, expected)


@pytest.mark.parametrize("size", [(70_000, 3), (3, 5, 40_000), (2, 1, 200_000), (70_000, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda t: str(t)[6:])
def test_counts_beyond_16_bits(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """The kernels count 16-bit elements in 16-bit lanes, which have to be emptied in time."""
    x = torch.ones(size, dtype=dtype)
    for noise_std in (0.0, 0.5):
        _, active = functional.relu(x, noise_std=noise_std, seed=1)
        assert torch.equal(active, torch.full((size[1],), x.numel() // size[1]))
    counted = torch.full((size[1],), 2**31 - 5)
    count_(x, 1, counted, None)
    assert torch.equal(counted, active + 2**31 - 5)


@pytest.mark.parametrize("size", [(4, 3), (512, 3, 30)], ids=str)  # the short way and the op
def test_counters_of_a_module_near_2_to_the_40(size: tuple[int, ...]) -> None:
    module, x = dk.DemPReLU(), torch.ones(size)
    module(x)
    assert module.active is not None and module.seen is not None
    module.active.fill_(2**40 - 1)
    module.seen.fill_(2**40 - 1)
    module(x)
    per_channel = x.numel() // size[1]
    assert module.active.tolist() == [2**40 - 1 + per_channel] * size[1] and int(module.seen) == 2**40 - 1 + per_channel


# ---- normalisation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [
        (torch.float64, 1e6, 1e-3), (torch.float64, -1e9, 1e-3), (torch.float32, 1e6, 1e-3), (torch.float32, 1e6, 0.1),
        (torch.float32, -3e4, 1e-2), (torch.float32, 1.0, 1e-6), (torch.float32, 0.0, 1e-40), (torch.float64, 0.0, 1e-310),
        (torch.bfloat16, 1e6, 1e4), (torch.bfloat16, 256.0, 1.0), (torch.float16, 2048.0, 1.0), (torch.float16, 6e4, 100.0),
        (torch.float16, 0.0, 1e-7), (torch.float32, 0.0, 1e16), (torch.float64, 0.0, 1e150), (torch.float64, 1e150, 1e140),
    ],
    ids=lambda v: str(v).removeprefix("torch."),
)  # fmt: skip
def test_normalises_what_is_far_from_zero(dtype: torch.dtype, mean: float, std: float, channels_last: bool) -> None:
    """y, and x's gradient, as exact as float64 gives them for these very values of x, whose own rounding may be all of their
    variance (1e6 +- 1e-3 in float32 is 1e6). What they are compared with is computed after `mean` was taken off, exactly."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, 5, 20, 20, dtype=torch.float64, generator=generator) * std + mean).to(dtype)
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    leaf, exact = x.clone(memory_format=torch.preserve_format).requires_grad_(), (x.double() - mean).requires_grad_()
    y, active, got_mean, got_var = functional.norm_act(leaf, activation="silu")
    z = F.batch_norm(exact, None, None, training=True)
    wide_type = torch.float64 if dtype == torch.float64 else torch.float32
    wide, own = torch.finfo(wide_type).eps, torch.finfo(dtype).eps
    var, middle = torch.var_mean(exact.detach(), (0, 2, 3), correction=0)
    middle, least = middle + mean, torch.finfo(wide_type).tiny * wide
    # mean is rounded once, to an ulp of itself, and every difference to it is off by so much of a deviation
    off = float((4 * wide * middle.abs() / (var + 1e-5).sqrt()).max())
    torch.testing.assert_close(got_mean.double(), middle, rtol=2 * wide, atol=8 * wide * std + 64 * least)
    torch.testing.assert_close(got_var.double(), var, rtol=64 * wide, atol=(8 * wide * abs(mean)) ** 2 + 8 * least)
    torch.testing.assert_close(y.double(), F.silu(z.detach()), rtol=own, atol=2 * off + 8e-6 + own)
    assert ((active - (z > 0).sum((0, 2, 3))).abs() <= (z.abs() <= 2 * off + 1e-5).sum((0, 2, 3))).all()

    y.backward(grad)
    F.silu(z).backward(grad.double())
    scale = float(exact.grad.abs().max())
    torch.testing.assert_close(leaf.grad.double() / scale, exact.grad / scale, rtol=2 * own, atol=8 * off + 2e-5 + own)


@pytest.mark.parametrize("kind", ["overflow", "nan", "inf", "-inf"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])
def test_a_channel_that_diverged_is_never_dead(compiled: bool, dtype: torch.dtype, layout: str, kind: str) -> None:
    x = torch.randn(300, 4, dtype=torch.float64) if layout == "rows" else torch.randn(4, 4, 9, 9, dtype=torch.float64)
    if kind == "overflow":  # of the variance: the values themselves are finite
        x[:, 2] *= torch.finfo(dtype).max ** 0.5 * 1e3
    else:
        x[1, 2] = float(kind)
    x = x.to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x
    bias = torch.full((4,), -100.0, dtype=dtype)  # all else is dead
    if compiled:
        y, active, _, var = functional.norm_act(x, None, bias)
    else:
        y, active, _, var, _ = reference.norm_act_forward(x, None, bias, None, "relu", 0.0, 1e-5, 0.0, None)
    assert active.tolist() == [0, 0, x.numel() // 4, 0]
    assert y[:, 2].isnan().all() and var[2].isnan() and not y[:, [0, 1, 3]].any()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda t: str(t)[6:])
def test_one_nan_keeps_a_unit_alive(dtype: torch.dtype, activation: str) -> None:
    x = torch.full((40, 600), -1.0, dtype=dtype)
    x[7, 3], x[39, 599] = math.nan, -math.nan
    for noise_std in (0.0, 0.5):
        seed = torch.tensor([1])
        results = [
            torch.ops.demp_kernels.activation_forward(x, activation, 0.1, 1, noise_std, seed),
            reference.activation_forward(x, activation, 0.1, 1, noise_std, seed),
        ]
        for y, active, _ in results:
            assert active.nonzero().flatten().tolist() == [3, 599] and int(active.sum()) == 2
            assert y[7, 3].isnan() and y[39, 599].isnan()
    counted = torch.zeros(600, dtype=torch.int64)
    count_(x, 1, counted, None)
    assert counted.nonzero().flatten().tolist() == [3, 599]


# ---- memory -----------------------------------------------------------------------------------------------------


def test_memory_that_runs_out_is_no_wrong_argument() -> None:
    with pytest.raises(RuntimeError, match="allocate memory"):
        functional.relu(torch.zeros(1).expand(1 << 24, 1 << 24))  # a PiB, once contiguous: more than there are addresses


CUDA_WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize("text", [f'torch_call_dispatcher("aten::empty_like") API call failed: {CUDA_WORDS}', CUDA_WORDS])
@pytest.mark.parametrize("op", [activation, norm_act])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_of_a_gpu_that_runs_out_has_its_type(op: Any, direction: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels' errors come through torch's stable ABI, which makes a RuntimeError of everything."""
    x = torch.randn(40, 16, 8, 8, requires_grad=True)
    call = functional.relu if op is activation else functional.norm_act
    y = call(x)[0]

    def fails(*_: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(op, direction, fails)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        call(x) if direction == "forward" else y.sum().backward()
