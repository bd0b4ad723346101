"""Rules of elementwise ops: activations, arithmetic, residual additions."""
from __future__ import annotations

import operator

import numpy as np
import torch
from torch import fx, nn

from ..modules import DemPActivation
from .builder import Builder, rule
from .capture import origin
from .flow import Link
from .rules_layers import arguments, output_shape
from .rules_shape import equal_parts
from .values import Selection, Value, along

aten = torch.ops.aten

ACTIVATION_MODULES = (
    DemPActivation, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.CELU, nn.SELU,
    nn.Mish,
)
"""Modules whose units can die: f(0) = 0, and mostly zero or near it for negative inputs."""


@rule(
    "relu.default", "relu_.default", "relu6.default", "relu6_.default", "leaky_relu.default",
    "leaky_relu_.default", "gelu.default", "silu.default", "silu_.default", "hardswish.default",
    "hardswish_.default", "elu.default", "elu_.default", "celu.default", "celu_.default",
    "selu.default", "selu_.default", "mish.default", "mish_.default", "tanh.default", "tanh_.default",
)
def zero_to_zero(b: Builder, node: fx.Node) -> Value:
    """Functions with f(0) = 0, activations among them."""
    x = b.value(node.args[0])
    return activation(b, node, x) if x is not None else NotImplemented


@rule("hardtanh.default", "hardtanh_.default", "clamp.default", "clamp_.default")
def clamped(b: Builder, node: fx.Node) -> Value:
    low, high = (*node.args[1:], *node.kwargs.values(), None, None)[:2]
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        low, high = arguments(node, "min_val", "max_val")
    x = b.value(node.args[0])
    if x is None:
        return NotImplemented
    if not all(limit is None or isinstance(limit, (int, float)) for limit in (low, high)):
        return NotImplemented
    if (low or 0) <= 0 <= (high or 0):
        return activation(b, node, x)
    return b.affine(x)


@rule("prelu.default")
def prelu(b: Builder, node: fx.Node) -> Value:
    """One slope, or one a channel."""
    x, weight = b.value(node.args[0]), b.parameter(node.args[1])
    if x is None or weight is None:
        return NotImplemented
    if weight.shape == (1,) or len(x.shape) < 2:
        return activation(b, node, x)
    x = b.uniform_except(x, 1)
    b.align(weight, 0, x.axis(1))
    b.attribute(b.owner(node)[0], "num_parameters", x.axis(1))
    out = activation(b, node, x)
    b.makes(weight, out)
    return out


FUNCTIONAL = {
    "relu": "relu", "relu_": "relu", "relu6": "relu6", "relu6_": "relu6", "leaky_relu": "leakyrelu",
    "leaky_relu_": "leakyrelu", "gelu": "gelu", "silu": "silu", "silu_": "silu", "hardswish": "hardswish",
    "hardswish_": "hardswish", "elu": "elu", "elu_": "elu", "mish": "mish", "mish_": "mish",
}
"""Activations called as functions, and how `prepare` would name their module."""


def activation(b: Builder, node: fx.Node, x: Value) -> Value:
    """f(x) with f(0) = 0. If it is an activation, as a module or as a function, its units are registered; a functional
    one is named `<module that calls it>.relu`, further ones `.relu_1`, ..., as `prepare` does."""
    path, module = b.owner(node)
    kind = None if isinstance(module, ACTIVATION_MODULES) else FUNCTIONAL.get(str(node.target).split(".")[1], "")
    dim = _unit_dim(module, x) if kind != "" else None
    if dim is None:
        return b.same(x)
    x = b.full_axis(x, dim)
    number = b.activation_number(path, kind, x.axis(dim), dim)
    out = b.derive(x.shape, x.atoms, "sum", [Link(x.slot)], activation=number)
    b.activations[number].slots.append(out.slot)
    return out


def _unit_dim(module: nn.Module | None, x: Value) -> int | None:
    """The dimension that holds an activation's units; None if it has none that can be told."""
    if len(x.shape) < 2:
        return None
    if isinstance(module, DemPActivation):
        dim = module.channel_dim % len(x.shape)
        return dim if x.unit_dims in ([], [dim]) else None
    if not x.unit_dims and x.atoms.any():
        # one unit is left: its dimension does not show, the usual place is taken
        dim = 2 if len(x.shape) == 3 else 1
        return dim if x.shape[dim] == 1 else None
    return x.unit_dims[0] if len(x.unit_dims) == 1 else None


@rule(
    "dropout.default", "dropout_.default", "feature_dropout.default", "feature_dropout_.default",
    "clone.default", "abs.default", "neg.default", "sign.default", "_to_copy.default",
    "to.dtype", "to.device", "to.dtype_layout", "to.other", "type_as.default", "sin.default",
    "square.default", "floor.default", "round.default", "expm1.default", "log1p.default",
    "softshrink.default", "hardshrink.default", "lift_fresh_copy.default", "erf.default", "sinh.default", "tan.default",
    "asin.default", "atan.default", "asinh.default", "trunc.default", "rrelu.default", "rrelu_.default",
)
def unchanged_zero(b: Builder, node: fx.Node) -> Value:
    """Elementwise functions with f(0) = 0 that are no activations."""
    x = b.value(node.args[0])
    return b.same(x) if x is not None else NotImplemented


@rule("detach.default", "detach_.default", "alias.default", "contiguous.default", "lift_fresh.default")
def same_memory(b: Builder, node: fx.Node) -> Value:
    x = b.value(node.args[0])
    return b.same(x, view=True) if x is not None else NotImplemented


@rule(
    "sigmoid.default", "sigmoid_.default", "hardsigmoid.default", "hardsigmoid_.default", "exp.default",
    "softplus.default", "cos.default", "log.default", "sqrt.default", "rsqrt.default",
    "reciprocal.default", "rsub.Scalar", "bitwise_not.default", "log_sigmoid.default",
    "logical_not.default", "clamp_min.default", "clamp_max.default", "threshold.default",
    "gt.Scalar", "ge.Scalar", "lt.Scalar", "le.Scalar", "eq.Scalar", "ne.Scalar",
    "alpha_dropout.default", "feature_alpha_dropout.default", "zeros_like.default", "ones_like.default",
    "full_like.default", "rand_like.default", "randn_like.default",
)
def elementwise(b: Builder, node: fx.Node) -> Value:
    """Any other function of each element alone, or of its place alone. A dropped element of alpha_dropout is not zero."""
    x = b.value(node.args[0])
    return b.affine(x) if x is not None else NotImplemented


@rule("pow.Tensor_Scalar")
def power(b: Builder, node: fx.Node) -> Value:
    """Zero to zero for exponents from one; below, the gradient at zero is infinite."""
    x = b.value(node.args[0])
    return NotImplemented if x is None else b.same(x) if node.args[1] >= 1 else b.affine(x)


@rule("add.Tensor", "add_.Tensor", "sub.Tensor", "sub_.Tensor")
def addition(b: Builder, node: fx.Node) -> Value:
    first, second = b.value(node.args[0]), b.value(node.args[1])
    if first is None or second is None:
        one, number = (first, node.args[1]) if second is None else (second, node.args[0])
        return NotImplemented if one is None else b.same(one) if number == 0 else b.affine(one)
    path, module = b.owner(node)
    if hasattr(module, "set_selection") and module.index is None and b.calls(path) == 1:
        second = _selected(b, node, module, first, second)
    return combine(b, node, [first, second], "sum")


@rule("mul.Tensor", "mul_.Tensor")
def product(b: Builder, node: fx.Node) -> Value:
    operands = [value for value in map(b.value, node.args[:2]) if value is not None]
    return combine(b, node, operands, "product") if len(operands) == 2 else b.same(operands[0])


@rule("div.Tensor", "div_.Tensor")
def quotient(b: Builder, node: fx.Node) -> Value:
    operands = [value for value in map(b.value, node.args[:2]) if value is not None]
    if b.value(node.args[0]) is None:
        return b.affine(operands[0])
    if len(operands) == 1:
        return b.same(operands[0])
    return combine(b, node, [operands[0], b.affine(operands[1])], "product")  # zero where the numerator is


@rule("glu.default")
def gated_half(b: Builder, node: fx.Node) -> Value:
    """a * sigmoid(b) of the halves a and b along a dimension; unit i of both goes or stays."""
    dim = arguments(node, "dim")[0] % len(output_shape(node))
    x = b.value(node.args[0])
    if x is None:
        return NotImplemented
    first, second = equal_parts(b, x, dim, [output_shape(node)] * 2)
    return combine(b, node, [first, b.affine(second)], "product")


@rule(
    "pow.Tensor_Tensor", "atan2.default", "gt.Tensor", "lt.Tensor", "ge.Tensor", "le.Tensor", "eq.Tensor",
    "where.self", "lerp.Scalar", "lerp.Tensor", "addcmul.default", "masked_fill.Scalar",
)
def elementwise_of_several(b: Builder, node: fx.Node) -> Value:
    operands = [value for value in map(b.value, node.args) if value is not None]
    return combine(b, node, operands, "affine") if operands else NotImplemented


@rule("maximum.default", "minimum.default")
def extreme(b: Builder, node: fx.Node) -> Value:
    """Zero where both are."""
    operands = [value for value in map(b.value, node.args) if value is not None]
    return combine(b, node, operands, "sum") if len(operands) == 2 else NotImplemented


@rule("sym_size.int", operator.getitem)
def item(b: Builder, node: fx.Node) -> object:
    """One of several outputs."""
    values = b.env.get(node.args[0])
    return values[node.args[1]] if isinstance(values, (list, tuple)) else b.plain_like(node)


# --- several operands ------------------------------------------------------------------------------------------------


def combine(b: Builder, node: fx.Node, operands: list[Value], kind: str) -> Value:
    """An elementwise function of tensors that are broadcast against each other.

    Units that meet are tied. An operand of size 1 along a dimension that carries units in another one belongs to all
    of them: if it has units of its own, it is kept whole. A tensor without units that has an entry for each unit (a
    constant made in the forward) cannot be cut: it keeps the units that it meets.
    """
    shape = output_shape(node)
    operands = [_of_rank(v, len(shape)) for v in operands]
    varying = [max(v.atoms.shape[d] for v in operands) > 1 for d in range(len(shape))]
    met: list[Value] = []
    for v in operands:
        belongs_to_all = any(varying[d] and v.shape[d] == 1 < shape[d] for d in range(len(shape)))
        if belongs_to_all and v.atoms.any():
            b.pin(v, f"{origin(node)} spreads it over other units")
        covers = [d for d in range(len(shape)) if varying[d] and v.shape[d] == shape[d]]
        if not belongs_to_all and (covers or v.atoms.any()):
            met.append(v)
    if not met:
        return b.plain(shape)
    for v in met[1:]:
        b.atoms.tie(met[0].atoms, v.atoms)
    if not all(v.atoms.any() for v in met):
        b.pin(met, f"{origin(node)} joins them with a tensor that cannot be cut")
    # along a dimension where one of them is uniform, the ties make all of them so
    uniform = tuple(slice(0, 1) if any(v.atoms.shape[d] == 1 for v in met) else slice(None) for d in range(len(shape)))
    atoms = met[0].atoms[uniform]
    links = [_link(v, atoms.shape) for v in met]
    if (kind == "product" and len(met) == 1) or (kind == "sum" and len(operands) == 1):
        return b.same(met[0], shape)
    return b.derive(shape, atoms, kind if kind == "product" or len(met) == len(operands) else "affine", links)


def _of_rank(v: Value, rank: int) -> Value:
    missing = (1,) * (rank - len(v.shape))
    return Value((*missing, *v.shape), v.atoms.reshape(*missing, *v.atoms.shape), v.slot, v.storage)


def _link(v: Value, out: tuple[int, ...]) -> Link:
    """Which entries of `v` make which entries of a value whose atoms have shape `out`."""
    if v.atoms.shape == out:
        return Link(v.slot)
    full = np.broadcast_shapes(v.atoms.shape, out)
    source = np.broadcast_to(np.arange(v.atoms.size).reshape(v.atoms.shape), full)
    target = np.broadcast_to(np.arange(int(np.prod(out))).reshape(out), full)
    return Link(v.slot, source.ravel(), target.ravel())


# --- residual additions with a selection -----------------------------------------------------------------------------


def _selected(b: Builder, node: fx.Node, module: nn.Module, first: Value, skip: Value) -> Value:
    """The skip of a SelectiveAdd, with units of its own: its channels need not be those of the sum."""
    dim = module.channel_dim % len(skip.shape)
    if first.shape != skip.shape or any(set(v.unit_dims) - {dim} for v in (first, skip)):
        return skip
    skip = b.full_axis(skip, dim)
    everything = np.arange(skip.shape[dim])
    return _select(b, node, skip, skip.shape, dim, everything, everything)


def channel_selection(b: Builder, node: fx.Node) -> Value:
    """The selection that an earlier compaction made in a SelectiveAdd."""
    x, (path, module) = b.value(node.args[0]), b.owner(node)
    if x is None or getattr(module, "index", None) is None or b.calls(path) != 1:
        return NotImplemented
    dim = module.channel_dim % len(x.shape)
    index = module.index.cpu().numpy()
    present = np.nonzero(index >= 0)[0]
    return _select(b, node, b.full_axis(x, dim), output_shape(node), dim, index[present], present)


def _select(
    b: Builder, node: fx.Node, skip: Value, shape: tuple[int, ...], dim: int, source: np.ndarray, target: np.ndarray
) -> Value:
    atoms = along(b.atoms.fresh(shape[dim]), dim, len(shape))
    out = b.derive(shape, atoms, "sum", [Link(skip.slot, source, target)])
    path = b.owner(node)[0]
    if path not in (selection.name for selection in b.selections):
        b.selections.append(Selection(path, skip.slot, out.slot, node.meta["val"].device))
    return out
