"""The activation op as PyTorch sees it: the reference against plain PyTorch, autograd, compilation, bad input."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from demp_kernels import functional, reference

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
COUNTING: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "relu": functional.relu,
    "leaky_relu": lambda x, *a, **k: functional.leaky_relu(x, 0.1, *a, **k),
    "gelu": lambda x, *a, **k: functional.gelu(x, "none", *a, **k),
    "gelu_tanh": lambda x, *a, **k: functional.gelu(x, "tanh", *a, **k),
    "silu": functional.silu,
}
SLOPES = {name: 0.1 if name == "leaky_relu" else 0.0 for name in PLAIN}


pytestmark = pytest.mark.usefixtures("tiny_or_op")


@pytest.mark.parametrize("activation", PLAIN)
def test_reference_is_pytorch(activation: str) -> None:
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    y, active, mask = reference.activation_forward(x, activation, SLOPES[activation], 1, 0.0, None)
    torch.testing.assert_close(y, PLAIN[activation](x), rtol=1e-14, atol=1e-14)
    assert torch.equal(active, (x > 0).sum((0, 2))) and mask.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("activation", PLAIN)
def test_as_accurate_as_pytorch(activation: str, dtype: torch.dtype) -> None:
    """Against float64: no further off than PyTorch's own kernel, give or take a rounding of the result."""
    x = (torch.randn(3, 7, 33) * 4).to(dtype)
    exact = PLAIN[activation](x.double())
    ours, theirs = COUNTING[activation](x)[0].double(), PLAIN[activation](x).double()
    eps = torch.finfo(dtype).eps
    allowed = (theirs - exact).abs() + eps * exact.abs() + eps**2
    assert ((ours - exact).abs() <= allowed + 2e-7).all()


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
def test_other_strides_are_copied(strides: str) -> None:
    base = torch.randn(6, 8, 10)
    x = {"transposed": base.transpose(0, 2), "sliced": base[:, ::2, 1:7], "expanded": base[:1].expand(5, 8, 10)}[strides]
    y, active = functional.relu(x)
    assert torch.equal(y, F.relu(x)) and torch.equal(active, (x > 0).sum((0, 2)))


def test_nan_is_active_and_keeps_its_gradient() -> None:
    x = torch.tensor([[math.nan, -1.0], [-2.0, -math.inf]], requires_grad=True)
    y, active = functional.relu(x)
    assert active.tolist() == [1, 0] and y[0, 0].isnan()
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("noise_std", [0.0, 0.5])
@pytest.mark.parametrize("activation", PLAIN)
def test_gradient_is_that_of_the_clean_activation(activation: str, noise_std: float, channels_last: bool) -> None:
    x = torch.randn(3, 4, 5, 6)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    # a gradient in another layout, and one without memory of its own
    for grad in (torch.randn(3, 4, 5, 6), torch.ones(()).expand(3, 4, 5, 6)):
        results = []
        for function in (lambda t: COUNTING[activation](t, noise_std=noise_std, seed=1)[0], PLAIN[activation]):
            leaf = x.clone().requires_grad_()
            function(leaf).backward(grad)
            results.append(leaf.grad)
        torch.testing.assert_close(*results, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("activation", PLAIN)
def test_gradcheck(activation: str) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    x = torch.where(x.abs() < 0.1, 0.5, x).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: COUNTING[activation](t)[0], x)
    assert torch.autograd.gradcheck(lambda t: COUNTING[activation](t, noise_std=0.3, seed=5)[0], x)
    assert torch.autograd.gradgradcheck(lambda t: COUNTING[activation](t)[0], x)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_second_derivatives_of_scaled_half_gradients_do_not_overflow(activation: str) -> None:
    """The product of two scaled gradients is beyond float16, though with the derivative it is not."""
    x = torch.tensor([[0.1, -4.5, 5.0, 200.0]])
    results = []
    for dtype in (torch.float16, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        y = COUNTING[activation](leaf)[0]
        first, = torch.autograd.grad(y, leaf, torch.full_like(y, 512.0), create_graph=True)
        second, = torch.autograd.grad(first, leaf, torch.full_like(first, 150.0))
        results.append(second.double())
    assert results[0].isfinite().all()
    torch.testing.assert_close(*results, rtol=5e-3, atol=1.0)


@pytest.mark.parametrize("noise_std", [0.0, 0.5])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_opcheck(activation: str, noise_std: float) -> None:
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    seed = torch.tensor([3]) if noise_std else None
    torch.library.opcheck(torch.ops.demp_kernels.activation_forward.default, (x, activation, 0.0, 1, noise_std, seed))
    y, _, mask = reference.activation_forward(x.detach(), activation, 0.0, 1, noise_std, seed)
    saved = x.detach().new_empty(0) if mask.numel() else (y if activation == "relu" else x.detach())
    torch.library.opcheck(
        torch.ops.demp_kernels.activation_backward.default, (torch.randn_like(x), saved, mask, activation, 0.0)
    )


def test_compiles_without_breaks_for_new_seeds_and_batches() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    @torch.compile(fullgraph=True)
    def step(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        y, active = functional.relu(x * 2, noise_std=0.1, seed=seed)
        return y.square().sum(), active

    for seed in range(4):
        x = torch.randn(6, 5, requires_grad=True)
        loss, active = step(x, torch.tensor([seed]))
        loss.backward()
        y, expected = functional.relu(x.detach() * 2, noise_std=0.1, seed=seed)
        assert torch.equal(active, expected)
        torch.testing.assert_close(x.grad, 2 * (2 * y) * (x.detach() > 0), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_two_forwards_before_a_backward() -> None:
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    (functional.relu(a)[0] * functional.relu(b)[0]).sum().backward()
    assert torch.equal(a.grad, F.relu(b.detach()) * (a.detach() > 0))
    assert torch.equal(b.grad, F.relu(a.detach()) * (b.detach() > 0))


def test_autocast_keeps_the_inputs_type() -> None:
    linear = torch.nn.Linear(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, active = functional.relu(linear(torch.randn(5, 4)))
    assert y.dtype == torch.bfloat16 and active.shape == (6,)
    y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32


def test_no_grad_and_inference_mode() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        assert not functional.relu(x)[0].requires_grad
    with torch.inference_mode():
        assert torch.equal(functional.relu(x)[0], F.relu(x))


def test_in_place_writes_over_x_and_differentiates() -> None:
    leaf = torch.randn(3, 4, requires_grad=True)
    x = leaf * 1
    y, active = functional.relu_(x, noise_std=0.2, seed=9)
    expected, count = functional.relu(leaf.detach(), noise_std=0.2, seed=9)
    assert y.data_ptr() == x.data_ptr() and torch.equal(x.detach(), expected) and torch.equal(active, count)
    y.sum().backward()
    assert torch.equal(leaf.grad, (leaf.detach() > 0).float())


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_in_place_over_a_view_writes_over_its_base(slope: float) -> None:
    leaf = torch.randn(6, 4, requires_grad=True)
    base = leaf * 1
    _, active = functional.leaky_relu_(base[:2], slope) if slope else functional.relu_(base[:2])
    expected = torch.cat([F.leaky_relu(leaf.detach()[:2], slope), leaf.detach()[2:]])
    assert torch.equal(base.detach(), expected) and torch.equal(active, (leaf[:2] > 0).sum(0))
    base.sum().backward()
    assert torch.equal(leaf.grad, torch.cat([(leaf.detach()[:2] > 0).float().clamp(min=slope), torch.ones(4, 4)]))


def test_in_place_over_a_value_that_autograd_needs_is_refused() -> None:
    x = torch.randn(3, 4, requires_grad=True).exp()
    functional.relu_(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_seed_none_follows_manual_seed() -> None:
    x = torch.ones(64, 3)
    torch.manual_seed(4)
    first, second = functional.relu(x, noise_std=1.0)[0], functional.relu(x, noise_std=1.0)[0]
    torch.manual_seed(4)
    assert torch.equal(functional.relu(x, noise_std=1.0)[0], first) and not torch.equal(first, second)


@given(
    shape=st.lists(st.integers(0, 9), min_size=2, max_size=5),
    channel_dim=st.integers(-5, 4),
    activation=st.sampled_from(sorted(PLAIN)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    noise_std=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_agrees_with_the_reference(
    shape: list[int], channel_dim: int, activation: str, dtype: torch.dtype, noise_std: float, seed: int
) -> None:
    channel_dim %= len(shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 1000)).to(dtype)
    y, active = COUNTING[activation](x, channel_dim, noise_std, seed)
    expected, count, _ = reference.activation_forward(
        x, activation, SLOPES[activation], channel_dim, noise_std, torch.tensor([seed]) if noise_std else None
    )
    assert torch.equal(active, count)
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float64: 4e-6 if noise_std else 1e-12}[dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: functional.relu(torch.zeros(3)), r"activation: x must have a channel dimension, got shape \(3,\)"),
        (lambda: functional.relu(torch.zeros(2, 3, dtype=torch.int32)), "activation: x must be float32.*got int32"),
        (lambda: functional.relu(torch.zeros(2, 3), channel_dim=5), "channel_dim must be between -2 and 1.*got 5"),
        (lambda: functional.relu(torch.zeros(2, 3), noise_std=-1.0), "noise_std must be finite and >= 0, got -1"),
        (lambda: functional.relu(torch.zeros(2, 3), noise_std=math.nan), "noise_std must be finite and >= 0, got nan"),
        (lambda: functional.relu(torch.zeros(2, 3), noise_std=1.0, seed=torch.zeros(2)), "seed must be int64 of shape"),
        (lambda: functional.gelu(torch.zeros(2, 3), "erf"), "approximate must be none or tanh, got erf"),
        (lambda: functional.leaky_relu_(torch.zeros(2, 3), -0.1), "slope must be > 0 in place, got -0.1"),
    ],
)
def test_bad_input(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
