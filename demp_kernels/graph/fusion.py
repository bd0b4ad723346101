"""Fusing BatchNorm2d -> activation and BatchNorm2d -> residual addition -> activation of a prepared model, and back."""
from __future__ import annotations

from torch import fx, nn

from ..modules import DemPActivation, SelectiveAdd
from ..norm_modules import DemPBatchNormAct2d

__all__ = ["fuse_norms", "unfuse_norms"]


def fuse_norms(model: fx.GraphModule) -> int:
    """Replace BatchNorm2d modules and the activation behind them by DemPBatchNormAct2d, in place, at the BatchNorm's own
    path: the `state_dict` keys stay. The activation becomes the child `act`, the addition the child `add`.

    Fused is a plain nn.BatchNorm2d (no subclass, no hooks) that is called once and read by nothing but the counting
    activation, or by a SelectiveAdd, as its first operand, that is read by nothing but the activation. The activation
    and the addition must have one call each and no hooks as well.

    Returns how many were fused. The caller recompiles the graph.
    """
    calls = _calls(model)
    candidates = [n for n in model.graph.nodes if _single(model, n, calls) and _is_norm(model.get_submodule(n.target))]
    fused = 0
    for norm_node in candidates:
        found = _consumers(model, norm_node, calls)
        if found is None:
            continue
        add_node, act_node = found
        norm, act = model.get_submodule(norm_node.target), model.get_submodule(act_node.target)
        add = None if add_node is None else model.get_submodule(add_node.target)
        if add is not None:
            add.inplace = False  # nothing of its own to write into; evaluation never did
        model.set_submodule(norm_node.target, DemPBatchNormAct2d.fuse(norm, act, add))
        residual = () if add_node is None else (add_node.args[1],)
        with model.graph.inserting_before(act_node):
            call = model.graph.call_module(norm_node.target, (norm_node.args[0], *residual))
        call.meta = dict(act_node.meta)
        call.meta["nn_module_stack"] = norm_node.meta.get("nn_module_stack", {})
        act_node.replace_all_uses_with(call)
        for old in filter(None, (act_node, add_node, norm_node)):
            model.graph.erase_node(old)
            if old is not norm_node:
                model.delete_submodule(old.target)
        fused += 1
    return fused


def unfuse_norms(model: fx.GraphModule) -> None:
    """Undo `fuse_norms`, for any DemPBatchNormAct2d that the graph calls once: a plain BatchNorm2d at its path, the
    addition at `<path>_add` and the activation at `<path>_act`. The caller recompiles the graph."""
    calls = _calls(model)
    for node in list(model.graph.nodes):
        if node.op != "call_module" or calls[node.target] != 1:
            continue
        module = model.get_submodule(node.target)
        if not isinstance(module, DemPBatchNormAct2d):
            continue
        operands = {**dict(zip(("x", "residual"), node.args)), **node.kwargs}
        model.set_submodule(node.target, module.unfuse())
        with model.graph.inserting_before(node):
            call = model.graph.call_module(node.target, (operands["x"],))
            if operands.get("residual") is not None:
                add_name = _attach(model, f"{node.target}_add", module.add)
                call = model.graph.call_module(add_name, (call, operands["residual"]))
                call.meta = dict(node.meta)
            call = model.graph.call_module(_attach(model, f"{node.target}_act", module.act), (call,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        model.graph.erase_node(node)


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d


def _consumers(
    model: fx.GraphModule, norm_node: fx.Node, calls: dict[str, int]
) -> tuple[fx.Node | None, fx.Node] | None:
    """(addition or None, activation) behind a BatchNorm2d, or None if it cannot be fused with them."""
    if len(norm_node.args) != 1 or norm_node.kwargs:
        return None
    add_node, act_node = None, _only_user(norm_node)
    if act_node is not None and _single(model, act_node, calls) and act_node.args[0] is norm_node:
        if isinstance(model.get_submodule(act_node.target), SelectiveAdd):
            add_node, act_node = act_node, _only_user(act_node)
    if act_node is None or not _single(model, act_node, calls):
        return None
    act = model.get_submodule(act_node.target)
    if not isinstance(act, DemPActivation) or act.channel_dim != 1:
        return None
    return add_node, act_node


def _single(model: fx.GraphModule, node: fx.Node, calls: dict[str, int]) -> bool:
    """Whether the node calls a module that is called nowhere else, under no other name, and that nobody watches."""
    if node.op != "call_module" or calls[node.target] != 1:
        return False
    module = model.get_submodule(node.target)
    watched = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )
    return not any(watched)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _calls(model: fx.GraphModule) -> dict[str, int]:
    """How often each module is called, counting the calls of the same module under its other names."""
    targets = [node.target for node in model.graph.nodes if node.op == "call_module"]
    by_module: dict[int, int] = {}
    for target in targets:
        key = id(model.get_submodule(target))
        by_module[key] = by_module.get(key, 0) + 1
    return {target: by_module[id(model.get_submodule(target))] for target in targets}


def _attach(model: fx.GraphModule, name: str, module: nn.Module) -> str:
    """Add a module under `name`, or under `name_1` and so on where that is taken. Returns the name."""
    parent, _, leaf = name.rpartition(".")
    owner, candidate, number = model.get_submodule(parent), leaf, 0
    while hasattr(owner, candidate):
        number += 1
        candidate = f"{leaf}_{number}"
    owner.add_module(candidate, module)
    return f"{parent}.{candidate}" if parent else candidate
