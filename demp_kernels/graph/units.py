"""`UnitGraph`: which entry of which parameter belongs to which unit, analysed once and followed through compactions."""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from ..norm_modules import DemPBatchNormAct2d
from . import rules_layers, rules_pointwise, rules_products, rules_recurrent, rules_reduce, rules_shape  # noqa: F401  (they register themselves)
from .atoms import PINNED
from .builder import Builder
from .capture import as_tuple, capture, materialise, origin
from .flow import Flow
from .gates import find_gates
from .probe import ask
from .training_forward import capture_training, leaves_something, looks_at_training, unread_parameters
from .trial import Widths
from .values import Balance, Floor, Selection

__all__ = ["ActivationUnits", "Keep", "UnitGraph"]


WRAPPER = re.compile(r"(?:^|\.)(?:_checkpoint_wrapped_module|_orig_mod)(?=\.|$)")
"""What activation checkpointing and torch.compile put into the paths of what they wrap."""
ATTEMPTS = 50
"""How often the analysis is corrected by what the probe finds, before its plans have to be tried one by one."""


@dataclass
class ActivationUnits:
    """The units of one call of an activation.

    name: key in `UnitGraph.units`. module: path of the module, or the name of the function call. atoms: the class of each
    unit. ids: each unit's number at the analysis. total: units at the analysis. dim: the dimension of the units.
    """

    name: str
    module: str
    atoms: np.ndarray
    ids: np.ndarray
    total: int
    dim: int


@dataclass
class Keep:
    """What stays, for given dead units. `atoms`: (classes,) bool. `widened`: activation or reason -> dead entries that
    stay because of a width. `live`: (entries,) bool, values that are not known to be zero."""

    atoms: np.ndarray
    widened: dict[str, int]
    live: np.ndarray = field(default_factory=lambda: np.empty(0, bool))


class UnitGraph:
    """The units of a model. Make it with `UnitGraph.trace`; `compact(..., graph=graph)` keeps it up to date.

    units: activation name -> units it has now. An activation module that is called several times has an entry a call,
        `name@0`, `name@1`, ...
    total_units: the same at the analysis.
    unit_ids: activation name -> numbers (at the analysis) of the units that it still has.
    gates: parameter name -> activation whose dead unit r makes row r (dim 0) of the parameter useless: its gradient is
        zero.
    """

    def __init__(self, built: Builder, inputs: tuple[Any, ...], untraced: list[str]) -> None:
        roots, reasons = built.atoms.resolve()
        blocks, split = _block_axes(built, roots)
        reasons = {**split, **reasons}
        pinned = np.zeros(built.atoms.count, bool)
        pinned[[roots[PINNED], *reasons]] = True
        wanted = {slot for slots in built.rows.values() for slot in slots}
        wanted |= {slot for a in built.activations for slot in a.slots} | {s for n in built.selections for s in (n.skip, n.out)}
        built.flow.close(roots, pinned, wanted)
        used = [built.flow.atom_of, *(roots[axis.atoms] for axis in built.axes.values()), roots[[PINNED]]]
        used += [roots[a] for _, _, a in blocks]
        classes = np.unique(np.concatenate(used))

        def number(atoms: np.ndarray) -> np.ndarray:
            return np.searchsorted(classes, roots[atoms])

        self.number = number
        self.flow: Flow = built.flow
        self.flow.atom_of = np.searchsorted(classes, built.flow.atom_of)
        self.classes: int = classes.size
        self.is_pinned = pinned[classes]
        self.reasons: dict[int, str] = {
            int(np.searchsorted(classes, root)): text for root, text in reasons.items() if root in classes
        }
        parameters = {name for name, _ in built.model.named_parameters()}
        self.rows = {name: slots for name, slots in built.rows.items() if name in parameters}
        self.axes: dict[tuple[str, int], np.ndarray] = {
            **{key: number(axis.atoms) for key, axis in built.axes.items()},
            **{(name, dim): number(atoms) for name, dim, atoms in blocks},
        }
        self.axis_ids = {key: np.arange(atoms.size) for key, atoms in self.axes.items()}
        self.axis_sizes = {key: atoms.size for key, atoms in self.axes.items()}
        self.attributes = [(path, name, number(atoms)) for path, name, atoms in built.attributes]
        self.selections = built.selections
        self.readers = built.readers
        self.floors = [Floor(number(f.atoms), f.count, f.reason) for f in built.floors]
        self.balances = [Balance(n.weight, number(n.rows), number(n.columns)) for n in built.balances]
        self.activations = _named(built, number)
        self.inputs = inputs
        self.output_shapes = built.output_shapes
        self.untraced = untraced
        self.total_units: dict[str, int] = {a.name: a.total for a in self.activations}
        self.proved = False
        """Whether the model itself, with some of everything removed, had the shapes that the analysis expects."""
        self._gates: dict[str, str] | None = None
        numbers: dict[bytes, int] = {}
        self.axis_groups = [numbers.setdefault(atoms.tobytes(), len(numbers)) for atoms in self.axes.values()]
        """A number for each of `axes`, the same for equal ones: they stay equal when they shrink."""

    @classmethod
    def trace(cls, model: nn.Module, example_inputs: Any) -> UnitGraph:
        """Analyse `model` on its ATen graph (torch.export, evaluation mode, fake tensors).

        Nothing of the model changes, and nothing is computed; module modes come back exactly. What only a training forward
        does (auxiliary heads, features that it returns) is followed in a second graph, where the code looks at `training` or
        the first graph leaves parameters or buffers unread.

        Args:
            example_inputs: a tensor or a tuple of the forward's positional arguments; meta tensors will do.

        Raises demp_kernels.graph.AnalysisError (a ValueError) if torch.export cannot capture the model, TypeError for a wrong
        argument, ValueError for a model whose fused norms were made SyncBatchNorm, which lose their activations by it.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"UnitGraph.trace: model must be an nn.Module, got {type(model).__name__}")
        _refuse_converted(model)
        inputs = materialise(model, as_tuple(example_inputs))
        evaluated, trained = capture(model, inputs), None
        differs = looks_at_training(model)
        choices: dict[fx.Node, int] = {}
        pins: dict[tuple[str, int], str] = {}
        for _ in range(ATTEMPTS):
            builder = Builder(model, choices)
            builder.run(evaluated)
            if trained is None and (differs or leaves_something(model, builder)):
                # what runs in training only reads units too; its graph shares parameters and units with the first
                trained = capture_training(model, inputs, builder)
            for captured in trained or ():
                builder.run(captured)
            untraced = unread_parameters(model, builder)
            for key, reason in pins.items():
                if key in builder.axes:
                    builder.atoms.pin(builder.axes[key].atoms, reason)
            graph = cls(builder, _without_memory(inputs), untraced)
            answer = ask(model, graph, builder, [evaluated, *(trained or ())])
            graph.proved = answer.proves
            del graph.number
            if not answer.wrong and not answer.pins:
                break
            pins.update(answer.pins)
            for node in answer.wrong or ():
                choices[node] = choices.get(node, 0) + 1
        for step in graph.flow.steps:
            step.origin = origin(builder.made_by[step.slot]) if step.slot in builder.made_by else ""
        return graph

    # --- what there is ---

    @property
    def units(self) -> dict[str, int]:
        return {a.name: a.atoms.size for a in self.activations}

    @property
    def unit_ids(self) -> dict[str, np.ndarray]:
        return {a.name: a.ids for a in self.activations}

    @property
    def gates(self) -> dict[str, str]:
        if self._gates is None:
            self._gates = find_gates(self)
        return self._gates

    def calls_of(self, model: nn.Module) -> dict[nn.Module, list[ActivationUnits]]:
        """The calls of each activation module of `model`, in the order of the forward. A module may go by several paths.
        Wrappers inside the model (activation checkpointing, torch.compile of a block) are looked through."""
        modules = {WRAPPER.sub("", name).lstrip("."): module for name, module in model.named_modules(remove_duplicate=False)}
        calls: dict[nn.Module, list[ActivationUnits]] = {}
        for a in self.activations:
            if (module := modules.get(WRAPPER.sub("", a.module).lstrip("."))) is not None:
                calls.setdefault(module, []).append(a)
        return calls

    # --- what stays ---

    def masks(self, dead: Mapping[str, Tensor]) -> dict[int, np.ndarray]:
        """Check `dead` (activation name -> (units,) bool) and give it by activation number.

        The path of a module that is called several times stands for all its calls. Raises ValueError for an unknown
        name or a wrong length, TypeError for a wrong dtype.
        """
        masks: dict[int, np.ndarray] = {}
        if not isinstance(dead, Mapping):
            raise TypeError(f"dead must map names of activations to bool tensors, got {type(dead).__name__}")
        by_name: dict[str, list[int]] = {}
        for i, a in enumerate(self.activations):
            for name in {a.name, a.module}:
                by_name.setdefault(name, []).append(i)
        for name, mask in dead.items():
            numbers = by_name.get(name)
            if not numbers:
                known = ", ".join(list(self.units)[:8]) + (", ..." if len(self.activations) > 8 else "")
                raise ValueError(f"dead: names must be activations of the model ({known or 'it has none'}), got {name!r}")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"dead[{name!r}] must be a bool tensor, got {got}")
            for i in numbers:
                units = self.activations[i].atoms.size
                if mask.layout != torch.strided or mask.device.type == "meta":
                    raise ValueError(f"dead[{name!r}] must be a dense tensor with values, got {mask.layout} on {mask.device}")
                if mask.shape != (units,):
                    raise ValueError(f"dead[{name!r}] must have shape ({units},), got {tuple(mask.shape)}")
                array = mask.detach().cpu().numpy()
                masks[i] = masks[i] | array if i in masks else array
        return masks

    def keep(
        self,
        dead: Mapping[str, Tensor],
        *,
        round_to: int = 1,
        min_units: int = 1,
        nonzero: Mapping[str, Tensor] | None = None,
        stay: Mapping[str, np.ndarray] | None = None,
    ) -> Keep:
        """What has to stay when the units `dead` are zero; see `Keep`. `keep_masks` gives it by parameter.

        Args:
            nonzero: those of them that are not zero but constant, or nearly: they go only where all that reads them is
                layers that can make up for it (`readers`).
            stay: path of a layer -> classes that it reads and keeps all the same, unless they are zero.
        """
        masks = self.masks(dead)
        live, folded = self.flow.live(masks), None
        if nonzero is not None:
            folded = ~live & ~self.flow.rigid
            for reader in self.readers:
                if stay is not None and reader.path in stay:
                    span = self.flow.slots[reader.slot].span
                    folded[:, span] &= ~np.isin(self.flow.atom_of[span], stay[reader.path])
            for number, mask in self.masks(nonzero).items():
                masks[number] = masks[number] & ~mask
            live = self.flow.live(masks)
        widened: dict[str, int] = {}
        pinned = np.nonzero(self.is_pinned)[0]
        kept = self.flow.kept(live, self.classes, pinned, lambda k: self.to_widen(k, widened, round_to, min_units), folded)[0]
        return Keep(kept, widened, live[0])

    def to_widen(self, kept: np.ndarray, widened: dict[str, int], round_to: int, min_units: int) -> np.ndarray:
        """Classes to keep besides `kept` because of widths; counted in `widened` by activation or reason."""
        kept = kept.copy()
        added: list[np.ndarray] = [np.empty(0, np.int64)]

        def keep(extra: np.ndarray, reason: str) -> None:
            if extra.size:
                kept[extra] = True
                added.append(extra)
                widened[reason] = widened.get(reason, 0) + extra.size

        for a in self.activations:
            count = max(min_units, -(-int(kept[a.atoms].sum()) // round_to) * round_to)
            keep(_first(a.atoms, kept, count), a.name)
        for floor in self.floors:
            keep(_first(floor.atoms, kept, floor.count), floor.reason)
        for balance in self.balances:
            keep(_balancing(balance, kept), f"the groups of {balance.weight} keep equal sizes")
        return np.concatenate(added)

    def keep_masks(self, keep: Keep) -> dict[tuple[str, int], Tensor]:
        """(parameter or buffer name, dimension) -> (size,) bool: entries that stay."""
        return {key: torch.from_numpy(keep.atoms[atoms]) for key, atoms in self.axes.items()}

    def widths(self, model: nn.Module, kept: np.ndarray) -> Widths:
        """What `model` looks like with the classes `kept` (classes,) bool alone."""
        modules = dict(model.named_modules(remove_duplicate=False))
        widths = Widths()
        dims: dict[str, dict[int, int]] = {}
        for (name, dim), atoms in self.axes.items():
            dims.setdefault(name, {})[dim] = int(kept[atoms].sum())
        for balance in self.balances:
            dims.setdefault(balance.weight, {})[1] = int(kept[balance.columns].sum(1).max(initial=0))
        for name, sizes in dims.items():
            path, _, leaf = name.rpartition(".")
            tensor = getattr(modules[path], leaf)
            widths.shapes[id(tensor)] = tuple(sizes.get(d, size) for d, size in enumerate(tensor.shape))
        for path, attribute, atoms in self.attributes:
            widths.attributes.append((modules[path], attribute, self.count(atoms, kept)))
        for selection in self.selections:
            index, channels = self.selection_index(selection, kept)
            sizes = None if index is None else (index.size, channels)
            widths.selections.append((modules[selection.name], sizes, selection.device_in(model)))
        return widths

    def count(self, atoms: np.ndarray, kept: np.ndarray) -> int:
        """How many of an attribute's entries stay; of (groups, units) how many groups."""
        stays = kept[atoms]
        return int((stays.any(1) if stays.ndim == 2 else stays).sum())

    def selection_index(self, selection: Selection, kept: np.ndarray) -> tuple[np.ndarray | None, int]:
        """Where each kept channel of a sum is found among the kept channels of its skip, -1 for nowhere; None if the
        channels are the same. And the number of channels of the skip."""
        link = next(step for step in self.flow.steps if step.slot == selection.out).links[0]
        skip, out = kept[self.flow.atoms(selection.skip)], kept[self.flow.atoms(selection.out)]
        place = np.where(skip, np.cumsum(skip) - 1, -1)
        index = np.full(out.size, -1, np.int64)
        index[link.target] = place[link.source]
        index, channels = index[out], int(skip.sum())
        return (None, channels) if np.array_equal(index, np.arange(channels)) else (index, channels)

    # --- following a compaction ---

    def is_whole(self, keep: Keep) -> bool:
        """Whether everything stays that the model still has. Classes that it has lost stay in no `Keep`."""
        return all(keep.atoms[atoms].all() for atoms in self.axes.values())

    def shrink(self, kept: np.ndarray) -> None:
        """Forget the classes that are not kept (classes,) bool: the model has lost them."""
        self.flow.shrink(kept)
        shrunk: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # equal axes have equal ids
        for (key, atoms), group in zip(self.axes.items(), self.axis_groups):
            if group not in shrunk:
                stays = kept[atoms]
                shrunk[group] = atoms[stays], self.axis_ids[key][stays]
            self.axes[key], self.axis_ids[key] = shrunk[group]
        self.attributes = [(path, name, _left(atoms, kept)) for path, name, atoms in self.attributes]
        for balance in self.balances:
            balance.rows, balance.columns = _left(balance.rows, kept), _left(balance.columns, kept)
        for floor in self.floors:
            floor.atoms = floor.atoms[kept[floor.atoms]]
        for a in self.activations:
            stays = kept[a.atoms]
            a.atoms, a.ids = a.atoms[stays], a.ids[stays]
        self._gates = None


def _first(atoms: np.ndarray, kept: np.ndarray, count: int) -> np.ndarray:
    """The first classes of `atoms` to keep besides `kept`, so that `count` entries stay."""
    stays = kept[atoms]
    missing = min(count, atoms.size) - int(stays.sum())
    if missing <= 0:
        return np.empty(0, np.int64)
    candidates = atoms[~stays]
    _, first, copies = np.unique(candidates, return_index=True, return_counts=True)
    order = np.argsort(first)
    needed = int(np.searchsorted(np.cumsum(copies[order]), missing)) + 1
    return candidates[np.sort(first)[:needed]]


def _balancing(balance: Balance, kept: np.ndarray) -> np.ndarray:
    """Classes to keep besides so that all groups of which something stays have equal numbers."""
    alive = kept[balance.rows].any(1) | kept[balance.columns].any(1)
    added = []
    for atoms in (balance.rows[alive], balance.columns[alive]):
        most = max(1, int(kept[atoms].sum(1).max(initial=0)))
        added += [_first(group, kept, most) for group in atoms]
    return np.unique(np.concatenate(added)) if added else np.empty(0, np.int64)


def _left(atoms: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The kept ones of some classes; of (groups, units) the groups of which something stays, equal in size."""
    stays = kept[atoms]
    if atoms.ndim == 1:
        return atoms[stays]
    groups = int(stays.any(1).sum())
    return atoms[stays].reshape(groups, -1) if stays.any() else atoms[:0]


def _named(built: Builder, number: Any) -> list[ActivationUnits]:
    paths = [a.name for a in built.activations]
    named, seen = [], dict.fromkeys(paths, 0)
    for a in built.activations:
        name = a.name if paths.count(a.name) == 1 else f"{a.name}@{seen[a.name]}"
        seen[a.name] += 1
        named.append(ActivationUnits(name, a.name, number(a.atoms), np.arange(a.atoms.size), a.atoms.size, a.dim))
    return named


def _block_axes(
    built: Builder, roots: np.ndarray
) -> tuple[list[tuple[str, int, np.ndarray]], dict[int, str]]:
    """Axes of the parameters that were followed entry by entry: a dimension along which alone the classes change.

    Returns (axes as (name, dimension, atoms), reasons for the classes of parameters that have no such axis).
    """
    axes, split = [], {}
    for name, atoms in built.blocks.items():
        found = [d for d in range(atoms.ndim) if atoms.shape[d] > 1 and _depends_on(roots[atoms], d)]
        if len(found) == 1:
            d = found[0]
            axes.append((name, d, np.moveaxis(atoms, d, 0).reshape(atoms.shape[d], -1)[:, 0]))
        elif not found:
            split.update(dict.fromkeys(np.unique(roots[atoms]).tolist(), f"parameter {name} is used entry by entry"))
        else:
            split[int(roots[atoms].flat[0])] = f"parameter {name} would go as a whole"
    return axes, split


def _depends_on(classes: np.ndarray, dim: int) -> bool:
    rows = np.moveaxis(classes, dim, 0).reshape(classes.shape[dim], -1)
    return bool((rows == rows[:, :1]).all())


def _without_memory(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map(lambda x: torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x, inputs)


def _refuse_converted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        fused = isinstance(module, DemPBatchNormAct2d)
        if not fused and isinstance(module, nn.modules.batchnorm._NormBase) and hasattr(module, "act"):
            raise ValueError(
                f"{name} was a DemPBatchNormAct2d and is a {type(module).__name__} without its activation: call "
                "convert_sync_batchnorm first, then prepare"
            )
