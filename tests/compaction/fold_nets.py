"""Networks with units that are constant, not zero, for the tests of folding."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_kernels as dk

IMAGES = torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
GONE = torch.arange(12) % 3 == 0


def first(act: nn.Module) -> list[nn.Module]:
    """Convolution, BatchNorm and activation of 12 units, of which GONE are to become constant."""
    return [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), act]


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


NETS: dict[str, Callable[[], nn.Sequential]] = {
    "conv with bias": lambda: nn.Sequential(*first(nn.SiLU()), nn.Conv2d(12, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), *head(7)),
    "conv before BatchNorm": lambda: nn.Sequential(
        *first(nn.GELU()), nn.Conv2d(12, 7, 3, stride=2, bias=False), nn.BatchNorm2d(7), nn.ReLU(), *head(7)
    ),
    "circular padding": lambda: nn.Sequential(
        *first(nn.ELU()), nn.Conv2d(12, 7, 3, padding=1, padding_mode="circular"), nn.ReLU(), *head(7)
    ),
    "transposed conv": lambda: nn.Sequential(*first(nn.Mish()), nn.ConvTranspose2d(12, 7, 1), nn.ReLU(), *head(7)),
    "gated": lambda: nn.Sequential(*first(nn.SiLU()), nn.Conv2d(12, 7, 1), Gate(7), nn.ReLU(), *head(7)),
    "pool, flatten, linear": lambda: nn.Sequential(
        *first(nn.LeakyReLU(0.1)), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 5)
    ),
    "two readers": lambda: nn.Sequential(*first(nn.ReLU6()), Fork(12), *head(14)),
    "depthwise between": lambda: nn.Sequential(
        *first(nn.SiLU()), nn.Conv2d(12, 12, 3, groups=12), nn.BatchNorm2d(12), nn.SiLU(), nn.Conv2d(12, 7, 1), nn.ReLU(), *head(7)
    ),
    "tokens": lambda: nn.Sequential(
        *first(nn.Hardswish()), nn.Flatten(2), Transpose(), nn.Linear(12, 7, bias=True), nn.GELU(), nn.Linear(7, 5)
    ),
    "relu": lambda: nn.Sequential(*first(nn.ReLU()), nn.Conv2d(12, 7, 1), nn.ReLU(), *head(7)),
}


MAPS: dict[str, tuple[Callable[[], nn.Sequential], int]] = {
    "zero padding": (lambda: nn.Sequential(*first(nn.SiLU()), nn.Conv2d(12, 7, 3, padding=1), nn.ReLU(), *head(7)), 1),
    "zero padding before BatchNorm": (
        lambda: nn.Sequential(
            *first(nn.GELU()), nn.Conv2d(12, 7, 5, padding=2, bias=False), nn.BatchNorm2d(7), nn.ReLU(), *head(7)
        ), 1,
    ),
    "stride of a transposed conv": (
        lambda: nn.Sequential(*first(nn.Mish()), nn.ConvTranspose2d(12, 7, 3, stride=2, output_padding=1), nn.ReLU(), *head(7)), 1,
    ),
    "grouped": (
        lambda: nn.Sequential(*first(nn.SiLU()), nn.Conv2d(12, 6, 3, padding=1, groups=3), nn.ReLU(), *head(6)), 3,
    ),
    "grouped and transposed": (
        lambda: nn.Sequential(*first(nn.SiLU()), nn.ConvTranspose2d(12, 6, 3, groups=3), nn.ReLU(), *head(6)), 3,
    ),
    "a pooled border": (
        lambda: nn.Sequential(*first(nn.ELU()), nn.AvgPool2d(3, 1, 1), nn.Conv2d(12, 7, 3, padding=1), nn.ReLU(), *head(7)), 1,
    ),
    "two readers": (lambda: nn.Sequential(*first(nn.SiLU()), Fork(12, padding=1), *head(14)), 1),
}
"""Networks in which a layer loses another constant at every position, and how many units stand in for the others."""


class Fork(nn.Module):
    def __init__(self, width: int, padding: int = 0) -> None:
        super().__init__()
        self.left = nn.Conv2d(width, 7, 3, padding=padding)
        self.right = nn.Conv2d(width, 7, 3, padding=padding, bias=False)
        self.norm = nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(self.left(x)), F.relu(self.norm(self.right(x)))], 1)


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@torch.no_grad()
def made_constant(net: nn.Module, shift: float = 0.7, gone: Tensor = GONE, scale: float = 0.0) -> nn.Module:
    """Random statistics everywhere; the units `gone` of the first BatchNorm (of a depthwise one too) get a scale, 0 for
    constants, and a shift."""
    net.double()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        if norm.num_features == 12:
            norm.weight[gone] = scale
            norm.bias[gone] = torch.linspace(-2, 1, int(gone.sum()), dtype=torch.float64) + shift
    return net


def graph_of(net: nn.Module) -> dk.UnitGraph:
    return dk.UnitGraph.trace(net, IMAGES)


def dead_of(graph: dk.UnitGraph) -> dict[str, Tensor]:
    return {name: GONE for name, units in graph.units.items() if units == 12}


IN_GROUPS = torch.arange(12) % 4 < 2


def units_gone(stand_ins: int) -> Tensor:
    """Of each group as many: two of four."""
    return GONE if stand_ins == 1 else IN_GROUPS


def padded(*reader: nn.Module, **how: Any) -> nn.Module:
    reader = reader or (nn.Conv2d(12, 7, 3, padding=1),)
    return made_constant(nn.Sequential(*first(nn.SiLU()), *reader, nn.ReLU(), *head(7)), **how).eval()


def bits(net: nn.Module) -> list[Tensor]:
    return [t.clone() for t in net.state_dict().values()]
