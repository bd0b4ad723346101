"""Asks the model itself whether the analysis is right about its shapes.

The rules see sizes in the graph as numbers: whether `view(n, 512)` was written so or came from `x.shape` cannot be told.
So the model is captured once more, on fake tensors, with some of everything removed that the analysis holds removable,
and each op's output is compared with what it should have become. An op that does not follow is named. So is one that
computes with a number that came from a size: `x.sum(1) / x.shape[1]` would be another function with fewer units.
"""
from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from .builder import Builder
from .capture import AnalysisError, Capture, capture, origin, quiet_fake_tensors, source_line
from .rules_shape import bounds
from .trial import fake_inputs, with_widths
from .values import Value

if TYPE_CHECKING:
    from .units import UnitGraph

__all__ = ["Answer", "ask"]

SHARE = 0.3
"""Share of the classes that is removed for the question."""


TAKE_SIZES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "expand", "repeat", "slice", "narrow", "select",
    "split", "split_with_sizes", "chunk", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "group_norm", "layer_norm", "rms_norm", "channel_shuffle", "zeros", "ones", "empty", "new_zeros",
    "new_ones", "new_empty", "arange", "pad", "constant_pad_nd", "roll", "as_strided", "repeat_interleave",
}
"""Ops whose numbers may be sizes: a wrong one shows in the shape of what they make."""


@dataclass
class Answer:
    """What the model said.

    wrong: nodes of a captured graph that do not follow, all of one source line. None: the model fails and it cannot be told
        where.
    pins: (parameter or buffer, dimension) -> why its size must stay: a number that some op computes with comes from it.
    complete: whether every size that can change did.
    """

    wrong: list[fx.Node] | None
    pins: dict[tuple[str, int], str] = field(default_factory=dict)
    complete: bool = True

    @property
    def proves(self) -> bool:
        """Whether the analysis is right as it is."""
        return self.wrong == [] and not self.pins and self.complete


def ask(model: nn.Module, graph: UnitGraph, built: Builder, captures: list[Capture]) -> Answer:
    """Capture `model` with some of everything removed, in evaluation and as it was captured in training, and compare."""
    kept, complete = _some(graph)
    if kept.all():
        return Answer([])
    answers = (_ask(model, graph, built, first, kept) for first in captures)
    return next((answer for answer in answers if not answer.proves), Answer([], complete=complete))


def _ask(model: nn.Module, graph: UnitGraph, built: Builder, first: Capture, kept: np.ndarray) -> Answer:
    try:
        pairs = _pairs(first, _again(model, graph, first, kept))
    except AnalysisError as error:
        return Answer(_to_blame(model, first, built, error.__cause__))
    if pairs is None:
        return Answer(None)
    for node, other in pairs:
        if not _as_expected(graph, built.env.get(node), other.meta.get("val"), kept) or not _cut_alike(built, node, other):
            return Answer(_alike(first, node))
        if not _same_numbers(node, other):
            return Answer([], _sizes_behind(model, graph, first, node, kept))
    return Answer([])


def _again(model: nn.Module, graph: UnitGraph, first: Capture, kept: np.ndarray) -> Capture:
    """The forward of `first` captured with the classes `kept` alone."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with quiet_fake_tensors(), with_widths(model, graph.widths(model, kept), mode):
        return capture(model, fake_inputs(model, graph.inputs, mode), leaves_only=first.leaves_only, awake=first.awake)


def _pairs(first: Capture, again: Capture) -> list[tuple[fx.Node, fx.Node]] | None:
    """The calls of both graphs side by side, up to the end of the shorter one; None if they differ in nothing but their number."""
    old, new = ([node for node in captured.nodes if node.op == "call_function"] for captured in (first, again))
    if len(old) != len(new):
        select = torch.ops.demp_kernels.channel_select.default
        old, new = ([node for node in nodes if node.target is not select] for nodes in (old, new))
    alike = [node.target is other.target for node, other in zip(old, new)]
    if all(alike) and len(old) != len(new):
        return None
    return list(zip(old, new))


def _some(graph: UnitGraph) -> tuple[np.ndarray, bool]:
    """Some classes removed, in every axis that can lose any, within what must stay: (classes,) bool of those kept. And
    whether it is so in every axis."""
    random = np.random.default_rng(0)
    least = _widened(graph, graph.is_pinned.copy())
    axes = [atoms for atoms in graph.axes.values() if not least[atoms].all()]
    kept = random.random(graph.classes) >= SHARE
    for balance in graph.balances:
        kept[balance.rows], kept[balance.columns] = kept[balance.rows[0]], kept[balance.columns[0]]  # in all groups alike
    for atoms in axes:
        if kept[atoms].all():
            kept[random.choice(atoms[~least[atoms]])] = False
    kept = _widened(graph, kept | graph.is_pinned)
    for atoms in axes:
        if kept[atoms].all():
            kept[atoms] = least[atoms]
            for balance in graph.balances:  # a group goes with its other side only
                if np.isin(balance.rows, atoms).any() or np.isin(balance.columns, atoms).any():
                    kept[balance.rows], kept[balance.columns] = least[balance.rows], least[balance.columns]
    kept = _widened(graph, kept)
    return kept, not any(kept[atoms].all() for atoms in axes)


def _widened(graph: UnitGraph, kept: np.ndarray) -> np.ndarray:
    """`kept` and what has to stay with it."""
    while True:
        extra = graph.to_widen(kept, {}, 1, 1)
        if not extra.size:
            return kept
        kept[extra] = True


def _cut_alike(built: Builder, node: fx.Node, other: fx.Node) -> bool:
    """Whether a slice of units that is one of equal parts still begins where that part does."""
    if node not in built.parts:
        return True
    dim = built.parts[node]
    (old, _), (new, _) = bounds(node), bounds(other)
    return old * other.meta["val"].shape[dim] == new * node.meta["val"].shape[dim]


def _same_numbers(node: fx.Node, other: fx.Node) -> bool:
    """Whether an op that takes no sizes computes with the same numbers."""
    if _schema_name(node) in {"", *TAKE_SIZES}:
        return True
    old, new = (
        [x for x in tree_leaves((n.args, n.kwargs)) if isinstance(x, (int, float))] for n in (node, other)
    )
    return old == new


def _sizes_behind(
    model: nn.Module, graph: UnitGraph, first: Capture, node: fx.Node, kept: np.ndarray
) -> dict[tuple[str, int], str]:
    """Which size a number of `node` comes from, found by halving: the axes of one layer, or all that changed if no single
    one changes the number."""
    reason = f"a number in {origin(node)} comes from how many they are"
    groups: dict[int, list[tuple[str, int]]] = {}
    for (key, atoms), group in zip(graph.axes.items(), graph.axis_groups):
        if not kept[atoms].all():
            groups.setdefault(group, []).append(key)
    suspects = list(groups.values())

    def changes(some: list[list[tuple[str, int]]]) -> bool:
        alone = np.ones_like(kept)
        for keys in some:
            alone[graph.axes[keys[0]]] = kept[graph.axes[keys[0]]]
        try:
            pairs = _pairs(first, _again(model, graph, first, _widened(graph, alone)))
        except AnalysisError:
            return False
        return any(old is node and not _same_numbers(old, new) for old, new in pairs or ())

    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        rest = suspects[len(suspects) // 2 :]
        if changes(half):
            suspects = half
        elif changes(rest):
            suspects = rest
        else:
            break
    return {key: reason for keys in suspects for key in keys}


def _as_expected(graph: UnitGraph, value: object, found: object, kept: np.ndarray) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(found, (list, tuple)):
        return all(_as_expected(graph, v, f, kept) for v, f in zip(value, found))
    if not isinstance(value, Value) or not isinstance(found, Tensor):
        return True
    stays = kept[graph.number(value.atoms)]
    expected = []
    for dim, size in enumerate(value.shape):
        if stays.shape[dim] > 1:
            others = tuple(d for d in range(stays.ndim) if d != dim)
            size = int(stays.any(others).sum())
        expected.append(size)
    return tuple(found.shape) == tuple(expected)


def _alike(captured: Capture, node: fx.Node) -> list[fx.Node]:
    """A node and those of the same op on the same line (a module that occurs several times)."""
    line = source_line(node)
    return [n for n in captured.nodes if n is node or (line is not None and n.target is node.target and source_line(n) == line)]


def _to_blame(model: nn.Module, captured: Capture, built: Builder, error: BaseException | None) -> list[fx.Node] | None:
    """Which nodes may be to blame for an error. On the innermost line that handles units a node that splits units, rather
    than another view that takes sizes; rather than these the last ones before it of both kinds; rather than these any node
    of the module that failed, or any node of the line. None: it cannot be told."""
    by_line: dict[tuple[str, int], list[fx.Node]] = {}
    for node in captured.nodes:
        line = source_line(node)
        reads = (built.env.get(source) for source in node.all_input_nodes)
        if line is not None and node not in built.refused and any(isinstance(v, Value) and v.unit_dims for v in reads):
            by_line.setdefault(line, []).append(node)
    names = {id(module): name for name, module in model.named_modules()}
    lines: list[tuple[str, int]] = []
    failed = None
    while error is not None:
        frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        lines += reversed(frames)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            failed = names.get(id(frame.f_locals.get("self")), failed)
        error = error.__cause__ or error.__context__
    nodes = next((by_line[line] for line in lines if line in by_line), None)
    if nodes is None:
        return None
    inside = [node for node in nodes if failed and built.owner(node)[0] == failed]
    views = {node for node in built.views if _schema_name(node) in TAKE_SIZES - {"flatten", "view_as"}}
    for kind in (built.splits, views):
        if found := [node for node in nodes if node in kind]:
            return found
    return _before(nodes, built.splits - built.refused) or _before(nodes, views - built.refused) or inside or nodes


def _before(nodes: list[fx.Node], kind: set[fx.Node]) -> list[fx.Node]:
    """The nearest nodes of a kind among those that some nodes are computed from."""
    seen, pending = set(nodes), list(nodes)
    while pending:
        pending = [n for n in dict.fromkeys(s for node in pending for s in node.all_input_nodes) if n not in seen]
        seen.update(pending)
        found = [node for node in pending if node in kind]
        if found:
            return found
    return []


def _schema_name(node: fx.Node) -> str:
    """Name of an ATen op without its overload and the mark of one that works in place."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.rpartition("::")[2].rstrip("_")
