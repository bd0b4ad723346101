"""Networks made up at random from a seed: every op of the coverage, in any order that fits."""
from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demp_kernels import DemPReLU, DemPSiLU, SelectiveAdd


class ChannelScale(nn.Module):
    """y = x * scale + shift, one entry a channel, in the shapes that models use."""

    def __init__(self, channels: int, shift: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(channels, 1, 1))
        self.shift = nn.Parameter(0.1 * torch.randn(1, channels, 1, 1)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if self.shift is None else x * self.scale + self.shift


class Squeeze(nn.Module):
    """Squeeze-and-excite: a gate for each channel."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(channels, 5, 1), DemPReLU(), nn.Conv2d(5, channels, 1)
        self.gate = rng.choice([nn.Sigmoid(), nn.Hardsigmoid()])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class Residual(nn.Module):
    """x + f(x), plain or selectable."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, rng: random.Random) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut
        self.add = SelectiveAdd() if rng.random() < 0.6 else None
        self.act = DemPReLU() if rng.random() < 0.7 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.body(x), self.shortcut(x)
        return self.act(a + b if self.add is None else self.add(a, b))


class Branches(nn.Module):
    """Concatenated branches."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Swap(nn.Module):
    """Two halves of the channels, exchanged; one of them goes through a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([self.layer(b), a], 1)


class Shuffle(nn.Module):
    """ShuffleNet's channel shuffle, by views."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Call(nn.Module):
    """A function without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class ChannelsLast(nn.Module):
    """(N, C, H, W) -> tokens (N, H W, C) -> MLP -> (N, C', H, W)."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(channels, 11), DemPReLU(channel_dim=-1), nn.Linear(11, outputs)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = self.fc2(self.act(self.fc1(x.flatten(2).transpose(1, 2))))
        return y.transpose(1, 2).reshape(n, -1, h, w)


def any_activation(rng: random.Random) -> nn.Module:
    return rng.choice([DemPReLU, DemPReLU, nn.ReLU, DemPSiLU, lambda: nn.LeakyReLU(0.05)])()


def any_norm(channels: int, rng: random.Random) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [lambda: nn.BatchNorm2d(channels)] * 4
    kinds += [lambda: nn.InstanceNorm2d(channels, affine=True), nn.Identity]
    groups = [g for g in (1, 2, 4) if channels % g == 0]
    return rng.choice(kinds + [lambda: nn.GroupNorm(rng.choice(groups), channels)])()


def any_conv(inputs: int, outputs: int, rng: random.Random) -> nn.Module:
    kernel = rng.choice([1, 3])
    groups = rng.choice([g for g in (1, 1, 1, 2, 4) if inputs % g == 0 and outputs % g == 0])
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=rng.random() < 0.5)


def any_stage(channels: int, rng: random.Random, depth: int) -> tuple[nn.Module, int]:
    """One random piece; returns it with its number of output channels."""
    wide = rng.choice([8, 12, 16])
    kind = rng.choice(
        ["conv"] * 4 + ["depthwise", "pool", "squeeze", "scale", "prelu", "shuffle", "pixel", "tokens", "transposed", "pad", "upsample"]
        + (["residual", "residual", "branches", "swap"] if depth < 2 else [])
    )
    if kind == "conv":
        layers = [any_conv(channels, wide, rng), nn.BatchNorm2d(wide), DemPReLU(inplace=True)]
        if rng.random() < 0.7:
            layers[1:] = [any_norm(wide, rng), any_activation(rng)]
        return nn.Sequential(*layers), wide
    if kind == "depthwise":
        times = rng.choice([1, 2])
        conv = nn.Conv2d(channels, channels * times, 3, padding=1, groups=channels, bias=rng.random() < 0.5)
        return nn.Sequential(conv, any_norm(channels * times, rng), any_activation(rng)), channels * times
    if kind == "pool":
        return rng.choice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(4)]), channels
    if kind == "squeeze":
        return Squeeze(channels, rng), channels
    if kind == "scale":
        return ChannelScale(channels, rng.random() < 0.5), channels
    if kind == "prelu":
        return nn.PReLU(rng.choice([1, channels])), channels
    if kind == "shuffle":
        groups = rng.choice([g for g in (2, 4) if channels % g == 0] or [1])
        return rng.choice([Shuffle, nn.ChannelShuffle])(groups), channels
    if kind == "pixel":
        if channels % 4:
            return nn.Identity(), channels
        return nn.Sequential(any_conv(channels, 16, rng), any_activation(rng), nn.PixelShuffle(2), nn.AvgPool2d(2)), 4
    if kind == "tokens":
        return ChannelsLast(channels, wide), wide
    if kind == "transposed":
        return nn.Sequential(nn.ConvTranspose2d(channels, wide, 3, padding=1), any_norm(wide, rng), any_activation(rng)), wide
    if kind == "pad":
        return rng.choice([nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3, 1)), Call(lambda x: F.pad(x, (1, 1), value=1.0)[..., 1:-1])]), channels
    if kind == "upsample":
        return nn.Sequential(nn.Upsample(scale_factor=2, mode=rng.choice(["nearest", "bilinear"])), nn.AvgPool2d(2)), channels
    if kind == "swap" and channels % 2 == 0:
        return Swap(nn.Sequential(nn.Conv2d(channels // 2, channels // 2, 1), any_activation(rng))), channels
    if kind == "branches":
        (a, to_a), (b, to_b) = any_stage(channels, rng, depth + 1), any_stage(channels, rng, depth + 1)
        parts = [a, b] + ([nn.Identity()] if rng.random() < 0.3 else [])
        return Branches(*parts), to_a + to_b + (channels if len(parts) == 3 else 0)
    first, middle = any_stage(channels, rng, depth + 1)
    outputs = channels if rng.random() < 0.6 else wide
    body = nn.Sequential(first, nn.Conv2d(middle, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
    shortcut: nn.Module = nn.Identity()
    if outputs != channels:
        shortcut = nn.Sequential(nn.Conv2d(channels, outputs, 1), nn.BatchNorm2d(outputs))
    return Residual(body, shortcut, rng), outputs


def any_head(channels: int, rng: random.Random) -> nn.Module:
    if rng.random() < 0.5:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))
    size = rng.choice([1, 2])
    hidden = [nn.Linear(channels * size * size, 9), DemPReLU(), nn.Linear(9, 3)]
    return nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten(), *hidden)


def random_net(seed: int) -> nn.Module:
    """A network from (N, 3, 8, 8) to (N, 3), decided by the seed alone."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    stem, channels = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), DemPReLU()), 8
    pieces: list[nn.Module] = [stem]
    for _ in range(rng.randint(1, 5)):
        piece, channels = any_stage(channels, rng, 0)
        pieces.append(piece)
    return nn.Sequential(*pieces, any_head(channels, rng))
