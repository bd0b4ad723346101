"""norm_act: every backend against float64 and PyTorch's own batch normalisation, counts exact, autograd, bad input."""
from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from demp_kernels import functional, reference
from demp_kernels.ops import backend

ACTIVATIONS = {"relu": 0.0, "leaky_relu": 0.1, "gelu": 0.0, "gelu_tanh": 0.0, "silu": 0.0}
SHAPES: dict[str, tuple[tuple[int, ...], bool]] = {
    "planes": ((3, 5, 9, 7), False),
    "channels last": ((3, 5, 9, 7), True),
    "channels last, 64": ((2, 64, 6, 6), True),
    "wide planes": ((2, 3, 33, 35), False),
    "linear": ((63, 17), False),
    "one plane": ((1, 1, 5, 5), False),
    "channels last 3d": ((2, 7, 3, 2, 4), True),
    "large": ((16, 24, 28, 28), False),
    "large, channels last": ((16, 24, 28, 28), True),
}
ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def native() -> Any:
    forward, backward = torch.ops.demp_kernels.norm_act_forward.default, torch.ops.demp_kernels.norm_act_backward.default
    return SimpleNamespace(forward=forward, backward=backward)


BACKENDS = {
    "reference": SimpleNamespace(forward=reference.norm_act_forward, backward=reference.norm_act_backward),
    "native": native(),
}


@pytest.fixture(params=sorted(BACKENDS))
def ops(request: pytest.FixtureRequest) -> Any:
    if request.param == "native" and "_C" not in backend.loaded:
        pytest.skip(f"no compiled kernels: {backend.reasons.get('_C')}")
    return BACKENDS[request.param]


def sample(shape: str, dtype: torch.dtype, with_residual: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    sizes, channels_last = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(shape))

    def image(scale: float = 1.0, shift: float = 0.0) -> Tensor:
        x = (torch.randn(sizes, generator=generator) * scale + shift).to(dtype)
        if channels_last:
            x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        return x

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.randn(sizes[1], generator=generator).to(wide) for _ in range(2))
    return image(2.0, 0.7), weight, bias, image() if with_residual else None, image()


def composed(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """(pre-activation, output) by PyTorch in float64."""
    z = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), training=True)
    z = z if residual is None else z + residual.double()
    functions = {
        "relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.1), "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu,
    }
    return z, functions[activation](z)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(ops: Any, shape: str, dtype: torch.dtype, activation: str, with_residual: bool) -> None:
    x, weight, bias, residual, grad = sample(shape, dtype, with_residual)
    torch.full_like(x, math.nan)  # what the outputs' memory may hold
    arguments = (activation, ACTIVATIONS[activation])
    y, active, mean, var, mask = ops.forward(x, weight, bias, residual, *arguments, 1e-5, 0.0, None)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    z, expected = composed(*leaves[:3], leaves[3] if with_residual else None, activation)
    rounding = ROUNDING[dtype]
    assert y.dtype == dtype and y.stride() == x.stride()
    torch.testing.assert_close(y.double(), expected.detach(), rtol=rounding, atol=4 * rounding)
    others = [d for d in range(x.dim()) if d != 1]
    torch.testing.assert_close(mean.double(), x.double().mean(others), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), x.double().var(others, unbiased=False), rtol=1e-5, atol=1e-6)
    # a count may differ from float64's only where rounding decides the sign
    unsure = (z.detach().abs() < 20 * rounding).sum(others)
    assert ((active - (z > 0).sum(others)).abs() <= unsure).all() and active.dtype == torch.int64
    if activation in ("relu", "leaky_relu") and dtype == torch.float32:
        assert torch.equal(active, (y > 0).sum(others))

    got = ops.backward(
        grad, x, weight, bias, residual if activation not in ("relu", "leaky_relu") else None, mean, var, mask, *arguments,
        1e-5, with_residual,
    )
    certain = z.detach().abs() > 20 * rounding
    if not bool(certain.all()):
        # where the sign is rounding's, so is the gradient: compare with the sign that the op chose
        got_reference = reference.norm_act_backward(
            grad, x, weight, bias, residual if activation not in ("relu", "leaky_relu") else None, mean, var, mask,
            *arguments, 1e-5, with_residual,
        )
        wanted = [g.double() for g in got_reference]
    else:
        found = torch.autograd.grad(expected, leaves, grad.double())
        wanted = [*found, torch.empty(0)] if residual is None else list(found)
    for name, g, w in zip(("x", "weight", "bias", "residual"), got, wanted):
        if w.numel():
            scale = max(1.0, float(w.abs().max()))
            torch.testing.assert_close(g.double() / scale, w / scale, rtol=4 * rounding, atol=4 * rounding, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1.0), (1e6, 10.0), (-3e5, 0.5), (0.0, 1e-6)])
def test_statistics_far_from_zero(ops: Any, mean: float, std: float, channels_last: bool) -> None:
    """E[x^2] - E[x]^2 would lose every digit here."""
    x = torch.randn(8, 6, 20, 20, generator=torch.Generator().manual_seed(0)) * std + mean
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    _, _, got_mean, got_var, _ = ops.forward(x, None, None, None, "relu", 0.0, 1e-5, 0.0, None)
    exact = x.double()
    torch.testing.assert_close(got_mean.double(), exact.mean((0, 2, 3)), rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(got_var.double(), exact.var((0, 2, 3), unbiased=False), rtol=2e-4, atol=1e-14)


@pytest.mark.skipif("_C" not in backend.loaded, reason="no compiled kernels")
@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_change_counts_and_noise_nowhere(channels_last: bool) -> None:
    x = torch.randn(32, 24, 31, 29)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(functional.norm_act(x, None, None, None, "relu", 0.0, 1e-5, 0.3, 11))
    finally:
        torch.set_num_threads(before)
    for y, active, mean, var in results[1:]:
        torch.testing.assert_close(y, results[0][0], rtol=1e-5, atol=1e-5)
        assert (active - results[0][1]).abs().max() <= 2  # a sum in another order may turn a sign
        torch.testing.assert_close((mean, var), results[0][2:], rtol=1e-5, atol=1e-6)


def test_noise_is_the_activations_and_reaches_active_elements_only() -> None:
    x = torch.randn(4, 3, 8, 8)
    clean, _, _, _ = functional.norm_act(x, None, None, None, "relu", 0.0, 1e-5, 0.0, None)
    noisy, _, _, _ = functional.norm_act(x, None, None, None, "relu", 0.0, 1e-5, 0.5, 7)
    alone, _ = functional.relu(F.batch_norm(x, None, None, training=True), noise_std=0.5, seed=7)
    assert torch.equal(noisy[clean == 0], clean[clean == 0])
    torch.testing.assert_close(noisy, alone, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck(activation: str, with_residual: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator).requires_grad_()
    weight, bias = (torch.randn(2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    residual = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator).requires_grad_() if with_residual else None
    inputs = (x, weight, bias, *([residual] if with_residual else []))

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return functional.norm_act(x, weight, bias, residual, activation, 0.0, 1e-5, 0.0, None)[0]

    assert torch.autograd.gradcheck(function, inputs)


def test_third_derivatives_are_refused() -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    y = functional.norm_act(x, None, None, None, "gelu", 0.0, 1e-5, 0.0, None)[0]
    first, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.autograd.grad(first.square().sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="norm_act: third derivatives are not there"):
        torch.autograd.grad(first.square().sum(), x, create_graph=True)


def test_opcheck() -> None:
    x, weight, bias, residual, _ = sample("channels last", torch.float32, True)
    arguments = (x.requires_grad_(), weight, bias, residual, "relu", 0.0, 1e-5, 0.0, None)
    torch.library.opcheck(torch.ops.demp_kernels.norm_act_forward.default, arguments)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(3)}, "norm_act: x must have"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, "got int32"),
        ({"weight": torch.zeros(5)}, "weight must"),
        ({"weight": torch.zeros(3, device="meta")}, "norm_act: weight must be on cpu, got meta"),
        ({"bias": torch.zeros(3, device="meta")}, "norm_act: bias must be on cpu, got meta"),
        ({"residual": torch.zeros(2, 3, 5)}, "residual must"),
        ({"activation": "elu"}, "activation must be one of"),
        ({"noise_std": -1.0}, "noise_std must be finite and >= 0, got -1"),
    ],
)
def test_bad_input(change: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.randn(2, 3, 4), "weight": None, "bias": None, "residual": None, "activation": "relu", "slope": 0.0,
        "eps": 1e-5, "noise_std": 0.0, "seed": None,
    }
    with pytest.raises(ValueError, match=text):
        functional.norm_act(*{**arguments, **change}.values())


def test_mean_of_halves_is_not_biased(ops: Any) -> None:
    """16-bit elements lie on a coarse grid: what rounding drops from one difference it drops from all of them."""
    x = (torch.randn(16, 24, 28, 28, generator=torch.Generator().manual_seed(20)) * 2 + 0.7).half()
    x = x.contiguous(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        mean, var = ops.forward(x, None, None, None, "relu", 0.0, 1e-5, 0.0, None)[2:4]
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=0, atol=3e-7)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-6, atol=0)
