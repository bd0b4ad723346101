"""Small networks for the compaction tests, and ways to kill units of them."""
from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from demp_kernels import DemPReLU, SelectiveAdd, UnitGraph


class Chain(nn.Sequential):
    """VGG style: conv, BN, ReLU, pool, flatten, linear."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), DemPReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), DemPReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), DemPReLU(), nn.Linear(20, 5),
        )


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = DemPReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.add = SelectiveAdd()
        self.act2 = DemPReLU()
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(self.add(y, self.shortcut(x)))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), DemPReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), DemPReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )
        self.add = SelectiveAdd()
        self.act = DemPReLU()
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x)
        return self.act(self.add(self.body(x), skip))


class ResNet(nn.Module):
    """CIFAR style: 3x3 stem, identity and projection skips, pooled head."""

    def __init__(self, block: str = "basic") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), DemPReLU())
        if block == "basic":
            blocks = [Basic(24, 24), Basic(24, 24), Basic(24, 32, 2), Basic(32, 32)]
        else:
            blocks = [Bottleneck(24, 12, 24), Bottleneck(24, 12, 40, 2), Bottleneck(40, 12, 40), Bottleneck(40, 8, 40)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(32 if block == "basic" else 40, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(3 * 8 * 8, 30), DemPReLU(), nn.Linear(30, 24), DemPReLU(), nn.Linear(24, 5)
        )


class TransformerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), DemPReLU(channel_dim=-1), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 4, 16) * 0.1)
        self.blocks = nn.Sequential(TransformerBlock(16), TransformerBlock(16))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "basic": lambda: ResNet("basic"),
    "bottleneck": lambda: ResNet("bottleneck"),
    "mlp": MLP,
    "transformer": Transformer,
}


def inputs(batch: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=dtype)


@functools.cache
def _traced(name: str, dtype: torch.dtype) -> UnitGraph:
    return UnitGraph.trace(NETS[name]().to(dtype), inputs(dtype=dtype))


def traced(name: str, dtype: torch.dtype = torch.float32) -> UnitGraph:
    """The analysis of a net of that name; made once, since it depends on the structure alone."""
    return copy.deepcopy(_traced(name, dtype))


@torch.no_grad()
def kill(model: nn.Module, graph: UnitGraph, share: float = 0.4, seed: int = 0) -> dict[str, Tensor]:
    """Make random units dead for good: everything that could make them positive is outweighed by a bias of -1000 in
    front of the activation. Returns activation -> (units,) bool."""
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    dead = {}
    for name, units in graph.units.items():
        mask = torch.rand(units, generator=generator) < share
        mask[int(torch.randint(units, (1,), generator=generator))] = False
        dead[name] = mask
        before = bias_before(modules, graph, name)
        before[mask] = -1000.0
    return dead


def bias_before(modules: dict[str, nn.Module], graph: UnitGraph, activation: str) -> Tensor:
    """The bias vector, (units,), whose entry r shifts unit r just in front of the activation: the last one gated by it."""
    biases = [name for name, gate in graph.gates.items() if gate == activation and name.endswith("bias")]
    path = biases[-1].rpartition(".")[0]
    return modules[path].bias


def silenced(module: nn.Module, out: Tensor, dead: Tensor) -> Tensor:
    """The output of an activation with its dead units, (units,) bool, zero."""
    dim = getattr(module, "channel_dim", 1)
    if dead.numel() != out.shape[dim]:
        return out  # the trial run on fake tensors of the planned widths
    shape = [1] * out.dim()
    shape[dim] = -1
    return out * (~dead).to(out.dtype).view(shape)


@torch.no_grad()
def enforce(model: nn.Module, dead: dict[str, Tensor], units: Callable[[str], Tensor]) -> list:
    """Zero dead units by forward hooks (for networks in which no bias can kill). `units(name)` gives the original
    numbers of the units that an activation has now."""
    handles = []
    for name, mask in dead.items():
        module = model.get_submodule(name)

        def hook(module: nn.Module, _: object, out: Tensor, name: str = name, mask: Tensor = mask) -> Tensor:
            return silenced(module, out, mask[units(name)])

        handles.append(module.register_forward_hook(hook))
    return handles
