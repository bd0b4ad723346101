"""Walks a captured graph and asks the rule of every op what it does to units."""
from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .activation_calls import ActivationCalls
from .atoms import PINNED, Atoms
from .capture import Capture, module_path, origin
from .flow import Flow, Link, Step
from .values import Balance, Floor, Parameter, ParameterAxis, Reader, Selection, Value, along

__all__ = ["Builder", "VIEW_RULES", "rule"]

Rule = Callable[["Builder", fx.Node], Any]
RULES: dict[Any, Rule] = {}

VIEW_RULES: set[Rule] = set()
"""Rules of ops that give sizes."""

# A parameter that is used as a plain value is followed entry by entry; above this size it is kept whole.
LARGEST_FOLLOWED = 1 << 20


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the rule of some ops: it gets the builder and the node and returns the node's value (or values), or
    NotImplemented if it cannot follow this call. ATen ops are named, since no torch has all of them."""

    def register(function: Rule) -> Rule:
        for target in targets:
            if isinstance(target, str):
                packet, _, overload = target.partition(".")
                target = getattr(getattr(torch.ops.aten, packet, None), overload, None)
            if target is not None:
                RULES[target] = function
        return function

    return register


class Builder:
    """State of one analysis. Rules read values with `value`, and make new ones with the methods below it."""

    def __init__(self, model: nn.Module, choices: dict[fx.Node, int] | None = None) -> None:
        self.model = model
        self.choices = choices or {}
        """Nodes whose first reading turned out wrong: how many of their readings are ruled out."""
        self.atoms = Atoms()
        self.flow = Flow()
        self.axes: dict[tuple[str, int], ParameterAxis] = {}
        self.blocks: dict[str, np.ndarray] = {}
        self.attributes: list[tuple[str, str, np.ndarray]] = []
        self.selections: list[Selection] = []
        self.floors: list[Floor] = []
        self.balances: list[Balance] = []
        self.readers: list[Reader] = []
        self.env: dict[fx.Node, Any] = {}
        self.views: set[fx.Node] = set()
        """Nodes that give sizes, whose rule looks at `choices` itself."""
        self.splits: set[fx.Node] = set()
        """Nodes that split a dimension with units, where it has to be seen whether their sizes follow."""
        self.parts: dict[fx.Node, int] = {}
        """Slices of units, and the dimension that they cut."""
        self.refused: set[fx.Node] = set()
        """Nodes that are not followed."""
        self.made_by: dict[int, fx.Node] = {}
        """Slot -> node."""
        self._node: fx.Node | None = None
        self._uniform_slot = self.flow.add_slot(np.zeros(1, np.int64))
        self._blocks_seen: dict[str, Value] = {}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._calls: dict[str, int] = {}
        self.activation_calls = ActivationCalls(self._modules)
        self.activations = self.activation_calls.activations
        self._canonical = _canonical_names(model)
        self._position: dict[fx.Node, int] = {}
        self._never_zero = {self._uniform_slot}
        self.output_shapes: list[tuple[int, ...]] = []
        """Of the first graph."""
        self.rows: dict[str, list[int]] = {}
        """Parameter -> slots whose entries its rows (dim 0) make, one for each use."""
        self.used: set[str] = set()
        """Parameters and buffers that some graph reads, each by the first of its names."""
        self.uses: Counter[str] = Counter()
        """Parameter or buffer -> nodes of this graph that read it."""

    # --- walking ---

    def run(self, captured: Capture) -> None:
        self._position = {node: i for i, node in enumerate(captured.nodes)}
        self._calls = _module_calls(captured.nodes)
        self.uses.clear()
        self.activation_calls.next_graph()
        for node in captured.nodes:
            self._node = node
            if node.op == "placeholder":
                name = captured.tensors.get(node.name)
                shape = _shape(node)
                if name is not None and shape is not None:
                    name = self._canonical.get(name, name)
                    self.env[node] = Parameter(name, shape, tuple(range(len(shape))))
                    self.uses[name] += len(node.users)
                    if node.users:
                        self.used.add(name)
                else:
                    self.env[node] = None if shape is None else self.plain(shape)
            elif node.op == "call_function":
                self.env[node] = self._call(node)
                self._write_back(node)
                if not node.users and node.target is not operator.getitem and not _writes(node):
                    # whoever asks for it elsewhere (a head that is returned in training only) finds it whole
                    self.pin(self.env[node], f"{origin(node)} is computed, and used nowhere")
            elif node.op == "output":
                self.output_shapes = self.output_shapes or [_shape(x) for x in node.all_input_nodes if _shape(x)]
                for source in node.all_input_nodes:
                    self.pin(self._env_value(source), f"{origin(source)} is an output of the model")
            else:
                self.env[node] = None
        for atoms, why in self.activation_calls.shifted():
            self.atoms.pin(atoms, why)

    def _call(self, node: fx.Node) -> Any:
        found = RULES.get(node.target)
        if found in VIEW_RULES:
            self.views.add(node)
        if node in self.choices and node not in self.views:
            return self.opaque(node, f"sizes are written down in {origin(node)}")
        result = found(self, node) if found is not None else NotImplemented
        return self.opaque(node) if result is NotImplemented else result

    def _write_back(self, node: fx.Node) -> None:
        """An op that writes into its first argument: later readers of that memory see the result."""
        if not _writes(node) or not node.args:
            return
        target = node.args[0]
        result = self.env[node]
        if not isinstance(target, fx.Node):
            return
        old = self.env.get(target)
        if isinstance(result, Value) and isinstance(old, Value):
            for other, value in list(self.env.items()):
                if other is target or other is node or not isinstance(value, Value) or value.storage is not old.storage:
                    continue
                if any(self._position[user] > self._position[node] for user in other.users):
                    # a view whose memory changed: what it holds now is not followed
                    self.pin(value, f"memory it shares is overwritten by {origin(node)}")
                    self.env[other] = Value(value.shape, np.zeros((1,) * len(value.shape), np.int64), self._uniform_slot)
            result.storage = old.storage
        self.env[target] = result

    # --- reading ---

    def value(self, node: Any) -> Value | None:
        """The value of an argument: None if it is no tensor. Parameters become values here."""
        if not isinstance(node, fx.Node):
            return None
        return self._env_value(node)

    def _env_value(self, node: fx.Node) -> Value | None:
        found = self.env.get(node)
        return self._parameter_value(found) if isinstance(found, Parameter) else found

    def parameter(self, node: Any) -> Parameter | None:
        found = self.env.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Parameter) else None

    def _parameter_value(self, parameter: Parameter) -> Value:
        """A parameter used as a plain value: entries of its own, made axes at the end where they form some."""
        if parameter.dims != tuple(range(len(parameter.dims))):
            value = self._parameter_value(self._untransposed(parameter))
            atoms = value.atoms.transpose(parameter.dims)
            order = np.arange(atoms.size).reshape(value.atoms.shape).transpose(parameter.dims).ravel()
            return self.derive(parameter.shape, atoms, "affine", [Link(value.slot, order, np.arange(order.size))])
        known = self._blocks_seen.get(parameter.name)
        if known is not None:
            return known
        varying = [d for d, size in enumerate(parameter.shape) if size > 1]
        size = int(np.prod(parameter.shape, dtype=np.int64))
        if not varying or size > LARGEST_FOLLOWED:
            for dim in varying:
                self.align(parameter, dim, np.full(parameter.shape[dim], PINNED))
            value = self.plain(parameter.shape)
        elif len(varying) == 1:
            atoms = self.axis_atoms(parameter, varying[0])
            value = self.source(parameter.shape, along(atoms, varying[0], len(parameter.shape)))
            self.makes(parameter, value)
        elif any((parameter.name, dim) in self.axes for dim in varying):
            for dim in varying:
                self.align(parameter, dim, np.full(parameter.shape[dim], PINNED), f"parameter {parameter.name} is used in two ways")
            value = self.plain(parameter.shape)
        else:
            atoms = self.atoms.fresh(*parameter.shape)
            self.blocks[parameter.name] = atoms
            value = self.source(parameter.shape, atoms)
        self._blocks_seen[parameter.name] = value
        return value

    def _untransposed(self, parameter: Parameter) -> Parameter:
        order = np.argsort(parameter.dims)
        return Parameter(parameter.name, tuple(parameter.shape[d] for d in order), tuple(range(len(order))))

    def tensor(self, name: str) -> Tensor:
        """The model's parameter or buffer of that name."""
        path, _, leaf = name.rpartition(".")
        return getattr(self._modules[path], leaf)

    def owner(self, node: fx.Node) -> tuple[str, nn.Module | None]:
        """Path and module whose forward made a node, and the module itself."""
        path = module_path(node)
        return path, self._modules.get(path)

    def _layers_behind(self, node: fx.Node) -> set[str]:
        """Paths of the nearest modules in front of a node that read a parameter. What lies between and reads none, as noise that
        only training adds, makes no other call of it."""
        found: set[str] = set()
        seen: set[fx.Node] = set()
        pending = [node]
        while pending:
            for source in pending.pop().all_input_nodes:
                if source in seen:
                    continue
                seen.add(source)
                if any(isinstance(self.env.get(operand), Parameter) for operand in source.all_input_nodes):
                    found.add(module_path(source))
                else:
                    pending.append(source)
        return found

    def activation_number(self, path: str, kind: str | None, atoms: np.ndarray, dim: int) -> int:
        """See `ActivationCalls.number`."""
        behind = set() if self._node is None else self._layers_behind(self._node)
        return self.activation_calls.number(path, kind, atoms, dim, behind)

    def is_read(self, name: str) -> bool:
        """Whether a walked graph reads the parameter or buffer of that name."""
        return self._canonical.get(name, name) in self.used

    def calls(self, path: str) -> int:
        """How often the module at `path` is called in this graph."""
        return self._calls.get(path, 0)

    # --- making values ---

    def plain(self, shape: Iterable[int]) -> Value:
        """A value without units."""
        shape = tuple(shape)
        return Value(shape, np.zeros((1,) * len(shape), np.int64), self._uniform_slot)

    def source(self, shape: tuple[int, ...], atoms: np.ndarray) -> Value:
        """A value with units whose entries are never known to be zero."""
        return self.derive(shape, atoms, "affine", [])

    def fresh(self, shape: tuple[int, ...], dim: int, reason: str) -> Value:
        """A value with new units along `dim`, of which at least one must stay."""
        atoms = self.atoms.fresh(shape[dim])
        self.floors.append(Floor(atoms, 1, reason))
        return self.source(shape, along(atoms, dim, len(shape)))

    def derive(self, shape: tuple[int, ...], atoms: np.ndarray, kind: str, links: list[Link], **step: Any) -> Value:
        value = Value(tuple(shape), atoms, self.flow.add_slot(atoms))
        self.flow.steps.append(Step(value.slot, kind, links, **step))
        if self._node is not None:
            self.made_by[value.slot] = self._node
        if kind == "affine" or (kind == "sum" and "activation" not in step and self._nowhere_zero(links, atoms.size)):
            self._never_zero.add(value.slot)
        return value

    def _nowhere_zero(self, links: list[Link], size: int) -> bool:
        """Whether a sum is made of values that are never known to be zero, in each of its entries."""
        if not links or any(link.slot not in self._never_zero for link in links):
            return False
        if any(link.target is None for link in links):
            return True
        return bool(np.bincount(np.concatenate([link.target for link in links]), minlength=size).all())

    def never_zero(self, x: Value) -> bool:
        """Whether x is never known to be zero, whatever units are dead."""
        return x.slot in self._never_zero

    def same(self, x: Value, shape: tuple[int, ...] | None = None, *, view: bool = False) -> Value:
        """The same entries again: an op that keeps zero zero, and the axes where they are."""
        return Value(x.shape if shape is None else tuple(shape), x.atoms, x.slot, x.storage if view else object())

    def affine(self, x: Value, shape: tuple[int, ...] | None = None) -> Value:
        """The same units, no longer known to be zero where x is."""
        if x.slot in self._never_zero:
            return self.same(x, shape)
        return self.derive(x.shape if shape is None else shape, x.atoms, "affine", [Link(x.slot)])

    def opaque(self, node: fx.Node, reason: str = "") -> Any:
        """Output of an op that is not followed: everything that goes in is kept whole."""
        reason = reason or f"{origin(node)} is not followed"
        self.refused.add(node)
        for source in node.all_input_nodes:
            parameter = self.parameter(source)
            if parameter is None:
                self.pin(self.env.get(source), reason)
            else:
                for dim, size in enumerate(parameter.shape):
                    self.align(parameter, dim, np.full(size, PINNED), reason)
        return self.plain_like(node)

    def plain_like(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return self.plain(value.shape)
        if isinstance(value, (tuple, list)):
            return [self.plain(v.shape) if isinstance(v, Tensor) else None for v in value]
        return None

    # --- constraints ---

    def pin(self, x: Any, reason: str) -> None:
        if isinstance(x, Value):
            self.atoms.pin(x.atoms, reason)
        elif isinstance(x, (list, tuple)):
            for one in x:
                self.pin(one, reason)

    def axis_atoms(self, parameter: Parameter, dim: int) -> np.ndarray:
        key = (parameter.name, parameter.dims[dim])
        if key not in self.axes:
            self.axes[key] = ParameterAxis(*key, self.atoms.fresh(parameter.shape[dim]))
        return self.axes[key].atoms

    def align(self, parameter: Parameter | None, dim: int, atoms: np.ndarray, reason: str = "") -> None:
        """The entries along `dim` of a parameter belong to `atoms`."""
        if parameter is None:
            return
        if parameter.name in self.blocks:
            self.pin(self._blocks_seen[parameter.name], f"parameter {parameter.name} is used in two ways")
        key = (parameter.name, parameter.dims[dim])
        if key not in self.axes:
            self.axes[key] = ParameterAxis(*key, np.array(atoms, np.int64))
        else:
            self.atoms.tie(self.axes[key].atoms, atoms)
        if reason:
            self.atoms.pin(self.axes[key].atoms, reason)

    def makes(self, parameter: Parameter | None, x: Value) -> None:
        """Row r (dim 0) of a parameter is used for unit r of `x` only."""
        if parameter is not None:
            whole = parameter.dims[:1] == (0,) and x.atoms.size == parameter.shape[0]
            self.rows.setdefault(parameter.name, []).append(x.slot if whole else self._uniform_slot)

    def uniform_except(self, x: Value, dim: int) -> Value:
        """x with units along `dim` only; units along other dimensions are tied together."""
        dim %= len(x.shape)
        others = tuple(d for d in x.unit_dims if d != dim)
        if not others:
            return x
        first = x.atoms[tuple(slice(0, 1) if d in others else slice(None) for d in range(x.atoms.ndim))]
        self.atoms.tie(x.atoms, first)
        target = np.broadcast_to(np.arange(first.size).reshape(first.shape), x.atoms.shape).ravel()
        return self.derive(x.shape, first, "sum", [Link(x.slot, np.arange(x.atoms.size), target)])

    def full_axis(self, x: Value, dim: int) -> Value:
        """x with one entry for each position along `dim`, uniform along all other dimensions."""
        x = self.uniform_except(x, dim)
        size = x.shape[dim]
        if x.atoms.size == size:
            return x
        atoms = along(np.broadcast_to(x.atoms.ravel(), (size,)), dim % len(x.shape), len(x.shape))
        return self.derive(x.shape, atoms, "sum", [Link(x.slot, np.zeros(size, np.int64), np.arange(size))])

    def rearrange(self, node: fx.Node, transform: Callable[[np.ndarray], np.ndarray]) -> Value:
        """The node's first argument with its entries moved about. `transform` gets an array with a value's atoms, whose
        uniform dimensions have size 1, and returns that of the result."""
        x = self.value(node.args[0])
        shape = _shape(node)
        if x is None or shape is None:
            return NotImplemented
        order = transform(np.arange(x.atoms.size).reshape(x.atoms.shape))
        flat = np.ascontiguousarray(order).ravel()
        atoms = x.atoms.ravel()[order]
        if np.array_equal(flat, np.arange(x.atoms.size)):
            return Value(shape, atoms, x.slot, x.storage)
        out = self.derive(shape, atoms, "sum", [Link(x.slot, flat, np.arange(flat.size))])
        out.storage = x.storage
        return out

    def attribute(self, path: str, name: str, atoms: np.ndarray) -> None:
        """The module at `path` states the number of these entries in its attribute `name`. Of two-dimensional atoms,
        (groups, units), the groups are counted."""
        if self.states(path, name, atoms.shape[0]):
            self.attributes.append((path, name, atoms))

    def states(self, path: str, name: str, number: int) -> bool:
        """Whether the module at `path` has an attribute of that name and number, and of its own: a property follows by itself."""
        module = self._modules.get(path)
        return module is not None and vars(module).get(name) == number


def _writes(node: fx.Node) -> bool:
    """Whether the op writes into an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else None


def _module_calls(nodes: list[fx.Node]) -> dict[str, int]:
    """How often each module is called. torch.export marks the second call of `relu` as `relu@1`."""
    calls: dict[str, set[str]] = {}
    for node in nodes:
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            calls.setdefault(path, set()).add(key)
    return {path: len(keys) for path, keys in calls.items()}


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor (tied weights have several)."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        for members in (module._parameters, module._buffers):
            for leaf, tensor in members.items():
                if tensor is not None:
                    name = f"{owner}.{leaf}" if owner else leaf
                    names[name] = first.setdefault(id(tensor), name)
    return names
