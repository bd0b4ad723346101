"""What a compaction will do to every tensor, selection and attribute; decided before anything is touched."""
from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.units import Keep, UnitGraph
from ..modules import DemPActivation, SelectiveAdd

__all__ = ["CompactionError", "Cut", "Plan", "SelectionChange", "Shift", "make_plan"]


class CompactionError(RuntimeError):
    """The compaction was refused; the text says what stands in the way. Nothing was changed."""


@dataclass
class Cut:
    """Entries of a parameter or buffer that stay: for each dimension that shrinks, (kept,) int64 indices on the
    tensor's device. The weight of a grouped convolution has blocks instead: for each group (rows, columns), since the
    columns differ from group to group."""

    name: str
    tensor: Tensor
    index: dict[int, Tensor]
    blocks: list[tuple[Tensor, Tensor]] | None = None

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape to be."""
        if self.blocks is not None:
            rows = sum(rows.numel() for rows, _ in self.blocks)
            return (rows, self.blocks[0][1].numel(), *self.tensor.shape[2:])
        return tuple(self.index[d].numel() if d in self.index else size for d, size in enumerate(self.tensor.shape))


@dataclass
class SelectionChange:
    """The channels that the sum of a SelectiveAdd and its skip keep of those that they have, (channels,) bool each."""

    name: str
    module: SelectiveAdd
    out: Tensor
    skip: Tensor


@dataclass
class Shift:
    """What takes over what removed inputs gave: `by` is added to a bias or a running mean, or to entries `at` of a weight,
    once it has been cut."""

    tensor: Tensor
    by: Tensor
    at: tuple[int | slice, ...] = ()


@dataclass
class Plan:
    """Everything that one compaction changes."""

    keep: Keep
    cuts: list[Cut] = field(default_factory=list)
    selections: list[SelectionChange] = field(default_factory=list)
    shifts: list[Shift] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, int]] = field(default_factory=list)
    counters: list[tuple[DemPActivation, Tensor | None]] = field(default_factory=list)
    """Kept units of each counting activation; None: the counters start anew, as its calls keep different units or the last of
    them, which was not analysed, had another number."""
    modules: list[nn.Module] = field(default_factory=list)
    """All modules of the models: what does not shrink can be too narrow for a kernel all the same."""

    def add(self, other: Plan) -> None:
        """Make the changes of another plan too; what both share changes once."""
        cut, counted = {id(c.tensor) for c in self.cuts}, {id(module) for module, _ in self.counters}
        self.cuts += [c for c in other.cuts if id(c.tensor) not in cut]
        self.counters += [c for c in other.counters if id(c[0]) not in counted]
        shifted = {id(s.tensor) for s in self.shifts}
        self.shifts += [s for s in other.shifts if id(s.tensor) not in shifted]
        selected = {id(s.module) for s in self.selections}
        self.selections += [s for s in other.selections if id(s.module) not in selected]
        self.attributes += other.attributes
        self.modules += other.modules

    def require_dense(self) -> None:
        """Raises CompactionError for a tensor that cannot be cut: a sparse one, or one with a sparse gradient."""
        for cut in self.cuts:
            if cut.tensor.layout != torch.strided or (cut.tensor.grad is not None and cut.tensor.grad.is_sparse):
                raise CompactionError(f"{cut.name} must be a dense tensor with a dense gradient")


def make_plan(model: nn.Module, graph: UnitGraph, keep: Keep) -> Plan:
    """Turn the kept classes into cuts. Raises ValueError if the graph is not that of `model` as it is now."""
    modules = dict(model.named_modules(remove_duplicate=False))
    plan = Plan(keep)
    if graph.is_whole(keep):
        return plan
    names: dict[str, dict[int, int]] = {}  # name -> dimension -> group of its axis
    for (name, dim), group in zip(graph.axes, graph.axis_groups):
        names.setdefault(name, {})[dim] = group
    indices = _Indices(graph, keep)
    for name, dims in names.items():
        tensor = _tensor(modules, name)
        shape = () if tensor is None else tensor.shape
        for dim, group in dims.items():
            if dim >= len(shape) or shape[dim] != indices.sizes[group]:
                found = "missing" if tensor is None else f"of shape {tuple(shape)}"
                raise ValueError(f"graph must be that of the model: it has {name} with {indices.sizes[group]} entries in "
                                 f"dimension {dim}, the model's is {found}")
        assert tensor is not None  # looked at above
        index = {dim: indices.kept(group, tensor.device) for dim, group in dims.items() if indices.shrinks[group]}
        if index:
            plan.cuts.append(Cut(name, tensor, index))
    _add_blocks(plan, modules, graph, indices)
    plan.cuts = list({id(cut.tensor): cut for cut in plan.cuts}.values())  # tied parameters have several names
    plan.selections = _selections(model, modules, graph, keep)
    for path, attribute, atoms in graph.attributes:
        count = graph.count(atoms, keep.atoms)
        if count != len(atoms):
            plan.attributes.append((modules[path], attribute, count))
    plan.counters = _counters(modules, graph, keep)
    plan.modules = list(modules.values())
    return plan


def _add_blocks(plan: Plan, modules: dict[str, nn.Module], graph: UnitGraph, indices: _Indices) -> None:
    """Cuts of grouped weights whose columns differ from group to group."""
    for balance in graph.balances:
        rows_stay, columns_stay = plan.keep.atoms[balance.rows], plan.keep.atoms[balance.columns]
        if columns_stay.all():
            continue
        tensor = _tensor(modules, balance.weight)
        assert tensor is not None  # one of graph.axes
        rows = np.arange(rows_stay.size).reshape(rows_stay.shape)
        blocks = [
            (indices.tensor(rows[g][rows_stay[g]], tensor.device), indices.tensor(np.nonzero(columns_stay[g])[0], tensor.device))
            for g in range(len(rows))
            if rows_stay[g].any()
        ]
        plan.cuts = [cut for cut in plan.cuts if cut.name != balance.weight]
        plan.cuts.append(Cut(balance.weight, tensor, {}, blocks))


class _Indices:
    """Kept entries of every axis, found in one go. Equal axes share one tensor: a layer's outputs are the next one's
    inputs, and the moments' rows are the weight's.

    sizes, shrinks: for each group of equal axes its entries, and whether it loses any.
    """

    def __init__(self, graph: UnitGraph, keep: Keep) -> None:
        groups = dict(zip(graph.axis_groups, graph.axes.values()))
        atoms = [groups[number] for number in range(len(groups))]
        self.sizes = [a.size for a in atoms]
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        stays = keep.atoms[np.concatenate(atoms)] if atoms else np.empty(0, bool)
        place = np.concatenate([[0], np.cumsum(stays)])[starts]
        counts = np.diff(place)
        self.shrinks = (counts != self.sizes).tolist()
        kept = np.nonzero(stays)[0] - np.repeat(starts[:-1], counts)
        self._kept = {torch.device("cpu"): torch.from_numpy(kept).split(counts.tolist())}
        self._blocks: dict[tuple[bytes, torch.device], Tensor] = {}

    def kept(self, group: int, device: torch.device) -> Tensor:
        """(kept,) int64: the entries of a group's axes that stay."""
        if device not in self._kept:
            parts = self._kept[torch.device("cpu")]
            self._kept[device] = torch.cat(parts).to(device).split([part.numel() for part in parts])
        return self._kept[device][group]

    def tensor(self, index: np.ndarray, device: torch.device) -> Tensor:
        """An index that is not an axis's, once for equal ones."""
        key = (index.tobytes(), device)
        if key not in self._blocks:
            self._blocks[key] = torch.from_numpy(index).to(device)
        return self._blocks[key]


def _tensor(modules: dict[str, nn.Module], name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    module = modules.get(path)
    if module is None:
        return None
    return module._parameters.get(leaf) if leaf in module._parameters else module._buffers.get(leaf)


def _selections(
    model: nn.Module, modules: dict[str, nn.Module], graph: UnitGraph, keep: Keep
) -> list[SelectionChange]:
    changes = []
    for selection in graph.selections:
        module = modules[selection.name]
        assert isinstance(module, SelectiveAdd)
        before = module.index if module.channels is None else module.channels
        if before is not None and before.is_meta:
            raise CompactionError(f"{selection.name} must know which channels it has, but these are on the meta device")
        on = selection.device_in(model) if before is None else before.device
        if on.type == "meta":
            on = torch.device("cpu")  # which channels are left would be lost
        out, skip = (keep.atoms[graph.flow.atoms(slot)] for slot in (selection.out, selection.skip))
        if not (out.all() and skip.all()):
            changes.append(SelectionChange(selection.name, module, *(torch.from_numpy(m).to(on) for m in (out, skip))))
    return changes


def _counters(
    modules: dict[str, nn.Module], graph: UnitGraph, keep: Keep
) -> list[tuple[DemPActivation, Tensor | None]]:
    kept: dict[DemPActivation, list[np.ndarray]] = {}
    for a in graph.activations:
        module = modules.get(a.module)
        if isinstance(module, DemPActivation):
            kept.setdefault(module, []).append(keep.atoms[a.atoms])
    counters: list[tuple[DemPActivation, Tensor | None]] = []
    for module, masks in kept.items():
        fit = all(np.array_equal(mask, masks[0]) for mask in masks[1:])
        fit = fit and (module.active is None or module.active.numel() == masks[0].size)
        if not all(mask.all() for mask in masks):
            counters.append((module, torch.from_numpy(np.nonzero(masks[0])[0]) if fit else None))
    return counters
