"""Rewriting a model for DemP: `swap_activations`, `prepare`. The way back is in `plain`.

`swap_activations` replaces modules in place and needs nothing else. `prepare` traces the model with `torch.fx`, so that
functional activations are counted too, every call of a reused activation has counters of its own, and residual
additions become `SelectiveAdd` modules, which let each residual block lose its own units.
"""
from __future__ import annotations

import contextlib
import copy
import io
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp

from ..arguments import require_module
from ..modules import DemPActivation, DemPGELU, DemPLeakyReLU, DemPReLU, DemPSiLU, SelectiveAdd
from .capture import TRACING, as_tuple
from .fusion import fuse_norms
from .tracing import PrepareError, attributes_of, trace_both_modes

__all__ = ["PrepareError", "overwritable", "prepare", "remembered_inputs", "swap_activations"]

EXAMPLE_INPUTS = "demp_example_inputs"
"""Key in `GraphModule.meta` under which `prepare` keeps its example inputs, as meta tensors."""

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm,
)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)


def counting_twin(module: nn.Module, channel_dim: int = 1) -> DemPActivation | None:
    """The counting module that computes what the plain activation `module` does, or None if there is none."""
    twin: DemPActivation
    if type(module) is nn.ReLU:
        twin = DemPReLU(inplace=module.inplace, channel_dim=channel_dim)
    elif type(module) is nn.LeakyReLU:
        twin = DemPLeakyReLU(module.negative_slope, inplace=module.inplace, channel_dim=channel_dim)
    elif type(module) is nn.GELU:
        twin = DemPGELU(module.approximate, channel_dim=channel_dim)
    elif type(module) is nn.SiLU:
        twin = DemPSiLU(channel_dim=channel_dim)
    else:
        return None
    return twin.train(module.training)


def swap_activations(model: nn.Module) -> int:
    """Replace every nn.ReLU, nn.LeakyReLU, nn.GELU and nn.SiLU module of `model` by its counting twin, in place.

    The channel dimension is taken from the parametrised module defined before the activation: the last dimension after
    nn.Linear or nn.LayerNorm, dimension 1 otherwise. Functional calls (`F.relu`) are not seen, and a module that is
    called at several places keeps one counter for all of them: `prepare` handles both. An nn.SiLU(inplace=True) no longer writes
    over its input: if something else reads that behind it, use `prepare`.

    Returns: how many modules were swapped (a module that occurs under several names counts once).
    """
    require_module("swap_activations: model", model)
    twins: dict[int, DemPActivation] = {}
    channel_dim = 1
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, _CHANNELS_FIRST):
            channel_dim = 1
        elif isinstance(module, _CHANNELS_LAST):
            channel_dim = -1
        if name and id(module) not in twins:
            twin = counting_twin(module, channel_dim)
            if twin is not None:
                twins[id(module)] = twin
        if id(module) in twins:
            model.set_submodule(name, twins[id(module)])
    return len(twins)


def prepare(model: nn.Module, example_inputs: Tensor | Sequence[Any], *, fuse: bool = True) -> fx.GraphModule:
    """Trace `model` into one whose activations count and whose residual additions can select.

    Args:
        model: any model that `torch.fx` can trace. It is left as it is; the result shares its parameters and buffers,
            so an optimiser built on either trains both. Once units were removed its own forward fits no more: go on with the
            result.
        example_inputs: a tensor or a tuple of the forward's positional arguments. Only shapes, dtypes and devices are
            used: nothing is computed.
        fuse: make BatchNorm2d -> activation and BatchNorm2d -> residual addition -> activation one op each
            (`DemPBatchNormAct2d`, at the BatchNorm's path; the activation is then named `bn1.act`).

    Returns: a GraphModule with the same `state_dict` keys. With fuse=False its outputs are bit-equal to the model's (in
        training mode GELU and SiLU agree to rounding: their kernels are as accurate as PyTorch's, not the same); with
        fuse=True they are in evaluation mode, and in training mode each fused op agrees to rounding (a relative error
        of a few 1e-6 in float32, one unit in the last place in bfloat16 and float16, where the unfused model also rounds
        what goes from one layer to the next). Activations keep the name of their module (`layer1.0.relu`,
        further calls `layer1.0.relu_1`); functional ones are named after the module that calls them
        (`features.relu`, `features.relu_1`). In training the sum of an addition is written into its first operand where that
        is the output of a convolution or normalisation that nobody else reads; a forward hook that keeps such an output is to be
        registered before. `a += b` is traced as a + b: a new tensor, of the dtype that both promote to.

    Raises:
        PrepareError: the model cannot be traced, or its forward takes another path in training than in evaluation.
        TypeError: `model` is no nn.Module, or an example input is no tensor and no plain value.
    """
    require_module("prepare: model", model)
    inputs = as_tuple(example_inputs)
    with TRACING:
        graph = trace_both_modes(model)
    prepared = fx.GraphModule(attributes_of(model, graph), graph, class_name=type(model).__name__)
    _attach_unused(model, prepared)
    propagate_shapes(prepared, inputs)
    for node in list(prepared.graph.nodes):
        _replace_activation(prepared, node)
    for node in list(prepared.graph.nodes):
        _replace_addition(prepared, node)
    prepared.graph.lint()
    remembered = tuple(torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x for x in inputs)
    # a deep copy of a GraphModule keeps its `meta` and no further attributes, a pickled one keeps these and no `meta`
    prepared.meta[EXAMPLE_INPUTS] = remembered
    setattr(prepared, EXAMPLE_INPUTS, remembered)
    for name, module in prepared.named_modules():
        original = _get_submodule_or_none(model, name)
        module.training = model.training if original is None else original.training
    if fuse:  # after the modes are set: a fused activation keeps that of the module it comes from
        fuse_norms(prepared)
        prepared.graph.lint()
    for node in prepared.graph.nodes:
        # torch.export would repeat these paths of the original modules instead of looking at the modules that are called
        node.meta.pop("nn_module_stack", None)
    prepared.recompile()
    return prepared


def remembered_inputs(model: nn.Module) -> tuple[Any, ...] | None:
    """The example inputs that `prepare` was given, as meta tensors; None for a model that was not prepared."""
    meta = getattr(model, "meta", {})
    if EXAMPLE_INPUTS not in meta and hasattr(model, EXAMPLE_INPUTS):
        meta[EXAMPLE_INPUTS] = getattr(model, EXAMPLE_INPUTS)
    return meta.get(EXAMPLE_INPUTS)


# --- activations -----------------------------------------------------------------------------------------------------

_FUNCTIONAL: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu",
    F.leaky_relu: "leaky_relu", F.leaky_relu_: "leaky_relu", F.gelu: "gelu", F.silu: "silu",
}
_METHODS = {"relu", "relu_"}


def _plain_module(node: fx.Node) -> nn.Module | None:
    """The nn activation that a functional call stands for."""
    if node.op == "call_method" and node.target in _METHODS:
        return nn.ReLU(inplace=node.target.endswith("_"))
    if node.op != "call_function" or node.target not in _FUNCTIONAL:
        return None
    kind = _FUNCTIONAL[node.target]
    in_place_name = getattr(node.target, "__name__", "").endswith("_")
    arguments = list(node.args[1:])

    def argument(name: str, default: Any) -> Any:
        return node.kwargs.get(name, arguments.pop(0) if arguments else default)

    if kind == "relu":
        return nn.ReLU(inplace=bool(argument("inplace", in_place_name)))
    if kind == "leaky_relu":
        slope = argument("negative_slope", 0.01)
        return nn.LeakyReLU(slope, inplace=bool(argument("inplace", in_place_name)))
    if kind == "gelu":
        return nn.GELU(argument("approximate", "none"))
    return nn.SiLU(inplace=bool(argument("inplace", False)))


def _replace_activation(model: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        in_place = getattr(module, "inplace", False)
        if isinstance(module, DemPActivation):
            if _calls_before(node) == 0:
                return
            twin: DemPActivation | None = copy.deepcopy(module)
        else:
            twin = counting_twin(module, _channel_dim(model, node))
        name = node.target
    else:
        plain = _plain_module(node)
        if plain is None or node_shape(node) is None:
            return
        twin = counting_twin(plain.train(model.training), _channel_dim(model, node))
        in_place = getattr(plain, "inplace", False)
        name = ".".join(filter(None, [_owner(node), type(plain).__name__.lower()]))
    shape = node_shape(node)
    if twin is None or shape is None or len(shape) < 2:
        return
    if node.op == "call_module" and _calls_before(node) == 0:
        model.set_submodule(name, twin)
    else:
        name = free_name(model, name)
        model.add_submodule(name, twin)
    source = node.args[0] if node.args else node.kwargs["input"]
    twin.allocate(shape[twin.channel_dim], node.meta["device"])
    with model.graph.inserting_before(node):
        call = model.graph.call_module(name, (source,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    model.graph.erase_node(node)
    if in_place:
        # who reads the source later reads what was written over it; the twin of SiLU does not write there
        later = set(itertools.takewhile(lambda n: n is not call, reversed(model.graph.nodes)))
        source.replace_all_uses_with(call, delete_user_cb=lambda user: user in later)


def _calls_before(node: fx.Node) -> int:
    """How many earlier nodes call the same module."""
    count = 0
    for other in node.graph.nodes:
        if other is node:
            return count
        count += other.op == "call_module" and other.target == node.target
    return count


def _channel_dim(model: fx.GraphModule, node: fx.Node) -> int:
    """Dimension of the units: last behind a Linear or LayerNorm, 1 otherwise, found by walking up the first operand."""
    source: Any = node
    while isinstance(source, fx.Node):
        if source.op == "call_module":
            module = model.get_submodule(source.target)
            if isinstance(module, _CHANNELS_LAST):
                return 1 if len(node_shape(node) or ()) == 2 else -1
            if isinstance(module, _CHANNELS_FIRST):
                return 1
        if source.op == "call_function" and source.target in (F.linear, F.layer_norm):
            return 1 if len(node_shape(node) or ()) == 2 else -1
        source = source.args[0] if source.args else None
    return 1


# --- residual additions ----------------------------------------------------------------------------------------------

_ADDITIONS = {operator.add, operator.iadd, torch.add}


def _replace_addition(model: fx.GraphModule, node: fx.Node) -> None:
    is_addition = (node.op == "call_function" and node.target in _ADDITIONS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    if not is_addition or len(node.args) != 2 or node.kwargs:
        return
    a, b = node.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or "get_attr" in (a.op, b.op) or a is b:
        return
    shape = node_shape(node)
    if shape is None or len(shape) < 2 or not (node_shape(a) == node_shape(b) == shape):
        return
    into_a = node.target in (operator.iadd, "add_")
    if into_a and len(a.users) > 1:
        return  # a changes under the feet of its other users: left alone
    if a in _ancestors(b):
        a, b = b, a  # the skip is what the other operand was computed from
    name = free_name(model, ".".join(filter(None, [_owner(node), "add"])))
    channel_dim = 1 if len(shape) in (2, 4, 5) else -1
    model.add_submodule(name, SelectiveAdd(channel_dim, inplace=overwritable(model, a), keep_dtype=into_a))
    with model.graph.inserting_before(node):
        call = model.graph.call_module(name, (a, b))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    model.graph.erase_node(node)


def overwritable(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether nobody needs the value of `node` again: one user, and a producer whose backward and hooks do not read its
    output. A fresh output costs more than the addition itself on the CPU, where its pages are touched for the first time."""
    if len(node.users) != 1 or node.op != "call_module":
        return False
    producer = model.get_submodule(node.target)
    is_known = isinstance(producer, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm))
    return is_known and not producer._forward_hooks


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


# --- graph plumbing --------------------------------------------------------------------------------------------------


def propagate_shapes(model: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Give every node meta["tensor_meta"] and meta["device"] by running the graph on fake tensors in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [fake_mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs]

    class Interpreter(ShapeProp):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            n.meta["device"] = result.device if isinstance(result, Tensor) else None
            return result

    try:
        model.eval()
        # ShapeProp prints a traceback before it raises
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            Interpreter(model, fake_mode).propagate(*fakes)
    except Exception as error:
        cause = error.__cause__ or error  # the interpreter wraps what went wrong in pages of its own state
        raise PrepareError(f"prepare: the model does not run on the example inputs: {cause}") from error
    finally:
        for module, training in modes.items():
            module.training = training


def node_shape(node: fx.Node) -> torch.Size | None:
    return getattr(node.meta.get("tensor_meta"), "shape", None)


def _owner(node: fx.Node) -> str:
    """Path of the module whose forward made this node."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def free_name(model: nn.Module, name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    # the traced model has no module where one without children was called as a function
    owner = _get_submodule_or_none(model, parent)
    candidate, number = leaf, 0
    while owner is not None and hasattr(owner, candidate):
        number += 1
        candidate = f"{leaf}_{number}"
    return f"{parent}.{candidate}" if parent else candidate


def _get_submodule_or_none(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _attach_unused(model: nn.Module, prepared: fx.GraphModule) -> None:
    """Carry over what the forward does not use, so that the `state_dict` keys stay."""
    kept = prepared.state_dict(keep_vars=True)
    for key, value in model.state_dict(keep_vars=True).items():
        if key in kept:
            continue
        path, _, leaf = key.rpartition(".")
        owner = prepared
        for part in filter(None, path.split(".")):
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)
