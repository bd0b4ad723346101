"""torch.func's transforms go through the functions and the modules: they see the reference, and nothing is counted."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import demp_kernels as dk


def selected(x: Tensor) -> Tensor:
    return dk.functional.channel_select(x, torch.tensor([2, -1, 0]), torch.tensor([2, -1, 0, -1]))


PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (lambda x: dk.functional.relu(x)[0], F.relu),
    "relu_": (lambda x: dk.functional.relu_(x * 1.0)[0], F.relu),
    "leaky_relu_": (lambda x: dk.functional.leaky_relu_(x * 1.0, 0.1)[0], lambda x: F.leaky_relu(x, 0.1)),
    "select": (selected, lambda x: torch.stack([x[:, 2], torch.zeros_like(x[:, 0]), x[:, 0]], 1)),
    "leaky_relu": (lambda x: dk.functional.leaky_relu(x, 0.1)[0], lambda x: F.leaky_relu(x, 0.1)),
    "gelu": (lambda x: dk.functional.gelu(x)[0], F.gelu),
    "silu": (lambda x: dk.functional.silu(x)[0], F.silu),
    "norm_act": (lambda x: dk.functional.norm_act(x)[0], lambda x: F.relu(F.batch_norm(x, None, None, training=True))),
    "norm_act, residual": (
        lambda x: dk.functional.norm_act(x, residual=2 * x)[0], lambda x: F.relu(F.batch_norm(x, None, None, training=True) + 2 * x),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_derivatives_are_those_of_the_plain_function(name: str) -> None:
    ours, plain = PAIRS[name]
    torch.manual_seed(0)
    x, t = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    w = torch.randn_like(plain(x))
    for transform in (
        lambda f: grad(lambda v: (f(v) * w).sum())(x),
        lambda f: jvp(f, (x,), (t,)),
        lambda f: jacrev(f)(x),
        lambda f: grad(lambda v: (grad(lambda u: (f(u) * w).sum())(v) ** 2).sum())(x),
    ):
        torch.testing.assert_close(transform(ours), transform(plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "norm_act, residual"])
def test_vmap(name: str) -> None:
    ours, plain = PAIRS[name]
    x = torch.randn(5, 6, 4)
    torch.testing.assert_close(vmap(ours)(x), vmap(plain)(x))


def test_gradients_sample_by_sample_of_a_module_in_training_count_nothing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), dk.DemPReLU(), nn.Linear(8, 8), dk.DemPSiLU(), nn.Linear(8, 1))
    plain = nn.Sequential(net[0], nn.ReLU(), net[2], nn.SiLU(), net[4])
    x = torch.randn(5, 4)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        weights = {name: p.detach() for name, p in model.named_parameters()}
        return vmap(grad(lambda w, one: functional_call(model, w, (one[None],)).sum()), (None, 0))(weights, x)

    torch.testing.assert_close(gradients(net), gradients(plain))
    assert net[1].active is None and net[3].active is None


def test_wrong_arguments_are_named_inside_a_transform_too() -> None:
    with pytest.raises(ValueError, match="channel_dim must be between -2 and 1"):
        grad(lambda x: dk.functional.relu(x, channel_dim=3)[0].sum())(torch.randn(3, 4))
