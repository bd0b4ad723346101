"""Pieces of the random networks: modules from (N, C, H, W) to (N, C', H, W), each around one op of the coverage."""
from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from demp_kernels import DemPReLU


class Branches(nn.Module):
    """Branches that are joined: side by side, multiplied, or the larger of both."""

    def __init__(self, *branches: nn.Module, join: str = "cat") -> None:
        super().__init__()
        self.branches, self.join = nn.ModuleList(branches), join

    def forward(self, x: Tensor) -> Tensor:
        found = [branch(x) for branch in self.branches]
        if self.join == "product":
            return found[0] * found[1]
        if self.join == "maximum":
            return torch.maximum(*found)
        if self.join == "stack":
            return torch.stack(found, 2).sum(2)
        return torch.cat(found, 1)


class Halves(nn.Module):
    """Two halves of the channels, got at in the ways there are; one goes through a layer of its own."""

    def __init__(self, layer: nn.Module, channels: int, how: str) -> None:
        super().__init__()
        self.layer, self.how, self.number = layer, how, channels // 2

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        if self.how == "chunk":
            a, b = x.chunk(2, 1)
        elif self.how == "split":
            a, b = x.split(half, 1)
        elif self.how == "slices":
            a, b = x[:, :half], x[:, half:]
        else:  # a number that is written down
            a, b = x[:, : self.number], x[:, self.number :]
        return torch.cat([self.layer(b), a], 1)


class Twice(nn.Module):
    """One layer and one activation, called twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(channels, channels, 3, padding=1), DemPReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.act(self.conv(x))))


class Functional(nn.Module):
    """Layers called as functions, on parameters of the module itself."""

    def __init__(self, channels: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        shape = (channels, outputs) if kind == "matmul" else (outputs, channels)
        self.weight = nn.Parameter(torch.randn(shape) / channels**0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "einsum":
            return torch.einsum("nchw,oc->nohw", x, self.weight)
        if self.kind == "matmul":
            return (x.permute(0, 2, 3, 1) @ self.weight).permute(0, 3, 1, 2)
        return F.conv2d(x, self.weight[..., None, None])


class Tokens(nn.Module):
    """(N, C, H, W) -> tokens (N, H W, C) -> a layer on tokens -> (N, C', H, W)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = self.layer(x.flatten(2).transpose(1, 2))
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2).reshape(n, -1, h, w)


class Encoder(nn.Module):
    """A transformer block behind a projection."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.project, self.norm1, self.norm2 = nn.Linear(channels, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 10), DemPReLU(channel_dim=-1), nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Attention(nn.Module):
    """Attention straight on units, which must stay whole."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


def mlp(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, 11), DemPReLU(channel_dim=-1), nn.Linear(11, outputs))


def parametrised(channels: int, outputs: int, rng: random.Random) -> nn.Module:
    conv = nn.Conv2d(channels, outputs, 3, padding=1)
    return rng.choice([parametrizations.weight_norm, parametrizations.spectral_norm])(conv)


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.flip(1),
    lambda x: x.flip(2),
    lambda x: x.roll(1, 1),
    lambda x: x * x.norm(dim=1, keepdim=True),
    lambda x: x - x.sum(1, keepdim=True) / x.shape[1],
    lambda x: x * x.shape[1] ** -0.5,
    lambda x: x / (1 + x.abs()),
    lambda x: F.pad(x, (1, 1), value=1.0)[..., 1:-1],
    lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")[..., ::2, ::2],
    lambda x: x + x.amax((2, 3), keepdim=True),
    lambda x: x.softmax(1),
    lambda x: x.cumsum(2),
    lambda x: F.instance_norm(x),
]
