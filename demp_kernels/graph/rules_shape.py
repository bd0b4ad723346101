"""Rules of ops that move entries about: views, permutations, concatenations, slices, shuffles, padding."""
from __future__ import annotations

import numpy as np
import torch
from torch import fx

from .builder import VIEW_RULES, Builder, rule
from .capture import origin
from .flow import Link
from .rules_layers import arguments, output_shape
from .values import Value, along

aten = torch.ops.aten


# --- views -----------------------------------------------------------------------------------------------------------


@rule(
    "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints",
    "unflatten.int", "squeeze.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default",
    "squeeze_.dim", "unsqueeze_.default", "view_as.default", "reshape_as.default",
)
def view(b: Builder, node: fx.Node) -> Value:
    """Any change of shape that keeps the order of the elements.

    A dimension that swallows units and others (flatten) has an entry for each element. Where a unit dimension is split
    in several (channel shuffle), only whole slabs of it can go: one part keeps its own units, and units that differ
    along the other parts are tied. Which part that is only the model's code knows: the longest is tried first, and the
    others if the probe finds that wrong.
    """
    x = b.value(node.args[0])
    if x is None:
        return NotImplemented
    shape = output_shape(node)
    if x.atoms.size == 1:
        return Value(shape, x.atoms.reshape((1,) * len(shape)), x.slot, x.storage)
    order = _reshape(np.arange(x.atoms.size).reshape(x.atoms.shape), x.shape, shape)
    full = x.atoms.ravel()[order]
    first = full[tuple(slice(0, 1) if _constant(full, d) else slice(None) for d in range(full.ndim))]
    varying = sorted((d for d, size in enumerate(first.shape) if size > 1), key=lambda d: (-first.shape[d], -d))
    ruled_out = b.choices.get(node, 0)
    if ruled_out >= len(varying):
        return b.opaque(node, f"sizes are written down in {origin(node)}")
    if len(varying) > 1:
        b.splits.add(node)
        own = varying[ruled_out]
        b.atoms.tie(first, first[tuple(slice(None) if d == own else slice(0, 1) for d in range(first.ndim))])
    flat = order.ravel()
    if first.shape == full.shape and np.array_equal(flat, np.arange(x.atoms.size)):
        return Value(shape, first, x.slot, x.storage)
    target = np.broadcast_to(np.arange(first.size).reshape(first.shape), full.shape).ravel()
    out = b.derive(shape, first, "sum", [Link(x.slot, flat, target)])
    out.storage = x.storage
    return out


def _reshape(array: np.ndarray, before: tuple[int, ...], after: tuple[int, ...]) -> np.ndarray:
    """Reshape an array that is broadcastable to `before` into one that is broadcastable to `after`."""
    expanded, reshaped = [1] * len(before), [1] * len(after)
    for old, new in _groups(before, after):
        if any(array.shape[d] > 1 for d in old):
            for d in old:
                expanded[d] = before[d]
            for d in new:
                reshaped[d] = after[d]
    return np.broadcast_to(array, expanded).reshape(reshaped)


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old: list[int] = []
        new: list[int] = []
        size_old = size_new = 1
        while True:
            if size_old <= size_new and i < len(before) and (size_old < size_new or not old):
                old.append(i)
                size_old *= before[i]
                i += 1
            elif j < len(after) and (size_new < size_old or not new):
                new.append(j)
                size_new *= after[j]
                j += 1
            else:
                break
        groups.append((old, new))
    return groups


def _constant(array: np.ndarray, dim: int) -> bool:
    return array.shape[dim] > 1 and bool((array == array.take([0], dim)).all())


VIEW_RULES.add(view)


@rule("expand.default", "expand_as.default")
def expand(b: Builder, node: fx.Node) -> Value:
    rank = len(output_shape(node))
    return b.rearrange(node, lambda array: array.reshape((1,) * (rank - array.ndim) + array.shape))


@rule("repeat.default")
def repeat(b: Builder, node: fx.Node) -> Value:
    times = node.args[1]

    def transform(array: np.ndarray) -> np.ndarray:
        array = array.reshape((1,) * (len(times) - array.ndim) + array.shape)
        return np.tile(array, [t if size > 1 else 1 for t, size in zip(times, array.shape)])

    return b.rearrange(node, transform)


@rule("movedim.int", "swapaxes.default")
def move(b: Builder, node: fx.Node) -> Value:
    function = np.moveaxis if node.target is aten.movedim.int else np.swapaxes
    return b.rearrange(node, lambda array: function(array, node.args[1], node.args[2]))


@rule("repeat_interleave.self_int")
def repeat_each(b: Builder, node: fx.Node) -> Value:
    times, dim = node.args[1], arguments(node, "dim")[0]
    if dim is None:
        return NotImplemented
    return b.rearrange(node, lambda array: np.repeat(array, times, dim) if array.shape[dim] > 1 else array)


@rule("roll.default")
def roll(b: Builder, node: fx.Node) -> Value:
    """Of dimensions without units; along units the way would have to follow their number."""
    x, dims = b.value(node.args[0]), arguments(node, "dims")[0]
    if x is None or not dims or any(d % len(x.shape) in x.unit_dims for d in dims):
        return NotImplemented
    return b.same(x)


# --- parts -----------------------------------------------------------------------------------------------------------


@rule("slice.Tensor", "narrow.default")
def part(b: Builder, node: fx.Node) -> Value:
    """A slice of a dimension without units, or one of equal parts of a unit dimension: whether its bounds follow the number
    of units only the model's code knows, so the probe looks."""
    x, shape = b.value(node.args[0]), output_shape(node)
    if x is None:
        return NotImplemented
    cut = [d for d in x.unit_dims if x.shape[d] != shape[d]]
    if not cut:
        return b.same(x, shape, view=True)
    (dim,), size = cut[:1], shape[cut[0]]
    start, step = bounds(node)
    if len(x.unit_dims) > 1 or step != 1 or not size or x.shape[dim] % size or start % size:
        return NotImplemented
    b.parts[node] = dim
    b.splits.add(node)
    return equal_parts(b, x, dim, [shape] * (x.shape[dim] // size))[start // size]


def bounds(node: fx.Node) -> tuple[int, int]:
    """Start and step of a slice."""
    size = int(node.args[0].meta["val"].shape[arguments(node, "dim")[0]])
    start = arguments(node, "start")[0] or 0
    step = 1 if node.target is aten.narrow.default else arguments(node, "step")[0]
    return min(start + size if start < 0 else start, size), step


def equal_parts(b: Builder, x: Value, dim: int, shapes: list[tuple[int, ...]]) -> list[Value]:
    """The values of equal parts of a unit dimension: unit i of every part goes or stays."""
    x = b.full_axis(x, dim)
    atoms = x.axis(dim).reshape(len(shapes), -1)
    b.atoms.tie(atoms, atoms[:1])
    entries = np.arange(atoms.shape[1])
    values = []
    for number, shape in enumerate(shapes):
        link = Link(x.slot, entries + number * entries.size, entries)
        values.append(b.derive(shape, along(atoms[number], dim, len(shape)), "sum", [link]))
        values[-1].storage = x.storage
    return values


@rule("select.int")
def select(b: Builder, node: fx.Node) -> Value:
    x = b.value(node.args[0])
    dim = node.args[1] % len(x.shape) if x is not None else 0
    if x is None or dim in x.unit_dims:
        return NotImplemented
    return b.rearrange(node, lambda array: array.squeeze(dim))


@rule("chunk.default", "split.Tensor", "split_with_sizes.default", "unbind.int")
def parts(b: Builder, node: fx.Node) -> object:
    """Parts of a unit dimension, if they are equal and all that varies. Whether the sizes of a split follow the number of
    units only the model's code knows, so the probe looks."""
    x = b.value(node.args[0])
    if x is None:
        return NotImplemented
    unbound = node.target is aten.unbind.int
    dim = arguments(node, "dim")[0] % len(x.shape)
    shapes = [tuple(v.shape) for v in node.meta["val"]]
    if dim not in x.unit_dims:
        drop = (lambda array: array.squeeze(dim)) if unbound else (lambda array: array)
        return [Value(shape, drop(x.atoms), x.slot, x.storage) for shape in shapes]
    if unbound or len({shape[dim] for shape in shapes}) > 1 or len(x.unit_dims) > 1:
        return NotImplemented
    if node.target is not aten.chunk.default:
        b.splits.add(node)
    return equal_parts(b, x, dim, shapes)


# --- joins -----------------------------------------------------------------------------------------------------------


@rule("cat.default", "concat.default")
def concatenation(b: Builder, node: fx.Node) -> Value:
    """Along units: the units of all operands, side by side. Along another dimension: units that meet are tied."""
    dim = arguments(node, "dim")[0]
    return _join(b, [b.value(x) for x in node.args[0]], dim, output_shape(node))


@rule("stack.default")
def stack(b: Builder, node: fx.Node) -> Value:
    shape = output_shape(node)
    dim = arguments(node, "dim")[0] % len(shape)
    values = [b.value(x) for x in node.args[0]]
    if any(v is None for v in values):
        return NotImplemented
    lifted = [
        Value((*v.shape[:dim], 1, *v.shape[dim:]), np.expand_dims(v.atoms, dim), v.slot) for v in values
    ]
    return _join(b, lifted, dim, shape)


def _join(b: Builder, values: list[Value | None], dim: int, shape: tuple[int, ...]) -> Value:
    values = [v for v in values if v is not None and v.shape != (0,)]
    dim %= len(shape)
    if any(v.unit_dims for v in values) and not any(dim in v.unit_dims for v in values):
        full = np.broadcast_shapes(*(v.atoms.shape for v in values))
        for v in values[1:]:
            b.atoms.tie(values[0].atoms, v.atoms)
        atoms = np.broadcast_to(values[0].atoms, full)
        return b.derive(shape, atoms, "sum", [_spread(v, full) for v in values])
    values = [b.full_axis(v, dim) for v in values]
    links, start = [], 0
    for v in values:
        entries = np.arange(v.atoms.size)
        links.append(Link(v.slot, entries, entries + start))
        start += v.atoms.size
    atoms = np.concatenate([v.axis(dim) for v in values])
    return b.derive(shape, along(atoms, dim, len(shape)), "sum", links)


def _spread(v: Value, full: tuple[int, ...]) -> Link:
    source = np.broadcast_to(np.arange(v.atoms.size).reshape(v.atoms.shape), full).ravel()
    return Link(v.slot, source, np.arange(source.size))


# --- shuffles --------------------------------------------------------------------------------------------------------


@rule("channel_shuffle.default")
def channel_shuffle(b: Builder, node: fx.Node) -> Value:
    """(N, C, *): channel g * (C / groups) + i moves to i * groups + g; unit i of every group goes or stays."""
    x, groups = b.value(node.args[0]), node.args[1]
    if x is None:
        return NotImplemented
    x = b.full_axis(x, 1)
    channels = x.axis(1).reshape(groups, -1)
    b.atoms.tie(channels, channels[:1])
    order = np.arange(x.shape[1]).reshape(groups, -1).T.ravel()
    atoms = along(x.axis(1)[order], 1, len(x.shape))
    return b.derive(x.shape, atoms, "sum", [Link(x.slot, order, np.arange(order.size))])


@rule("pixel_shuffle.default")
def pixel_shuffle(b: Builder, node: fx.Node) -> Value:
    """(N, C r^2, H, W) -> (N, C, H r, W r): the r^2 channels that make one go together."""
    x, shape = b.value(node.args[0]), output_shape(node)
    if x is None or len(shape) != 4:
        return NotImplemented
    x = b.full_axis(x, 1)
    blocks = x.axis(1).reshape(shape[1], -1)
    b.atoms.tie(blocks, blocks[:, :1])
    source = np.arange(blocks.size)
    return b.derive(shape, along(blocks[:, 0], 1, 4), "sum", [Link(x.slot, source, source // blocks.shape[1])])


@rule("pixel_unshuffle.default")
def pixel_unshuffle(b: Builder, node: fx.Node) -> Value:
    """(N, C, H r, W r) -> (N, C r^2, H, W): a channel becomes r^2 that go with it."""
    x, shape = b.value(node.args[0]), output_shape(node)
    if x is None or len(shape) != 4:
        return NotImplemented
    x = b.full_axis(x, 1)
    source = np.repeat(np.arange(x.shape[1]), shape[1] // x.shape[1])
    return b.derive(shape, along(x.axis(1)[source], 1, 4), "sum", [Link(x.slot, source, np.arange(source.size))])


# --- padding ---------------------------------------------------------------------------------------------------------


@rule("pad.default", "constant_pad_nd.default")
def pad(b: Builder, node: fx.Node) -> Value:
    """Padding of dimensions without units."""
    x, shape = b.value(node.args[0]), output_shape(node)
    value = arguments(node, "value")[0]
    if x is None or any(x.shape[d] != shape[d] for d in x.unit_dims):
        return NotImplemented
    constant = node.target is aten.constant_pad_nd.default or arguments(node, "mode")[0] == "constant"
    return b.affine(x, shape) if constant and value else b.same(x, shape)


@rule("_assert_tensor_metadata.default")
def nothing(b: Builder, node: fx.Node) -> None:
    """An assertion about dtypes, not about sizes."""
    return
