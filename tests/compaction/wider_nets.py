"""Random networks as in random_nets.py, with pieces around the other ops of the coverage in between."""
from __future__ import annotations

import random
from collections.abc import Callable

import torch
from random_nets import Call, Residual, any_activation, any_conv, any_head, any_norm, any_stage
from random_pieces import FUNCTIONS, Attention, Branches, Encoder, Functional, Halves, Tokens, Twice, parametrised
from torch import nn

from demp_kernels import DemPReLU


def _transposed(inputs: int, outputs: int, rng: random.Random) -> nn.Module:
    groups = rng.choice([g for g in (1, 1, 2, 4) if inputs % g == 0 and outputs % g == 0])
    return nn.ConvTranspose2d(inputs, outputs, 3, padding=1, groups=groups, bias=rng.random() < 0.7)


SMALL: dict[str, Callable[[int, int, random.Random], tuple[nn.Module, int]]] = {
    "function": lambda c, w, rng: (Call(rng.choice(FUNCTIONS)), c),
    "pixel": lambda c, w, rng: (nn.Sequential(any_conv(c, 16, rng), any_activation(rng), nn.PixelShuffle(2), nn.AvgPool2d(2)), 4),
    "unpixel": lambda c, w, rng: (nn.Sequential(nn.PixelUnshuffle(2), nn.Upsample(scale_factor=2)), 4 * c),
    "encoder": lambda c, w, rng: (Tokens(Encoder(c, w)), w),
    "attention": lambda c, w, rng: (Tokens(Attention(c)), c),
    "recurrent": lambda c, w, rng: (Tokens(rng.choice([nn.LSTM, nn.GRU, nn.RNN])(c, w // 2, batch_first=True, bidirectional=True)), w),
    "layer norm": lambda c, w, rng: (Tokens(nn.Sequential(nn.LayerNorm(c), nn.Linear(c, w))), w),
    "functional": lambda c, w, rng: (nn.Sequential(Functional(c, w, rng.choice(["einsum", "matmul", "conv"])), any_activation(rng)), w),
    "parametrised": lambda c, w, rng: (nn.Sequential(parametrised(c, w, rng), any_activation(rng)), w),
    "twice": lambda c, w, rng: (Twice(c), c),
    "glu": lambda c, w, rng: (nn.Sequential(any_conv(c, 16, rng), any_activation(rng), nn.GLU(1)), 8),
    "transposed": lambda c, w, rng: (nn.Sequential(_transposed(c, w, rng), any_norm(w, rng), any_activation(rng)), w),
}
"""Pieces without pieces in them: (channels, a width, random numbers) -> (module, output channels)."""


def _nested(channels: int, wide: int, rng: random.Random, depth: int) -> tuple[nn.Module, int]:
    """A piece made of pieces."""
    kind = rng.choice(["branches", "joined", "residual", "residual"] + ["halves"] * 2 * (channels % 2 == 0))
    if kind == "branches":
        (a, to_a), (b, to_b) = wider_stage(channels, rng, depth + 1), wider_stage(channels, rng, depth + 1)
        return Branches(a, b), to_a + to_b
    if kind == "joined":
        two = [nn.Sequential(any_conv(channels, wide, rng), any_norm(wide, rng), any_activation(rng)) for _ in range(2)]
        return Branches(*two, join=rng.choice(["product", "maximum", "stack"])), wide
    if kind == "halves":
        layer = nn.Sequential(nn.Conv2d(channels // 2, channels // 2, 1), any_activation(rng))
        return Halves(layer, channels, rng.choice(["chunk", "split", "slices", "written"])), channels
    first, middle = wider_stage(channels, rng, depth + 1)
    body = nn.Sequential(first, nn.Conv2d(middle, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
    return Residual(body, nn.Identity(), rng), channels


def wider_stage(channels: int, rng: random.Random, depth: int) -> tuple[nn.Module, int]:
    """One random piece; returns it with its number of output channels."""
    draw = rng.random()
    if draw < 0.4:
        return any_stage(channels, rng, depth + 1)
    if draw < 0.6 and depth < 2:
        return _nested(channels, rng.choice([8, 12, 16]), rng, depth)
    kind = rng.choice([kind for kind in SMALL if kind != "attention" or channels % 2 == 0])
    return SMALL[kind](channels, rng.choice([8, 12, 16]), rng)


def wider_net(seed: int) -> nn.Module:
    """A network from (N, 3, 8, 8) to (N, 3), decided by the seed alone."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    channels = 8
    pieces: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), DemPReLU())]
    for _ in range(rng.randint(2, 5)):
        piece, channels = wider_stage(channels, rng, 0)
        pieces.append(piece)
    return nn.Sequential(*pieces, any_head(channels, rng))
