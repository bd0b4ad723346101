"""Which layers read units, and where the constant that a removed unit gave them can go."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from .capture import origin
from .values import Parameter, Reader, Value

if TYPE_CHECKING:
    from .builder import Builder

__all__ = ["reads"]

aten = torch.ops.aten

LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)
FORWARDS = {kind.forward for kind in LAYERS}
"""What a module does to its own input is known of these only: a subclass may do more before."""


def reads(b: Builder, node: fx.Node, x: Value, bias: Parameter | None) -> None:
    """`node`, a convolution or a linear layer, contracts the units of `x`."""
    reader = _reader(b, node, x, bias)
    own = type(b.owner(node)[1]).forward in FORWARDS
    b.flow.contract(x.slot, takes_constants=reader.into is not None, by_layer=own)
    b.readers.append(reader)


def _reader(b: Builder, node: fx.Node, x: Value, bias: Parameter | None) -> Reader:
    path, module = b.owner(node)
    if type(module).forward not in FORWARDS:
        return Reader(x.slot, path, None, reason=f"{origin(node)} is no call of a layer of torch.nn")
    if b.calls(path) != 1:
        return Reader(x.slot, path, None, reason=f"{path} is called several times")
    if b.output_shapes and path not in {reader.path for reader in b.readers}:
        return Reader(x.slot, path, None, reason=f"{path} runs in training only")
    found = b.parameter(node.args[1])
    weight = found.name if found is not None and b.uses[found.name] == 1 else None
    if bias is not None:
        if b.uses[bias.name] > 1:
            return Reader(x.slot, path, None, reason=f"{path} shares its bias")
        return Reader(x.slot, path, bias.name, weight=weight)
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.batch_norm.default and users[0].args[0] is node:
        mean = b.parameter(users[0].args[3])
        if mean is not None and b.uses[mean.name] == 1:
            return Reader(x.slot, path, mean.name, sign=-1, weight=weight)
    return Reader(x.slot, path, None, reason=f"{path} has no bias, and no BatchNorm behind it")
