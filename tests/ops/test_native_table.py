"""The compiled CPU kernels through the table of every implementation, and what only they have: threads and free memory."""
from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_table import (  # noqa: F401
    ACTIVATIONS,
    CASES,
    DTYPES,
    STD,
    sample,
    seed_tensor,
    test_activation,
    test_activation_float64,
    test_activation_noise_does_not_depend_on_layout_or_seed_sign,
    test_activation_refuses,
    test_channel_select,
    test_compact,
    test_compact_over_a_long_list,
    test_compact_refuses,
    test_relu_of_infinity,
    test_weight_noise,
    test_weight_noise_over_a_long_list,
    test_weight_noise_refuses,
)

from demp_kernels import reference
from demp_kernels.ops import activation, backend

pytestmark = pytest.mark.skipif("_C" not in backend.loaded, reason=f"no compiled kernels: {backend.reasons.get('_C')}")


@pytest.fixture(scope="module")
def ops() -> Any:
    names = (
        "activation_forward", "activation_forward_", "activation_backward", "activation_count_", "weight_noise_",
        "compact", "channel_select",
    )
    # 4 ulp of the largest normal there can be (5.8)
    extra = {"device": "cpu", "normals": 4 * 5.8 * 2**-24, "long_list": 300}
    return SimpleNamespace(**{name: getattr(torch.ops.demp_kernels, name).default for name in names}, **extra)


def big(case: str) -> torch.Tensor:
    """Large enough for several shares of work, and no multiple of anything."""
    shapes = {"planes": (7, 33, 61, 59), "rows": (40_009, 67), "channels last": (7, 33, 61, 59), "narrow": (150_001, 3)}
    x = torch.randn(shapes[case], generator=torch.Generator().manual_seed(3))
    return x.to(memory_format=torch.channels_last) if case == "channels last" else x


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("noise_std", [0.0, STD], ids=["plain", "noise"])
@pytest.mark.parametrize("case", ["planes", "rows", "channels last", "narrow"])
def test_threads_change_nothing(ops: Any, threads: Any, case: str, noise_std: float) -> None:
    x = big(case)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(ops.activation_forward(x, "relu", 0.0, 1, noise_std, seed_tensor(ops) if noise_std else None))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert torch.equal(results[0][1], (x > 0).transpose(0, 1).flatten(1).sum(1))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("case", CASES)
def test_counting_alone(ops: Any, case: str, dtype: torch.dtype) -> None:
    """On the CPU only. It adds to what is there, as the reference does."""
    x, channel_dim = sample(ops, case, dtype)
    got, wanted = ([torch.arange(x.shape[channel_dim]), torch.tensor(5)] for _ in range(2))
    ops.activation_count_(x, channel_dim, *got)
    reference.activation_count_(x, channel_dim, *wanted)
    assert all(map(torch.equal, got, wanted))
    ops.activation_count_(x, channel_dim, got[0], None)
    assert torch.equal(got[0], 2 * wanted[0] - torch.arange(x.shape[channel_dim])) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("case", ["planes", "rows", "channels last", "narrow"])
def test_counting_alone_over_many_blocks(ops: Any, case: str) -> None:
    x = big(case)
    active = torch.zeros(x.shape[1], dtype=torch.int64)
    ops.activation_count_(x, 1, active, None)
    assert torch.equal(active, (x > 0).transpose(0, 1).flatten(1).sum(1))


@pytest.mark.parametrize(("active", "seen", "words"), [
    (torch.zeros(3), None, "active must be contiguous int64 of shape (3,), got float32 of shape (3,)"),
    (torch.zeros(4, dtype=torch.int64), None, "active must be contiguous int64 of shape (3,), got int64 of shape (4,)"),
    (torch.zeros(6, dtype=torch.int64)[::2], None, "active must be contiguous int64 of shape (3,)"),
    (torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), "seen must be int64 of shape (), got int64 of shape (1,)"),
])  # fmt: skip
def test_counting_alone_refuses(ops: Any, active: torch.Tensor, seen: torch.Tensor | None, words: str) -> None:
    for check in (ops.activation_count_, activation.check_count_):
        with pytest.raises((ValueError, RuntimeError), match=re.escape(words)):
            check(torch.ones(2, 3), 1, active, seen)
    assert not active.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", ["planes", "rows", "channels last"])
def test_large_tensors_over_poisoned_memory(ops: Any, case: str, activation: str) -> None:
    """The outputs come from memory that held NaN: an element that is not written shows."""
    x = big(case)
    slope = ACTIVATIONS[activation]
    expected, count, _ = reference.activation_forward(x.double(), activation, slope, 1, 0.0, None)
    for _ in range(3):
        torch.full_like(x, math.nan)
    y, active, _ = ops.activation_forward(x, activation, slope, 1, 0.0, None)
    assert torch.equal(active, count)
    # 1 + tanh(u) cancels where gelu_tanh goes to zero: an absolute error of a few ulp of x
    torch.testing.assert_close(y.double(), expected, rtol=4e-6, atol=2e-6)


def test_weight_noise_does_not_depend_on_threads_or_layout(ops: Any, threads: Any) -> None:
    results = []
    for count, layout in [(1, torch.contiguous_format), (4, torch.contiguous_format), (3, torch.channels_last)]:
        threads(count)
        t = torch.zeros(129, 65, 3, 3).to(memory_format=layout)
        ops.weight_noise_([torch.zeros(3), t], [None, None], 1.0, seed_tensor(ops))
        results.append(t.contiguous())
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=ops.normals)


def test_noise_is_standard_normal(ops: Any) -> None:
    stats = pytest.importorskip("scipy.stats")
    x = torch.ones(1, 8, 250, 500)
    y, active, _ = ops.activation_forward(x, "relu", 0.0, 1, 1.0, seed_tensor(ops))
    z = (y - 1).double().flatten()
    assert torch.equal(active, torch.full((8,), 125_000))
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n) and abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n) and abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
    lags = [abs((z[:-k] * z[k:]).mean()) for k in (1, 2, 3, 4, 500)]
    assert max(lags) < 5 / math.sqrt(n)


def test_normals_agree_with_float64(ops: Any) -> None:
    """Every pair of Box-Muller inputs that matters: the polynomials stay within `ops.normals` of the exact values."""
    x = torch.ones(1, 3, 1000, 300)
    y, _, _ = ops.activation_forward(x.double(), "relu", 0.0, 1, 1.0, seed_tensor(ops))
    exact, _, _ = reference.activation_forward(x.double(), "relu", 0.0, 1, 1.0, seed_tensor(ops))
    assert (y - exact).abs().max() < ops.normals
