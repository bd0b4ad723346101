"""Rules of ops that combine elements of one tensor: pooling, means, softmax, interpolation."""
from __future__ import annotations

import numpy as np
import torch
from torch import fx

from ..ops import channel_select  # noqa: F401  (defines the op that `channel_selection` is the rule of)
from .builder import Builder, rule
from .capture import origin
from .rules_layers import arguments, output_shape
from .rules_pointwise import channel_selection
from .values import Value

aten = torch.ops.aten

rule(torch.ops.demp_kernels.channel_select.default)(channel_selection)


@rule(
    "max_pool1d.default", "max_pool2d.default", "max_pool3d.default", "avg_pool1d.default",
    "avg_pool2d.default", "avg_pool3d.default", "adaptive_avg_pool1d.default",
    "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default", "lp_pool2d.default",
    "upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec",
    "upsample_bilinear2d.vec", "upsample_bicubic2d.vec", "upsample_linear1d.vec",
    "upsample_trilinear3d.vec", "_upsample_nearest_exact2d.vec", "_upsample_bilinear2d_aa.vec",
    "upsample_nearest2d.default", "upsample_bilinear2d.default", "upsample_bicubic2d.default",
    "grid_sampler.default", "grid_sampler_2d.default", "grid_sampler_3d.default",
)
def spatial(b: Builder, node: fx.Node) -> Value:
    """(N, C, *): each channel on its own, zero to zero. Dimension 1 stays, those after it may carry no units."""
    x, shape = b.value(node.args[0]), output_shape(node)
    if x is None or any(x.shape[d] != shape[d] for d in x.unit_dims) or any(d > 1 for d in x.unit_dims):
        return NotImplemented
    if any(v.unit_dims for v in map(b.value, node.args[1:]) if v is not None):
        return NotImplemented  # a grid made of units
    return b.same(x, shape)


@rule(
    "max_pool2d_with_indices.default", "max_pool3d_with_indices.default", "adaptive_max_pool1d.default",
    "adaptive_max_pool2d.default", "adaptive_max_pool3d.default",
)
def spatial_with_indices(b: Builder, node: fx.Node) -> object:
    x = b.value(node.args[0])
    if x is None or any(d > 1 for d in x.unit_dims):
        return NotImplemented
    pooled, indices = (tuple(v.shape) for v in node.meta["val"])
    return [b.same(x, pooled), b.affine(b.same(x, indices))]


@rule(
    "mean.dim", "mean.default", "sum.dim_IntList", "sum.default", "amax.default", "amin.default",
    "var.correction", "std.correction", "var.dim", "std.dim", "linalg_vector_norm.default",
)
def reduction(b: Builder, node: fx.Node) -> Value:
    """Reduction over dimensions without units, or the sum or norm over units, to which zero units contribute nothing."""
    x = b.value(node.args[0])
    if x is None:
        return NotImplemented
    names = [argument.name for argument in node.target._schema.arguments]
    dims = arguments(node, "dim")[0] if "dim" in names else None
    rank = len(x.shape)
    reduced = {d % rank for d in ([dims] if isinstance(dims, int) else dims)} if dims else set(range(rank))
    if reduced & set(x.unit_dims):
        norm = node.target is aten.linalg_vector_norm.default and arguments(node, "ord")[0] in (1, 2)
        if not (norm or node.target in (aten.sum.dim_IntList, aten.sum.default)) or set(x.unit_dims) - reduced:
            b.pin(x, f"{origin(node)} combines its units")
        b.flow.contract(x.slot)
        return b.plain(output_shape(node))
    keep_dims = "keepdim" in names and arguments(node, "keepdim")[0]
    shape = tuple(1 if d in reduced else size for d, size in enumerate(x.atoms.shape) if keep_dims or d not in reduced)
    if node.target in (aten.std.correction, aten.std.dim, aten.linalg_vector_norm.default):
        x = b.affine(x)  # their gradient at zero is not zero
    return Value(output_shape(node), x.atoms.reshape(shape), x.slot)


@rule("max.dim", "min.dim")
def extreme_with_place(b: Builder, node: fx.Node) -> object:
    """Over a dimension without units."""
    x = b.value(node.args[0])
    if x is None or node.args[1] % len(x.shape) in x.unit_dims:
        return NotImplemented
    dim, keep_dim = node.args[1] % len(x.shape), arguments(node, "keepdim")[0]
    atoms = x.atoms if keep_dim else x.atoms.squeeze(dim)
    values, places = (tuple(v.shape) for v in node.meta["val"])
    out = Value(values, atoms, x.slot)
    return [out, b.affine(b.same(out, places))]


@rule("cumsum.default", "cumsum_.default", "flip.default")
def along_a_dimension(b: Builder, node: fx.Node) -> Value:
    """Along dimensions without units zero stays zero; flipped units are the same in another order."""
    x = b.value(node.args[0])
    if x is None:
        return NotImplemented
    dims: set[int] = {d % len(x.shape) for d in ([node.args[1]] if isinstance(node.args[1], int) else node.args[1])}
    if not dims & set(x.unit_dims):
        return b.same(x)
    if node.target is not aten.flip.default:
        return NotImplemented
    return b.rearrange(node, lambda array: np.flip(array, tuple(dims & set(x.unit_dims))))


@rule("softmax.int", "log_softmax.int", "_softmax.default", "_log_softmax.default")
def softmax(b: Builder, node: fx.Node) -> Value:
    x = b.value(node.args[0])
    if x is None:
        return NotImplemented
    if node.args[1] % len(x.shape) in x.unit_dims:
        b.pin(x, f"{origin(node)} normalises over the units")
    return b.affine(x)
