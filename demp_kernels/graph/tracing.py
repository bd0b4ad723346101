"""Tracing a model with `torch.fx` so that it can still switch between training and evaluation.

`torch.fx` records `self.training` as the constant that it had while tracing. Here the model is traced in both modes:
where the two graphs differ in nothing but such flags, each flag becomes a call of a `TrainingFlag` module, which
answers with its own mode; where they differ otherwise the model is refused.
"""
from __future__ import annotations

import dis
import operator
from typing import Any

from torch import fx, nn

from ..modules import DemPActivation, SelectiveAdd
from ..norm_modules import DemPBatchNormAct2d
from ..strided import SubsampledConv2d
from .capture import PLACE, source_line

__all__ = ["PrepareError", "TrainingFlag", "attributes_of", "trace_both_modes"]

FLAG = "training_flag"


class PrepareError(ValueError):
    """The model cannot be prepared; the text says where and why. Nothing was changed."""


class TrainingFlag(nn.Module):
    """Answers whether the model is in training mode."""

    def forward(self) -> bool:
        return self.training


class ModeTracer(fx.Tracer):
    """`fx.Tracer` that does not look into torch.nn's and this package's modules, nor into childless ones that ask for
    their own mode (torchvision's StochasticDepth)."""

    record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (DemPActivation, DemPBatchNormAct2d, SelectiveAdd, SubsampledConv2d, TrainingFlag)):
            return True
        asks_for_mode = not any(True for _ in m.children()) and _reads_attribute(type(m).forward, "training")
        return asks_for_mode or super().is_leaf_module(m, module_qualified_name)


def attributes_of(model: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """What the graph refers to, by name, as `fx.GraphModule` takes it; the mode flag is made here."""
    names = {node.target for node in graph.nodes if node.op in ("call_module", "get_attr")}
    return {name: TrainingFlag() if name == FLAG else operator.attrgetter(name)(model) for name in sorted(names)}


def trace_both_modes(model: nn.Module) -> fx.Graph:
    """The model's graph, with mode flags for constants that are True in training and False in evaluation.

    Raises PrepareError if the model cannot be traced or if its two graphs differ in anything else. Module modes are
    restored.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        graphs = []
        for training in (True, False):
            model.train(training)
            graphs.append(ModeTracer().trace(model))
    except Exception as error:
        raise PrepareError(
            f"prepare: torch.fx cannot trace {type(model).__name__}: {error}. swap_activations() works on any model"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    train_graph, eval_graph = graphs
    train_nodes, eval_nodes = list(train_graph.nodes), list(eval_graph.nodes)
    for train_node, eval_node in zip(train_nodes, eval_nodes):
        _merge(train_graph, train_node, eval_node, type(model).__name__)
    for node in train_nodes:
        place = source_line(node)
        node.meta.pop("stack_trace", None)  # pages of text a node
        if place is not None:
            node.meta[PLACE] = place
    if len(train_nodes) != len(eval_nodes):
        raise _other_path(type(model).__name__, train_nodes[min(len(train_nodes), len(eval_nodes)) - 1])
    return train_graph


def _merge(graph: fx.Graph, train_node: fx.Node, eval_node: fx.Node, model_name: str) -> None:
    same = train_node.op == eval_node.op and train_node.name == eval_node.name and (
        train_node.target == eval_node.target
        # wrapped closures are new objects in each trace
        or getattr(train_node.target, "__qualname__", 0) == getattr(eval_node.target, "__qualname__", 1)
    )
    if not same or len(train_node.args) != len(eval_node.args) or train_node.kwargs.keys() != eval_node.kwargs.keys():
        raise _other_path(model_name, train_node)

    def flag(train_value: Any, eval_value: Any) -> Any:
        if isinstance(train_value, bool) and train_value is not eval_value:
            if train_value is True and eval_value is False:
                with graph.inserting_before(train_node):
                    return graph.call_module(FLAG)
            raise _other_path(model_name, train_node)
        if str(train_value) != str(eval_value):
            raise _other_path(model_name, train_node)
        return train_value

    train_node.args = tuple(flag(a, b) for a, b in zip(train_node.args, eval_node.args))
    train_node.kwargs = {key: flag(value, eval_node.kwargs[key]) for key, value in train_node.kwargs.items()}


def _other_path(model_name: str, node: fx.Node) -> PrepareError:
    return PrepareError(
        f"prepare: {model_name} takes another path in training than in evaluation (at {node.format_node()}); "
        "use swap_activations(), or switch the difference off (for example aux_logits=False)"
    )


def _reads_attribute(function: Any, name: str) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and any(
        i.opname.startswith("LOAD_ATTR") and i.argval == name for i in dis.get_instructions(code)
    )
