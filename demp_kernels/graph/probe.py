"""Asks the model itself whether the analysis is right about its shapes.

The rules see sizes in the graph as numbers: whether `view(n, 512)` was written so or came from `x.shape` cannot be told.
So the model is captured once more, on fake tensors, with some of everything removed that the analysis holds removable,
and each op's output is compared with what it should have become. An op that does not follow is named.
"""
from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .builder import Builder
from .capture import AnalysisError, Capture, capture, quiet_fake_tensors, source_line
from .trial import fake_inputs, with_widths
from .values import Value

if TYPE_CHECKING:
    from .units import UnitGraph

__all__ = ["find_written_sizes"]

SHARE = 0.3
"""Share of the classes that is removed for the question."""


def find_written_sizes(
    model: nn.Module, graph: UnitGraph, built: Builder, captures: list[Capture]
) -> list[fx.Node] | None:
    """The nodes of the first captured graph that do not follow: all of one source line. Empty if everything does; None
    if the model fails and it cannot be told where."""
    kept = _some(graph)
    if kept.all():
        return []
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    first = captures[0]
    try:
        with quiet_fake_tensors(), with_widths(model, graph.widths(model, kept), mode):
            again = capture(model, fake_inputs(model, graph.inputs, mode))
    except AnalysisError as error:
        return _at_lines(first, built, _lines(error.__cause__))
    old = [node for node in first.nodes if node.op == "call_function"]
    new = [node for node in again.nodes if node.op == "call_function"]
    if len(old) != len(new):
        select = torch.ops.demp_kernels.channel_select.default
        old, new = ([node for node in nodes if node.target is not select] for nodes in (old, new))
    for node, other in zip(old, new):
        if node.target is not other.target or not _as_expected(graph, built.env.get(node), other.meta.get("val"), kept):
            return _alike(first, node)
    return [] if len(old) == len(new) else None


def _some(graph: UnitGraph) -> np.ndarray:
    """Some classes removed, in every size of axis, within what must stay."""
    kept = np.random.default_rng(0).random(graph.classes) >= SHARE
    kept |= graph.is_pinned
    while True:
        extra = graph.to_widen(kept, {}, 1, 1)
        if not extra.size:
            return kept
        kept[extra] = True


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


def _lines(error: BaseException | None) -> list[tuple[str, int]]:
    """Where an error passed through, innermost first."""
    found = []
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        found += [(frame.filename, frame.lineno or 0) for frame in reversed(frames)]
        error = error.__cause__ or error.__context__
    return found


def _at_lines(captured: Capture, built: Builder, lines: list[tuple[str, int]]) -> list[fx.Node] | None:
    """Which nodes of the innermost line that handles units may be to blame: a view that splits units, rather than
    another view, rather than any node."""
    by_line: dict[tuple[str, int], list[fx.Node]] = {}
    for node in captured.nodes:
        line = source_line(node)
        reads = (built.env.get(source) for source in node.all_input_nodes)
        if line is not None and any(isinstance(v, Value) and v.unit_dims for v in reads):
            by_line.setdefault(line, []).append(node)
    nodes = next((by_line[line] for line in lines if line in by_line), None)
    if nodes is None:
        return None
    splits = [node for node in nodes if node in built.splits]
    return splits or [node for node in nodes if node in built.views] or nodes
