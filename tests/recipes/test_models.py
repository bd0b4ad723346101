"""The recipes' networks: shapes, sizes, names."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from demp_kernels.recipes.errors import RecipeError
from demp_kernels.recipes.flops import count_flops, count_parameters
from demp_kernels.recipes.models import build_model, is_convolutional


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize(("name", "width"), [("resnet18", 4), ("vgg16", 2), ("mlp", 16), ("vit", 32)])
def test_any_image_becomes_scores(name: str, width: int, size: int, channels: int) -> None:
    model = build_model(name, channels=channels, classes=7, image_size=size, width=width)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)


def test_resnet18_has_the_size_of_the_usual_network() -> None:
    # 11,173,962 is the parameter count of the common CIFAR-10 ResNet-18 (3x3 stem, ten classes)
    assert count_parameters(build_model("resnet18", channels=3, classes=10, image_size=32)) == 11_173_962


def test_vgg16_scales_with_its_width() -> None:
    model = build_model("vgg16", channels=3, classes=10, image_size=32, width=8)
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [8] * 2 + [16] * 2 + [32] * 3 + [64] * 6
    assert [module.out_features for module in model.modules() if isinstance(module, nn.Linear)] == [512, 512, 10]


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "mlp"])
def test_every_relu_follows_a_norm_or_an_addition(name: str) -> None:
    model = build_model(name, channels=1, classes=3, image_size=8, width=2)
    relus = sum(isinstance(module, nn.ReLU) for module in model.modules())
    assert relus == {"resnet18": 17, "vgg16": 15, "mlp": 3}[name]


def test_torchvision_models_by_name() -> None:
    pytest.importorskip("torchvision")
    model = build_model("squeezenet1_1", channels=3, classes=5, image_size=64)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    stem = build_model("torchvision:resnet18", channels=3, classes=5, image_size=64).conv1
    assert stem.kernel_size == (7, 7)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name": "resnet19"}, "must be one of resnet18, vgg16, mlp, vit or a classification model of torchvision"),
        ({"name": "fcn_resnet50"}, "got 'fcn_resnet50'"),
        ({"name": "resnet50", "width": 8}, "width applies to resnet18, vgg16, mlp, vit"),
        ({"name": "resnet50", "channels": 1}, "takes images of 3 channels, the data have 1"),
        ({"name": "vit", "width": 40}, "width of vit must be a multiple of 32, got 40"),
    ],
)
def test_bad_models_are_refused(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        build_model(**{"channels": 3, "classes": 2, "image_size": 32, **arguments})


def test_only_networks_of_convolutions_profit_from_channels_last() -> None:
    convolutional = {
        name: is_convolutional(build_model(name, channels=1, classes=2, image_size=8, width=32))
        for name in ("resnet18", "vgg16", "mlp", "vit")
    }
    assert convolutional == {"resnet18": True, "vgg16": True, "mlp": False, "vit": False}


def test_flops_count_two_a_multiply_add_and_leave_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(320, 7))
    model[1].eval()
    before = model[1].running_mean.clone()
    assert count_flops(model, torch.randn(1, 3, 8, 8)) == 2 * (3 * 5 * 9 * 64 + 320 * 7)
    assert [module.training for module in model] == [True, False, True, True]
    assert torch.equal(model[1].running_mean, before)
