"""prepare, swap_activations and finalize: same keys, same bits, every call site counted."""
from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import demp_kernels as dk


class FunctionalNet(nn.Module):
    """Functional activations of every kind, a reused module, a functional dropout and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2)
        y = self.act(self.bn(self.conv2(x)))
        y += x
        y = self.act(y).relu()
        y = F.gelu(y, approximate="tanh") + F.silu(y)
        y = F.dropout(y, 0.5, training=self.training)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


class TokenMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up, self.down, self.act = nn.Linear(12, 20), nn.Linear(20, 12), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def torchvision_model(name: str, **options: object) -> nn.Module:
    models = pytest.importorskip("torchvision.models", exc_type=Exception)
    return models.get_model(name, weights=None, num_classes=10, **options)


def assert_same_function(model: nn.Module, prepared: nn.Module, x: torch.Tensor) -> None:
    assert set(prepared.state_dict()) == set(model.state_dict())
    twin = copy.deepcopy(model)
    for mode in (True, False):
        twin.train(mode)
        prepared.train(mode)
        torch.manual_seed(1)
        expected = twin(x)
        torch.manual_seed(1)
        got = prepared(x)
        if mode and any(isinstance(m, (dk.DemPGELU, dk.DemPSiLU)) for m in prepared.modules()):
            # the kernels' erf, tanh and exp are as accurate as PyTorch's, but not the same polynomials
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(got, expected), f"training={mode}"


def test_prepare_functional_model_is_bit_equal_and_counts_every_call() -> None:
    model = FunctionalNet()
    x = torch.randn(4, 3, 9, 9)
    prepared = dk.prepare(model, x, fuse=False)
    names = {n for n, m in prepared.named_modules() if isinstance(m, dk.DemPActivation)}
    assert names == {"leakyrelu", "act", "act_1", "relu", "gelu", "silu"}
    assert_same_function(model, prepared, x)
    for name, module in prepared.named_modules():
        if isinstance(module, dk.DemPActivation):
            assert module.seen.item() == 4 * 9 * 9, name
            assert module.active.shape == (8,)


def test_prepare_shares_parameters_and_leaves_the_model_alone() -> None:
    model = FunctionalNet().eval()
    prepared = dk.prepare(model, torch.randn(2, 3, 8, 8))
    assert {id(p) for p in model.parameters()} == {id(p) for p in prepared.parameters()}
    assert type(model.act) is nn.ReLU and not model.training and not prepared.training


def test_prepare_switches_dropout_with_the_mode() -> None:
    prepared = dk.prepare(FunctionalNet(), torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    prepared.eval()
    assert torch.equal(prepared(x), prepared(x))
    prepared.train()
    assert not torch.equal(prepared(x), prepared(x))


def test_prepare_takes_the_last_dimension_behind_linear() -> None:
    model = TokenMLP()
    prepared = dk.prepare(model, torch.randn(2, 7, 12))
    assert prepared.act.channel_dim == -1
    x = torch.randn(3, 7, 12)
    assert_same_function(model, prepared, x)
    assert prepared.act.active.shape == (20,) and prepared.act.seen.item() == 21


def test_prepare_keeps_unused_parameters_in_the_state_dict() -> None:
    model = TokenMLP()
    model.unused = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    prepared = dk.prepare(model, torch.randn(2, 7, 12))
    assert set(prepared.state_dict()) == set(model.state_dict())
    prepared.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "mobilenet_v2", "densenet121", "convnext_tiny", "shufflenet_v2_x0_5", "swin_t"]
)
def test_prepare_torchvision(name: str) -> None:
    model = torchvision_model(name)
    x = torch.randn(2, 3, 64, 64)
    prepared = dk.prepare(model, x, fuse=False)
    assert any(isinstance(m, dk.DemPActivation) for m in prepared.modules()) == (name != "mobilenet_v2")
    assert_same_function(model, prepared, x)


def test_reused_modules_of_a_resnet_get_counters_of_their_own() -> None:
    prepared = dk.prepare(torchvision_model("resnet18"), torch.randn(1, 3, 64, 64), fuse=False)
    acts = [n for n, m in prepared.named_modules() if isinstance(m, dk.DemPActivation)]
    adds = [n for n, m in prepared.named_modules() if isinstance(m, dk.SelectiveAdd)]
    assert len(acts) == 17 and len(adds) == 8
    assert {"relu", "layer1.0.relu", "layer1.0.relu_1"} <= set(acts)


def test_prepare_refuses_another_path_in_training() -> None:
    with pytest.raises(dk.PrepareError, match="another path in training"):
        dk.prepare(torchvision_model("googlenet", aux_logits=True, init_weights=False), torch.randn(2, 3, 64, 64))


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "inputs", "error", "text"),
    [
        (Branching(), torch.randn(2, 2), dk.PrepareError, "torch.fx cannot trace Branching"),
        (nn.Linear(3, 2), torch.randn(2, 4), dk.PrepareError, "does not run on the example inputs"),
        ("resnet18", torch.randn(2, 4), TypeError, "model must be an nn.Module, got str"),
        (nn.Linear(3, 2), None, TypeError, "example_inputs must be a tensor or a non-empty tuple, got NoneType"),
        (nn.Linear(3, 2), (), TypeError, "example_inputs must be a tensor or a non-empty tuple, got tuple"),
    ],
)
def test_prepare_bad_input(model: object, inputs: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        dk.prepare(model, inputs)  # type: ignore[arg-type]


def test_swap_activations_in_place_with_loading_both_ways() -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 36, 7), nn.GELU(),
        nn.Linear(7, 4), nn.LeakyReLU(0.3), nn.SiLU(),
    )
    swapped = copy.deepcopy(plain)
    assert dk.swap_activations(swapped) == 4
    assert isinstance(swapped[2], dk.DemPReLU) and swapped[2].inplace and isinstance(swapped[7], dk.DemPLeakyReLU)
    assert swapped[7].negative_slope == 0.3 and swapped[5].channel_dim == -1
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(swapped(x), plain(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(swapped.eval()(x), plain.eval()(x))
    plain.load_state_dict(swapped.state_dict())
    swapped.load_state_dict(plain.state_dict())
    assert dk.swap_activations(swapped) == 0


def test_swap_activations_counts_a_shared_module_once() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    assert dk.swap_activations(model) == 1
    assert model[1] is model[3]


@pytest.mark.parametrize("name", ["resnet18", "functional", "tokens"])
def test_finalize_gives_plain_modules_with_the_same_function(name: str) -> None:
    makers = {"functional": FunctionalNet, "tokens": TokenMLP, "resnet18": lambda: torchvision_model("resnet18")}
    model = makers[name]()
    x = torch.randn(2, 7, 12) if name == "tokens" else torch.randn(2, 3, 64, 64)
    prepared = dk.prepare(model, x).eval()
    plain = dk.finalize(prepared)
    assert not any(type(m).__module__.startswith("demp_kernels.modules") for m in plain.modules())
    assert torch.equal(plain(x), prepared(x))
    assert set(plain.state_dict()) == set(model.state_dict())
    assert isinstance(torch.export.export(plain, (x,)), torch.export.ExportedProgram)
    buffer = io.BytesIO()
    torch.save(plain.state_dict(), buffer)


def test_finalize_keeps_tensors_that_the_forward_does_not_reach() -> None:
    class Aliases(FunctionalNet):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.unused = self.conv1, nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    model, x = Aliases(), torch.randn(2, 3, 8, 8)
    plain = dk.finalize(dk.prepare(model, x))
    model.load_state_dict(plain.state_dict())  # strict
    assert not any(type(m).__module__.startswith("demp_kernels") for m in plain.modules())


class AsksForItsMode(nn.Module):
    """A functional batch norm, which is told by an argument whether it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.batch_norm(self.linear(x), self.mean, self.var, training=self.training))


def test_finalised_functions_that_are_told_the_mode_follow_it_wherever_they_go() -> None:
    x = torch.randn(5, 6)
    model = AsksForItsMode()
    plain = dk.finalize(dk.prepare(model, x))
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    buffer.seek(0)
    for way in (plain, copy.deepcopy(plain), torch.load(buffer, weights_only=False), dk.prepare(plain, x)):
        for training in (True, False, True):
            assert torch.equal(way.train(training)(x), copy.deepcopy(model).train(training)(x))
            way.load_state_dict(model.state_dict())
    torch.testing.assert_close(torch.export.export(plain.eval(), (x,)).module()(x), model.eval()(x))


def test_finalize_keeps_a_selection() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.skip = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + self.skip(x)

    prepared = dk.prepare(Residual(), torch.randn(1, 3, 6, 6)).eval()
    prepared.skip = nn.Conv2d(3, 5, 1)
    prepared.add.set_selection(torch.tensor([3, -1, 0, 4]), 5)
    x = torch.randn(2, 3, 6, 6)
    expected, skip = prepared.conv(x), prepared.skip(x)
    for out, source in ((0, 3), (2, 0), (3, 4)):
        expected[:, out] += skip[:, source]
    assert torch.allclose(prepared(x), expected)
    assert torch.allclose(dk.finalize(prepared)(x), expected)


def test_prepare_names_a_functional_activation_whose_module_is_gone() -> None:
    """A module of the user's that only calls a function is no module of the traced network; its path is still the name."""

    class Act(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x)

    model = nn.Sequential(nn.Linear(3, 5), Act(), nn.Linear(5, 2))
    prepared = dk.prepare(model, torch.randn(4, 3))
    names = [name for name, module in prepared.named_modules() if isinstance(module, dk.DemPActivation)]
    assert names == ["1.relu"]
    x = torch.randn(4, 3)
    assert torch.equal(prepared(x), model(x))


class Skip(nn.Module):
    """Keeps a feature map, then activates it in place: the skip carries what was written over it."""

    def __init__(self, act: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.act, self.mix, self.out = nn.Conv2d(3, 4, 1), act, nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = self.conv(x)
        skips = [c]
        y = F.silu(c, inplace=True) if self.act is None else self.act(c)
        return self.out(torch.cat([skips[0], self.mix(y)], 1))


@pytest.mark.parametrize("act", [nn.SiLU(inplace=True), nn.ReLU(inplace=True), None], ids=repr)
def test_prepare_keeps_what_in_place_means_to_others(act: nn.Module | None) -> None:
    model, x = Skip(act), torch.randn(2, 3, 5, 5)
    prepared = dk.prepare(model, x)
    for mode in (True, False):
        torch.testing.assert_close(prepared.train(mode)(x), model.train(mode)(x))


class Residual(nn.Module):
    """A convolution, whose output the prepared model may overwrite, and the skip that is added to it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.way = nn.Conv2d(4, 4, 3, padding=1), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y.add_(x) if self.way == "add_" else y + x


@pytest.mark.parametrize("way", ["+", "add_"])
def test_a_sum_has_the_dtype_of_the_model(way: str) -> None:
    """Under autocast the convolution's output is bfloat16 and the skip float32: `+` promotes, `add_` does not."""
    model, x = Residual(way), torch.randn(2, 4, 5, 5)
    prepared = dk.prepare(model, x)
    assert prepared.add.inplace
    for mode in (True, False):
        buffer = io.BytesIO()
        torch.save(dk.finalize(prepared), buffer)
        buffer.seek(0)
        for network in (prepared, torch.load(buffer, weights_only=False)):
            with torch.autocast("cpu", torch.bfloat16):
                expected, got = model.train(mode)(x), network.train(mode)(x)
            assert got.dtype == expected.dtype == (torch.float32 if way == "+" else torch.bfloat16)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_what_an_addition_overwrites(before: bool) -> None:
    """A full backward hook's module gives out a view, and a forward hook keeps what was computed then."""
    model, x, kept, gradients = Residual("+"), torch.randn(2, 4, 5, 5), [], []
    if before:
        model.conv.register_forward_hook(lambda module, args, y: kept.append(y))
    prepared = dk.prepare(model, x)
    prepared.conv.register_full_backward_hook(lambda module, before, after: gradients.append(after[0]))
    prepared(x).sum().backward()
    assert torch.equal(gradients[0], torch.ones_like(x))
    assert not before or torch.equal(kept[-1], F.conv2d(x, model.conv.weight, model.conv.bias, padding=1))
