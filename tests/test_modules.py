"""The counting modules: what they compute, what they count, and when they do not."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import demp_kernels as dk

PAIRS = [
    (dk.DemPReLU(), nn.ReLU()),
    (dk.DemPReLU(inplace=True), nn.ReLU(inplace=True)),
    (dk.DemPLeakyReLU(0.05), nn.LeakyReLU(0.05)),
    (dk.DemPLeakyReLU(-0.5), nn.LeakyReLU(-0.5)),
    (dk.DemPLeakyReLU(0.5, inplace=True), nn.LeakyReLU(0.5, inplace=True)),
    (dk.DemPGELU(), nn.GELU()),
    (dk.DemPGELU("tanh"), nn.GELU("tanh")),
    (dk.DemPSiLU(), nn.SiLU()),
]


pytestmark = pytest.mark.usefixtures("tiny_or_op")


@pytest.mark.parametrize(("counting", "plain"), PAIRS, ids=lambda m: repr(m))
@pytest.mark.parametrize("training", [True, False])
def test_same_function_and_gradient_as_the_plain_module(counting: nn.Module, plain: nn.Module, training: bool) -> None:
    counting, plain = copy.deepcopy(counting).train(training), copy.deepcopy(plain).train(training)
    x = torch.randn(3, 5, 7, 2).to(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    results = []
    for module in (counting, plain):
        leaf = x.clone().requires_grad_()
        y = module(leaf * 1.0)
        y.backward(grad)
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=1e-6)
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)
    if training:
        assert torch.equal(counting.active, (x > 0).sum((0, 2, 3)))
        assert counting.seen.item() == 3 * 7 * 2
    else:
        assert counting.active is None


def test_counts_accumulate_and_reset() -> None:
    module = dk.DemPReLU()
    x, z = torch.randn(4, 3), torch.randn(6, 3)
    module(x), module(z)
    assert torch.equal(module.active, (x > 0).sum(0) + (z > 0).sum(0)) and module.seen.item() == 10
    module.reset_counts()
    assert module.active.sum() == 0 and module.seen == 0 and not module.dead().any()


def test_dead_needs_a_look() -> None:
    module = dk.DemPReLU()
    assert module.dead() is None
    module(torch.tensor([[-1.0, 2.0, float("nan")]]))
    assert module.dead().tolist() == [True, False, False]


def test_counters_stay_out_of_the_state_dict() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 1), dk.DemPReLU())
    module(torch.randn(1, 1, 2, 2))
    assert list(module.state_dict()) == ["0.weight", "0.bias"]
    nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()).load_state_dict(module.state_dict())


def test_counters_made_without_memory_start_at_zero() -> None:
    module = dk.DemPReLU()
    module.allocate(1 << 12, "meta")
    junk = torch.full((1 << 12,), 7, dtype=torch.int64)
    del junk  # its memory is the next to be given out
    module.to_empty(device="cpu")
    assert module.active.device.type == "cpu" and not module.active.any() and not module.seen.any()


def test_inplace_overwrites_its_input() -> None:
    x = torch.randn(2, 3, 4)
    y = dk.DemPReLU(inplace=True)(x)
    assert y.data_ptr() == x.data_ptr() and (x >= 0).all()


@pytest.mark.parametrize("module", [dk.DemPReLU(inplace=True), dk.DemPLeakyReLU(inplace=True)], ids=repr)
def test_inplace_refuses_a_leaf_that_requires_grad(module: nn.Module) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="leaf"):
        module(x)
    assert torch.equal(x, before)  # refused before it was overwritten


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("module", [dk.DemPReLU(inplace=True), dk.DemPLeakyReLU(0.5, inplace=True)], ids=repr)
def test_who_reads_the_input_later_reads_what_inplace_wrote(module: nn.Module, compiled: bool) -> None:
    def net(z: torch.Tensor) -> torch.Tensor:
        y = module(z)
        again = z * 0.5
        return module(again) + y + 2 * z

    torch.compiler.reset()
    x = torch.randn(64, 16, requires_grad=True)
    plain = nn.ReLU() if isinstance(module, dk.DemPReLU) else nn.LeakyReLU(0.5)
    expected = 3 * plain(x) + plain(0.5 * plain(x))
    y = (torch.compile(net, backend="aot_eager") if compiled else net)(x * 1.0)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(expected.square().sum(), x))


@pytest.mark.parametrize("counting", [dk.DemPReLU(), dk.DemPLeakyReLU(0.1), dk.DemPGELU(), dk.DemPSiLU()], ids=repr)
def test_what_plain_activations_leave_to_be_overwritten_may_be(counting: nn.Module) -> None:
    """PyTorch keeps relu's output for backward, and the inputs of the others."""
    plain = {dk.DemPReLU: nn.ReLU(), dk.DemPLeakyReLU: nn.LeakyReLU(0.1), dk.DemPGELU: nn.GELU(), dk.DemPSiLU: nn.SiLU()}[type(counting)]
    gradients = []
    for act in (counting, plain):
        leaf = torch.linspace(-2, 2, 96).view(8, 12).requires_grad_()
        x = leaf * 1.0
        y = act(x)
        if isinstance(plain, nn.ReLU):
            x.mul_(3.0)
        else:
            y += 1.0
        (y * y).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-6, atol=1e-6)


def test_a_first_forward_in_inference_mode_does_not_keep_training_from_counting() -> None:
    module, x = dk.DemPReLU(), torch.randn(4, 3)
    with torch.inference_mode():
        module(x)
    module(x)
    assert torch.equal(module.active, 2 * (x > 0).sum(0)) and module.seen == 8
    module.reset_counts()
    assert not module.active.any()


def test_counters_are_on_the_inputs_device_whatever_the_default_is() -> None:
    module, x = dk.DemPReLU(), torch.randn(4, 3, requires_grad=True)
    with torch.device("meta"):
        y, active = dk.functional.relu(x)
        module(x)
    assert torch.equal(active, (x > 0).sum(0)) and torch.equal(y, x.relu())
    assert torch.equal(module.active, active)


def test_data_parallel_in_one_process_is_refused_in_training() -> None:
    """Its replicas are thrown away, and their counts with them."""
    module = dk.DemPReLU()
    with pytest.raises(RuntimeError, match=r"train with DistributedDataParallel"):
        module._replicate_for_data_parallel()
    assert not module.eval()._replicate_for_data_parallel().training


def test_noise_in_training_only_and_only_on_active_elements() -> None:
    module = dk.DemPReLU(noise_std=0.5)
    x = torch.randn(64, 16)
    torch.manual_seed(0)
    y = module(x)
    assert torch.equal(y[x <= 0], torch.zeros_like(y[x <= 0]))
    noise = (y - x)[x > 0]
    assert noise.abs().min() >= 0 and 0.4 < noise.std() < 0.6 and noise.mean().abs() < 0.1
    torch.manual_seed(0)
    assert torch.equal(module(x), y)
    module.eval()
    assert torch.equal(module(x), F.relu(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_activation_checkpointing_counts_once_and_draws_the_same_noise(use_reentrant: bool, noise_std: float) -> None:
    block = nn.Sequential(nn.Linear(6, 9), dk.DemPReLU(noise_std=noise_std), nn.Linear(9, 4))
    x = torch.randn(8, 6, requires_grad=True)
    grads, counts = [], []
    for recompute in (False, True):
        block.zero_grad()
        block[1].reset_counts()
        torch.manual_seed(3)
        y = checkpoint(block, x, use_reentrant=use_reentrant) if recompute else block(x)
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in block.parameters()])
        counts.append(block[1].active.clone())
    assert torch.equal(*counts)
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: dk.DemPReLU(noise_std=-0.1), ValueError, "noise_std must be >= 0 and finite, got -0.1"),
        (lambda: dk.DemPReLU(noise_std=float("nan")), ValueError, "noise_std must be >= 0 and finite, got nan"),
        (lambda: dk.DemPGELU("erf"), ValueError, "approximate must be 'none' or 'tanh', got 'erf'"),
        (lambda: dk.DemPReLU()(torch.randn(3)), ValueError, "x must have a channel dimension"),
        (lambda: dk.DemPReLU()(torch.ones(2, 3, dtype=torch.int64)), ValueError, "got int64"),
        (lambda: dk.SelectiveAdd().set_selection(torch.tensor([0.5]), 2), ValueError, "1-D int64"),
        (lambda: dk.SelectiveAdd().set_selection(torch.tensor([2]), 2), ValueError, r"\[-1, 2\)"),
    ],
)
def test_bad_input(make: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()  # type: ignore[operator]


def test_selective_add_gathers_the_skip_and_differentiates() -> None:
    add = dk.SelectiveAdd()
    a = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    add.set_selection(torch.tensor([4, -1, 1]), 5)
    y = add(a, b)
    assert torch.equal(y[:, 0], a[:, 0] + b[:, 4]) and torch.equal(y[:, 1], a[:, 1])
    assert torch.autograd.gradcheck(add, (a, b))
    add.set_selection(None)
    assert torch.equal(add(a, a), a + a)


def test_prepared_model_compiles_without_breaks_or_recompilation() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = dk.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 6))
    compiled = torch.compile(model, fullgraph=True)
    seen = 0
    for _ in range(4):
        compiled(torch.randn(4, 6)).sum().backward()
        seen += 4
    act = model.get_submodule("1")
    assert act.seen.item() == seen
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
