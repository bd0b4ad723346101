"""Networks of the recipes, as plain modules (nn.ReLU, `x + skip`): `demp_kernels.prepare` does the rest.

`build_model` knows the four below and every classification model of torchvision by its name.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import RecipeError, need

__all__ = ["MLP", "MODELS", "ResNet18", "VGG16", "ViT", "build_model", "is_convolutional"]


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + skip(x)); the skip is a strided 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act2(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for small images: a 3x3 stem with stride 1, no max-pool.

    Args:
        channels: of the input. classes: outputs.
        width: channels of the first stage; the following ones have 2, 4 and 8 times as many. 64 is the usual network.

    x: (N, channels, H, W) with any H and W. Returns (N, classes).
    """

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        inputs = width
        for stage, outputs in enumerate((width, 2 * width, 4 * width, 8 * width)):
            for block in range(2):
                blocks.append(BasicBlock(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


class VGG16(nn.Module):
    """VGG-16 with batch normalisation after every hidden layer, the two fully connected ones included.

    Args:
        channels, classes: as in `ResNet18`.
        image_size: H = W of the input. The five max-pools stop where the map has one pixel left, so small images work.
        width: channels of the first layer, 64 in the usual network; everything scales with it, the head (4096) too.

    x: (N, channels, image_size, image_size). Returns (N, classes).
    """

    STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # (multiple of the width, layers)

    def __init__(self, channels: int, classes: int, image_size: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, size = channels, image_size
        for multiple, depth in self.STAGES:
            for _ in range(depth):
                outputs = multiple * width
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            if size >= 2:
                layers.append(nn.MaxPool2d(2))
                size //= 2
        self.features = nn.Sequential(*layers)
        hidden = 64 * width
        self.classifier = nn.Sequential(
            nn.Linear(inputs * size * size, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, classes),
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class MLP(nn.Module):
    """Three hidden layers of `width` units, each with batch normalisation and ReLU.

    x: (N, channels, image_size, image_size), flattened. Returns (N, classes).
    """

    def __init__(self, channels: int, classes: int, image_size: int, width: int = 512) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels * image_size**2
        for _ in range(3):
            layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
            inputs = width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x.flatten(1)))


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block; the units of its MLP are what can die."""

    def __init__(self, width: int, heads: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A small vision transformer: patches, learned positions, six pre-norm blocks, mean over the tokens.

    Args:
        channels, classes: as in `ResNet18`.
        image_size: H = W of the input; patches are its largest divisor up to an eighth of it, 7x7 tokens or more.
        width: of the tokens, a multiple of 32 (the size of a head). The MLPs have 4 times as many units.

    x: (N, channels, image_size, image_size). Returns (N, classes).
    """

    HEAD = 32

    def __init__(
        self, channels: int, classes: int, image_size: int, width: int = 128, depth: int = 6,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        if width % self.HEAD:
            raise RecipeError(f"width of vit must be a multiple of {self.HEAD}, got {width}")
        patch = max(size for size in range(1, max(image_size // 7, 1) + 1) if image_size % size == 0)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (image_size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(width, width // self.HEAD, activation) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def initialise(model: nn.Module) -> None:
    """He initialisation of every convolution and hidden linear layer."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and module.bias is None:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": lambda channels, classes, image_size, **width: ResNet18(channels, classes, **width),
    "vgg16": VGG16,
    "mlp": MLP,
    "vit": ViT,
}


def build_model(name: str, *, channels: int, classes: int, image_size: int, width: int | None = None) -> nn.Module:
    """A network by name.

    Args:
        name: one of `MODELS`, or a classification model of torchvision; "torchvision:resnet18" is torchvision's own
            where the name stands for one of ours too.
        channels, classes, image_size: of the data. torchvision's models want three channels.
        width: None for the model's usual one. torchvision's models have no such choice.

    Raises RecipeError that names what is there when the name is unknown or the model does not take such images.
    """
    given = {} if width is None else {"width": width}
    if name in MODELS:
        return MODELS[name](channels=channels, classes=classes, image_size=image_size, **given)
    return _torchvision_model(name, channels, classes, width)


def is_convolutional(model: nn.Module) -> bool:
    """Whether channels_last can matter: more than the one convolution that cuts patches for a transformer."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1


def _torchvision_model(name: str, channels: int, classes: int, width: int | None) -> nn.Module:
    ours = ", ".join(MODELS)
    torchvision = need("torchvision", f"model {name!r} (the built-in ones are {ours})")
    wanted = name.removeprefix("torchvision:")
    if wanted not in torchvision.models.list_models(module=torchvision.models):
        raise RecipeError(f"model must be one of {ours} or a classification model of torchvision, got {name!r}")
    if width is not None:
        raise RecipeError(f"width applies to {ours}; torchvision's {wanted} has a fixed one, got {width}")
    if channels != 3:
        raise RecipeError(f"torchvision's {wanted} takes images of 3 channels, the data have {channels}")
    # the auxiliary classifiers would make the output a tuple in train mode
    options = {"aux_logits": False, "init_weights": True} if wanted in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(wanted, weights=None, num_classes=classes, **options)
