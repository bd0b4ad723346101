"""Rules of matrix products: matmul, einsum, addmm, of a value and a parameter or of two values.

All are sums of products over some dimensions, written with a letter a dimension as einsum does.
"""
from __future__ import annotations

import string

from torch import fx

from .builder import Builder, rule
from .capture import origin
from .flow import Link
from .rules_layers import new_units, output_shape
from .values import Parameter, Value, along


@rule("matmul.default", "mm.default", "bmm.default")
def matrix_product(b: Builder, node: fx.Node) -> Value:
    """(*, M, K) @ (*, K, N)."""
    ranks = [len(source.meta["val"].shape) for source in node.args[:2]]
    if min(ranks) < 2:
        return NotImplemented
    letters = string.ascii_lowercase[: max(ranks) - 2]
    first, second = letters[len(letters) - ranks[0] + 2 :], letters[len(letters) - ranks[1] + 2 :]
    return _product(b, node, list(node.args[:2]), [first + "MK", second + "KN"], letters + "MN")


@rule("einsum.default")
def einsum(b: Builder, node: fx.Node) -> Value:
    """Of two operands, with the output's dimensions given; no dots."""
    sources, _, out = node.args[0].replace(" ", "").partition("->")
    letters = sources.split(",")
    if "->" not in node.args[0] or "." in sources or len(node.args[1]) != 2:
        return NotImplemented
    return _product(b, node, list(node.args[1]), letters, out)


@rule("addmm.default")
def biased_matrix_product(b: Builder, node: fx.Node) -> Value:
    """bias + x @ W with parameters bias (out,) and W (in, out)."""
    bias, weight = b.parameter(node.args[0]), b.parameter(node.args[2])
    if b.parameter(node.args[1]) is not None or weight is None or bias is None or len(bias.shape) != 1:
        return NotImplemented
    return _product(b, node, list(node.args[1:3]), ["MK", "KN"], "MN", bias)


def _product(
    b: Builder, node: fx.Node, sources: list[fx.Node], letters: list[str], out: str, bias: Parameter | None = None
) -> Value:
    """out = sum over the letters that it has not, of the product of two operands."""
    if any(len(set(one)) < len(one) for one in [*letters, out]) or set(out) - set("".join(letters)):
        return NotImplemented
    shapes = [source.meta["val"].shape for source in sources]
    for number, other in ((0, 1), (1, 0)):
        weight, x = b.parameter(sources[number]), b.value(sources[other])
        own, shared = set(letters[number]) - set(letters[other]), set(letters[0]) & set(letters[1])
        if weight is None or x is None or b.parameter(sources[other]) is not None or len(weight.shape) != 2:
            continue
        if len(own) == len(shared) == 1 and own <= set(out) and not shared & set(out):
            return _times_parameter(b, node, x, weight, letters[other], letters[number], out, bias)
    if bias is not None:
        return NotImplemented
    values = [b.value(source) for source in sources]
    if any(v is None for v in values):
        return NotImplemented
    # a dimension of size one that is spread over the other operand's is not the same as that
    names = ["".join(c if shape[d] == sizes.get(c, shape[d]) else "." for d, c in enumerate(one))
             for one, shape, sizes in zip(letters, shapes, (dict(zip(letters[1], shapes[1])), dict(zip(letters[0], shapes[0]))))]
    return _of_values(b, node, values, names, out)


def _times_parameter(
    b: Builder, node: fx.Node, x: Value, weight: Parameter, x_letters: str, w_letters: str, out: str, bias: Parameter | None
) -> Value:
    """A linear layer: the units along the shared letter end here, new ones begin along the weight's other letter."""
    (shared,) = set(x_letters) & set(w_letters)
    (fresh,) = set(w_letters) - {shared}
    dim = x_letters.index(shared)
    x = b.uniform_except(x, dim)
    b.align(weight, w_letters.index(shared), x.axis(dim))
    b.flow.contract(x.slot)
    return new_units(b, node, output_shape(node), out.index(fresh), weight, w_letters.index(fresh), bias, "", "")


def _of_values(b: Builder, node: fx.Node, values: list[Value], letters: list[str], out: str) -> Value:
    """Units along one letter only. Summed over, a unit contributes where it is not zero in both; else they are units of the
    output."""
    shape = output_shape(node)
    with_units = {one[d] for v, one in zip(values, letters) for d in v.unit_dims}
    if not with_units:
        return b.plain(shape) if not any(v.atoms.any() for v in values) else NotImplemented
    if len(with_units) > 1 or "." in with_units or all(b.never_zero(v) for v in values):
        return NotImplemented  # units that cannot be zero, as those of queries and keys, are not worth a look
    (letter,) = with_units
    joined = [b.full_axis(v, one.index(letter)) for v, one in zip(values, letters) if letter in one]
    axes = [v.axis(one.index(letter)) for v, one in zip(joined, [one for one in letters if letter in one])]
    for v, axis in zip(joined, axes):
        if not axis.any():
            b.pin([w for w in joined if w is not v], f"{origin(node)} multiplies them by a tensor that cannot be cut")
        b.atoms.tie(axes[0], axis)
    atoms = axes[0]
    if letter in out:
        return b.derive(shape, along(atoms, out.index(letter), len(shape)), "product", [Link(v.slot) for v in joined])
    terms = b.derive(atoms.shape, atoms, "product", [Link(v.slot) for v in joined])
    b.flow.contract(terms.slot)
    return b.plain(shape)
