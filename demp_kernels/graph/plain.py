"""The way back: `finalize` gives plain PyTorch modules for what `prepare` and `swap_activations` put in."""
from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..arguments import require_module
from ..modules import DemPActivation, DemPGELU, DemPLeakyReLU, DemPReLU, DemPSiLU, SelectiveAdd
from ..norm_modules import DemPBatchNormAct2d
from ..strided import SubsampledConv2d
from .capture import materialise
from .fusion import unfuse_norms
from .rewrite import EXAMPLE_INPUTS, free_name, node_shape, overwritable, propagate_shapes, remembered_inputs
from .tracing import FLAG, TrainingFlag

__all__ = ["finalize"]


def finalize(model: nn.Module) -> nn.Module:
    """A copy of `model` made of plain PyTorch modules: for torch.save, torch.export, ONNX, deployment.

    Counting activations become nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU; additions become plain additions, or an
    index_select of the skip's channels and an addition where the skip carries other channels; a `SubsampledConv2d` becomes
    an fx.GraphModule of a pooling and a convolution, which can go on training as well. Same `state_dict` keys, but for an
    addition that selects: it has an index buffer (`<name>_index`) instead of `<name>.channels`, without which `shrink_to` cannot
    tell the channels. The copy shares nothing with `model`.

    A function that is told the mode (`F.batch_norm(..., training=self.training)`; dropouts become modules) goes on asking a
    `TrainingFlag` of this package, as a pickled GraphModule is traced anew where it is loaded and would keep a bare
    `self.training` as the constant of that moment. Save such a network by its state_dict or by torch.export.
    """
    require_module("finalize: model", model)
    plain = copy.deepcopy(model)
    if isinstance(plain, fx.GraphModule):
        _restore_shapes(model, plain)
        plain.meta.pop(EXAMPLE_INPUTS, None)
        plain.__dict__.pop(EXAMPLE_INPUTS, None)
        unfuse_norms(plain)
        _inline_dropouts(plain)
        for node in list(plain.graph.nodes):
            if node.op == "call_module" and isinstance(plain.get_submodule(node.target), SelectiveAdd):
                _inline_addition(plain, node)
        _delete_uncalled(plain)
    for name, module in list(plain.named_modules(remove_duplicate=False)):
        if isinstance(module, DemPBatchNormAct2d):
            raise TypeError(f"finalize: {name} is a DemPBatchNormAct2d outside a prepared model, or called more than once")
        if isinstance(module, (DemPActivation, SubsampledConv2d)):
            twin = fx.symbolic_trace(module) if isinstance(module, SubsampledConv2d) else plain_twin(module)
            if not name:
                return twin
            plain.set_submodule(name, twin)
        elif isinstance(module, SelectiveAdd):
            raise TypeError(f"finalize: {name} is a SelectiveAdd outside a prepared model; it has no plain counterpart")
    if isinstance(plain, fx.GraphModule):
        for node in plain.graph.nodes:
            node.type = None  # TorchScript does not know the annotations by the names that torch.fx gives them
        plain._tracer_cls = plain.graph._tracer_cls = None  # would be pickled, as a class of this package
        plain.graph.lint()
        plain.recompile()
    return plain


def plain_twin(module: DemPActivation) -> nn.Module:
    """The plain PyTorch activation that computes what `module` does without counting and noise."""
    if isinstance(module, DemPReLU):
        plain: nn.Module = nn.ReLU(module.inplace)
    elif isinstance(module, DemPLeakyReLU):
        plain = nn.LeakyReLU(module.negative_slope, module.inplace)
    elif isinstance(module, DemPGELU):
        plain = nn.GELU(module.approximate)
    elif isinstance(module, DemPSiLU):
        plain = nn.SiLU()
    else:
        raise TypeError(f"finalize: no plain counterpart is known for {type(module).__name__}")
    return plain.train(module.training)


def _inline_addition(model: fx.GraphModule, node: fx.Node) -> None:
    """Replace a SelectiveAdd by plain operations."""
    module: SelectiveAdd = model.get_submodule(node.target)  # type: ignore[assignment]
    a, b = node.args
    with model.graph.inserting_before(node):
        if module.index is not None:
            # A lost channel reads the zero channel that is appended to the skip.
            index = torch.where(module.index < 0, module.inverse.numel(), module.index)
            name = f"{node.target}_index"
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, index)
            last = -module.channel_dim if module.channel_dim < 0 else len(node_shape(node) or ()) - module.channel_dim
            padding = [0, 0] * (last - 1) + [0, 1]
            padded = model.graph.call_function(F.pad, (b, padding))
            b = model.graph.call_function(torch.index_select, (padded, module.channel_dim, model.graph.get_attr(name)))
        # the model's own code wrote into whatever it was; here a's dtype is kept where that is surely right
        into_a = module.keep_dtype and overwritable(model, a)
        total = model.graph.call_method("add_", (a, b)) if into_a else model.graph.call_function(operator.add, (a, b))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total)
    model.graph.erase_node(node)


def _delete_uncalled(model: fx.GraphModule) -> None:
    """Delete what was inlined. Other modules without a call are the model's own, and their tensors its state."""
    called = [node.target for node in model.graph.nodes if node.op == "call_module"]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, (SelectiveAdd, TrainingFlag)):
            if not any(name == target or name.startswith(f"{target}.") for target in called):
                model.delete_submodule(name)


_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout, F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


def _inline_dropouts(model: fx.GraphModule) -> None:
    """Replace functional dropouts that ask a `TrainingFlag` by modules that have a mode of their own."""
    flags = {node for node in model.graph.nodes if node.op == "call_module" and node.target == FLAG}
    for node in list(model.graph.nodes):
        if node.op != "call_function" or node.target not in _DROPOUTS or not flags & set(node.all_input_nodes):
            continue
        given = {**dict(zip(("input", "p", "training", "inplace"), node.args)), **node.kwargs}
        if given.get("training") not in flags:
            continue
        module = _DROPOUTS[node.target](given.get("p", 0.5), bool(given.get("inplace", False)))
        name = free_name(model, "dropout")
        model.add_submodule(name, module.train(model.get_submodule(FLAG).training))
        with model.graph.inserting_before(node):
            call = model.graph.call_module(name, (given["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        model.graph.erase_node(node)
    for flag in flags:
        if not flag.users:
            model.graph.erase_node(flag)


def _restore_shapes(model: nn.Module, plain: fx.GraphModule) -> None:
    """Shapes of the nodes, which a pickled GraphModule loses and a selection's padding needs."""
    inputs = remembered_inputs(model)
    if inputs is not None and any(node.op == "call_module" and node_shape(node) is None for node in plain.graph.nodes):
        propagate_shapes(plain, materialise(plain, inputs))
