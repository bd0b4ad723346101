"""Rules of the layers that own parameters: convolutions, linear layers, matrix products, normalisations."""
from __future__ import annotations

import numpy as np
import torch
from torch import fx

from .builder import Builder, rule
from .capture import origin
from .flow import Link
from .readers import reads
from .values import Balance, Floor, Parameter, Value, along

aten = torch.ops.aten


def arguments(node: fx.Node, *names: str) -> list:
    """The named arguments of an ATen call, with the schema's defaults."""
    schema = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema}
    given.update({argument.name: value for argument, value in zip(schema, node.args)})
    given.update(node.kwargs)
    return [given[name] for name in names]


def output_shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(s) for s in node.meta["val"].shape)


def _parameters(b: Builder, *nodes: object) -> list[Parameter | None] | None:
    """The parameters that some arguments are (None stays None); None if one of them is a computed tensor."""
    found = [b.parameter(node) for node in nodes]
    return None if any(p is None and node is not None for p, node in zip(found, nodes)) else found


@rule(
    "conv1d.default", "conv2d.default", "conv3d.default",
    "conv1d.padding", "conv2d.padding", "conv3d.padding",
)
def convolution(b: Builder, node: fx.Node) -> Value:
    """Weight (O, I / groups, *). One group: the input's units end here and new ones begin."""
    x_node, w_node, bias_node, stride, groups = arguments(node, "input", "weight", "bias", "stride", "groups")
    x, parameters = b.value(x_node), _parameters(b, w_node, bias_node)
    if x is None or parameters is None or parameters[0] is None or len(x.shape) != len(parameters[0].shape):
        return NotImplemented
    weight, bias = parameters
    shape = output_shape(node)
    x = b.uniform_except(x, 1)
    channels = x.axis(1)
    path, _ = b.owner(node)
    if groups > 1:
        return _grouped(b, node, x, weight, bias, groups)
    b.align(weight, 1, channels)
    reads(b, node, x, bias)
    b.attribute(path, "in_channels", channels)
    if all(k == 1 for k in weight.shape[2:]) and any(s > 1 for s in stride):
        _keep_for_onednn(b, node, weight, channels)
    return new_units(b, node, shape, 1, weight, 0, bias, path, "out_channels")


def new_units(
    b: Builder, node: fx.Node, shape: tuple[int, ...], dim: int, weight: Parameter | None, weight_dim: int,
    bias: Parameter | None, path: str, attribute: str,
) -> Value:
    """The output of a contraction: new units along `dim`, found along `weight_dim` of the weight and in the bias."""
    out = b.fresh(shape, dim, f"{origin(node)} keeps one output")
    b.align(weight, weight_dim, out.axis(dim))
    b.align(bias, 0, out.axis(dim))
    b.makes(weight if weight_dim == 0 else None, out)
    b.makes(bias, out)
    b.attribute(path, attribute, out.axis(dim))
    return out


def _keep_for_onednn(b: Builder, node: fx.Node, weight: Parameter, channels: np.ndarray) -> None:
    # uxlfoundation/oneDNN#6035: with fewer input channels than a SIMD block the weight gradient of a strided 1x1
    # convolution in channels_last writes past its workspace: it hangs, crashes or is wrong (torch 2.13, 2.14). Grouped ones
    # take another kernel, which is right at any width. Where a floor does not help (fewer inputs from the start, another
    # device, a kernel's instruction set that is not torch's) compaction makes the layer a SubsampledConv2d.
    tensor = b.tensor(weight.name)
    if tensor.device.type != "cpu":
        return
    block = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 16)
    b.floors.append(Floor(channels, block, f"{origin(node)} needs {block} inputs (oneDNN#6035)"))


def _grouped(
    b: Builder, node: fx.Node, x: Value, weight: Parameter, bias: Parameter | None, groups: int, *, transposed: bool = False
) -> Value:
    """Depthwise: an output goes with its input. Otherwise the groups keep equal numbers of inputs and of outputs.

    Dimension 0 of the weight is that of all outputs, of a transposed convolution that of all inputs; dimension 1 that of
    one group's inputs, or outputs.
    """
    shape, path = output_shape(node), b.owner(node)[0]
    if not b.states(path, "groups", groups):
        return NotImplemented  # a number written down: it would not follow
    x = b.full_axis(x, 1)
    channels = x.axis(1)
    b.attribute(path, "in_channels", channels)
    if groups < x.shape[1]:
        reads(b, node, x, bias)
        out = new_units(b, node, shape, 1, None if transposed else weight, 0, bias, path, "out_channels")
        inputs, outputs = channels.reshape(groups, -1), out.axis(1).reshape(groups, -1)
        b.attribute(path, "groups", outputs)
        if transposed:
            b.align(weight, 0, channels)
        b.balances.append(Balance(weight.name, *((inputs, outputs) if transposed else (outputs, inputs))))
        return out
    source = np.repeat(np.arange(groups), shape[1] // groups)
    atoms = channels[source]
    b.align(weight, 0, channels if transposed else atoms)
    b.align(bias, 0, atoms)
    b.attribute(path, "out_channels", atoms)
    b.attribute(path, "groups", channels)
    kind = "sum" if bias is None else "affine"
    out = b.derive(shape, along(atoms, 1, len(shape)), kind, [Link(x.slot, source, np.arange(source.size))])
    b.makes(weight, out)
    b.makes(bias, out)
    return out


@rule("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")
def transposed_convolution(b: Builder, node: fx.Node) -> Value:
    """Weight (I, O / groups, *)."""
    x_node, w_node, bias_node, groups = arguments(node, "input", "weight", "bias", "groups")
    x, parameters = b.value(x_node), _parameters(b, w_node, bias_node)
    if x is None or parameters is None or parameters[0] is None or len(x.shape) != len(parameters[0].shape):
        return NotImplemented
    weight, bias = parameters
    x = b.uniform_except(x, 1)
    if groups > 1:
        return _grouped(b, node, x, weight, bias, groups, transposed=True)
    b.align(weight, 0, x.axis(1))
    reads(b, node, x, bias)
    path, _ = b.owner(node)
    b.attribute(path, "in_channels", x.axis(1))
    return new_units(b, node, output_shape(node), 1, weight, 1, bias, path, "out_channels")


@rule("linear.default")
def linear(b: Builder, node: fx.Node) -> Value:
    """Weight (out, in), units in the last dimension."""
    x_node, w_node, bias_node = arguments(node, "input", "weight", "bias")
    x, parameters = b.value(x_node), _parameters(b, w_node, bias_node)
    if x is None or parameters is None or parameters[0] is None or len(parameters[0].shape) != 2:
        return NotImplemented
    weight, bias = parameters
    shape, last = output_shape(node), len(x.shape) - 1
    x = b.uniform_except(x, last)
    b.align(weight, 1, x.axis(last))
    reads(b, node, x, bias)
    path, _ = b.owner(node)
    b.attribute(path, "in_features", x.axis(last))
    return new_units(b, node, shape, last, weight, 0, bias, path, "out_features")


@rule("t.default", "transpose.int", "permute.default", "numpy_T.default", "mT.default")
def transposed_parameter(b: Builder, node: fx.Node) -> object:
    """A transposed parameter is still that parameter; transposed values are the business of rules_shape."""
    parameter = b.parameter(node.args[0])
    rank = len(output_shape(node))
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [d % rank for d in node.args[1]]
    elif node.target is aten.transpose.int:
        first, second = (d % rank for d in node.args[1:3])
        order[first], order[second] = order[second], order[first]
    elif rank >= 2:
        order = order[:-2] + [rank - 1, rank - 2] if node.target is aten.mT.default else order[::-1]
    if parameter is None:
        return b.rearrange(node, lambda array: array.transpose(order))
    return Parameter(parameter.name, output_shape(node), tuple(parameter.dims[d] for d in order))


@rule("batch_norm.default")
def batch_norm(b: Builder, node: fx.Node) -> Value:
    names = ("input", "weight", "bias", "running_mean", "running_var")
    return _channel_norm(b, node, arguments(node, *names))


@rule("instance_norm.default")
def instance_norm(b: Builder, node: fx.Node) -> Value:
    names = ("input", "weight", "bias", "running_mean", "running_var")
    nodes = arguments(node, *names)
    if any(one is not None for one in nodes[1:]):
        return _channel_norm(b, node, nodes)
    x = b.value(nodes[0])  # without parameters and statistics a channel of zeros stays one
    if x is None:
        return NotImplemented
    x = b.uniform_except(x, 1)
    b.attribute(b.owner(node)[0], "num_features", x.axis(1))
    return b.same(x)


@rule("group_norm.default")
def group_norm(b: Builder, node: fx.Node) -> Value:
    """Statistics over a group: removing one of its channels would change the others, so a group goes as a whole."""
    x_node, groups, *parameters = arguments(node, "input", "num_groups", "weight", "bias")
    path, _ = b.owner(node)
    if not b.states(path, "num_groups", groups):
        return NotImplemented  # a number written down: it would not follow
    out = _channel_norm(b, node, [x_node, *parameters])
    if isinstance(out, Value) and out.atoms.size == out.shape[1]:
        members = out.axis(1).reshape(groups, -1)
        b.atoms.tie(members, members[:, :1])
        b.attribute(path, "num_groups", members)
        b.attribute(path, "num_channels", out.axis(1))
    return out


def _channel_norm(b: Builder, node: fx.Node, nodes: list) -> Value:
    """Normalisation of each channel on its own; parameters and statistics have one entry a channel."""
    x, parameters = b.value(nodes[0]), _parameters(b, *nodes[1:])
    if x is None or parameters is None:
        return NotImplemented
    x = b.uniform_except(x, 1)
    for parameter in parameters:
        b.align(parameter, 0, x.axis(1))
    b.attribute(b.owner(node)[0], "num_features", x.axis(1))
    out = b.affine(x)
    for parameter in parameters:
        b.makes(parameter, out)
    return out


@rule("layer_norm.default", "rms_norm.default")
def layer_norm(b: Builder, node: fx.Node) -> Value:
    """Statistics over the last dimensions: units there are kept, since removing one changes all others."""
    x_node, normalised, *_ = arguments(node, "input", "normalized_shape")
    x = b.value(x_node)
    if x is None:
        return NotImplemented
    if any(d >= len(x.shape) - len(normalised) for d in x.unit_dims):
        b.pin(x, f"{origin(node)} takes statistics over the units")
    return b.affine(x)
