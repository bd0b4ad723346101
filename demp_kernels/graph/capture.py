"""The ATen graph of a model, captured by `torch.export` without touching the model."""
from __future__ import annotations

import logging
import os
import random
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from .process_wide import without_fast_attention

__all__ = [
    "PLACE", "AnalysisError", "Capture", "as_tuple", "capture", "evaluation_mode", "materialise", "module_path", "origin",
    "quiet_fake_tensors", "same_attributes", "source_line",
]


TRACING = threading.RLock()
"""Held while torch.fx or torch.export trace: both exchange functions of the whole process meanwhile."""


class AnalysisError(ValueError):
    """The model cannot be analysed; the text says why. Nothing was changed."""


@dataclass
class Capture:
    """One captured forward.

    nodes: its graph's. tensors: placeholder name -> name of the parameter or buffer in the model. leaves_only, awake: as it
        was captured.
    """

    nodes: list[fx.Node]
    tensors: dict[str, str]
    leaves_only: bool = False
    awake: Collection[nn.Module] = ()


def as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    """The positional arguments of a forward, from a tensor or a sequence. Raises TypeError for anything else."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str) and len(example_inputs):
        return tuple(example_inputs)
    raise TypeError(f"example_inputs must be a tensor or a non-empty tuple, got {type(example_inputs).__name__}")


def materialise(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Example inputs on the model's device. Only their shapes, strides and dtypes matter: meta tensors get memory that
    is never read."""
    device = next((t.device for t in model.parameters()), torch.device("cpu"))

    def one(x: Any) -> Any:
        if isinstance(x, Tensor) and x.device.type == "meta":
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return x

    return tree_map(one, inputs)


@contextmanager
def evaluation_mode(
    model: nn.Module, *, leaves_only: bool = False, awake: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Every module in evaluation mode (or only the childless ones and the norms, but for those `awake`, and the others in
    training), without calling `train()` or `eval()`, which models override; all flags come back exactly. Attention takes no
    shortcut for inference."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            leaf = next(module.children(), None) is None or isinstance(module, nn.modules.batchnorm._NormBase)
            module.training = leaves_only and (not leaf or module in awake)
        with without_fast_attention():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def same_attributes(model: nn.Module) -> Iterator[None]:
    """All attributes of all modules come back, the same objects with what lists and dicts held. A forward on fake tensors may
    leave some behind (a mask that is made at the first call), and torch.export puts copies where lists and dicts were."""
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    containers: dict[int, tuple[Any, Any]] = {}
    pending: list[Any] = [before for _, before in attributes]
    while pending:
        for value in _members(pending.pop()):
            if isinstance(value, (list, dict)) and id(value) not in containers:
                containers[id(value)] = value, list(value) if isinstance(value, list) else dict(value)
                pending.append(value)
    try:
        yield
    finally:
        for container, before in [*attributes, *containers.values()]:
            if not _same_members(container, before):  # if they are, another thread that reads it is left alone
                container.clear()
                container.extend(before) if isinstance(container, list) else container.update(before)


def _members(container: Any) -> Collection[Any]:
    return container.values() if isinstance(container, dict) else container


def _same_members(one: Any, other: Any) -> bool:
    same_keys = not isinstance(one, dict) or list(one) == list(other)
    return same_keys and len(one) == len(other) and all(a is b for a, b in zip(_members(one), _members(other)))


@contextmanager
def _annotations_of_this_thread() -> Iterator[None]:
    """Other threads go through the functions that dynamo skips (parts of an optimiser's step) as if nothing was exported.
    To torch 2.14 everything is, while one thread exports, and those functions then make notes in one dict of the process:
    two threads at once, and one of them ended in KeyError: 'custom'."""
    thread, annotate = threading.get_ident(), fx.traceback.annotate

    def annotate_here(annotations: dict[str, Any]) -> AbstractContextManager[None]:
        return annotate(annotations) if threading.get_ident() == thread else nullcontext()

    annotate_here.__wrapped__ = annotate.__wrapped__  # type: ignore[attr-defined]  # dynamo asks for it wherever it traces
    fx.traceback.annotate = annotate_here
    try:
        yield
    finally:
        fx.traceback.annotate = annotate


def capture(
    model: nn.Module, inputs: tuple[Any, ...], *, leaves_only: bool = False, awake: Collection[nn.Module] = ()
) -> Capture:
    """Capture the forward of `model` on tensors like `inputs`, in evaluation mode, on fake tensors.

    Args:
        leaves_only: put only the childless modules in evaluation mode. Auxiliary heads, which models run in training
            only, are then part of the graph, while BatchNorm and the activations behave as in evaluation. awake: childless
            ones that are to be as in training all the same.

    Raises AnalysisError if torch.export cannot capture the model.
    """
    # a forward may draw numbers: from equal states, so that two captures of it are alike
    rng, python_rng, numpy_rng = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        with (
            TRACING, _annotations_of_this_thread(), same_attributes(model),
            evaluation_mode(model, leaves_only=leaves_only, awake=awake),
        ):
            # non-strict: runs the model's own Python, which captures what dynamo would refuse
            program = torch.export.export(model, inputs, strict=False)
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise AnalysisError(f"torch.export cannot capture {type(model).__name__}: {text[0]}") from error
    finally:
        torch.set_rng_state(rng)
        random.setstate(python_rng)
        np.random.set_state(numpy_rng)
    if isinstance(model, fx.GraphModule):
        _remember_places(model, program.graph)
    signature = program.graph_signature
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return Capture(list(program.graph.nodes), tensors, leaves_only, awake)


def _remember_places(model: fx.GraphModule, graph: fx.Graph) -> None:
    """Give nodes captured from a prepared model the places that `prepare` remembered of the calls of its modules: the code
    that runs now was generated."""
    places = {node.target: node.meta[PLACE] for node in model.graph.nodes if node.op == "call_module" and PLACE in node.meta}
    for node in graph.nodes:
        path = module_path(node)
        while path and path not in places:
            path = path.rpartition(".")[0]
        if path:
            node.meta[PLACE] = places[path]


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Without the log of failures on fake tensors, which are raised anyway."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


PLACE = "demp_place"
"""Key in a node's meta: file and line of the model's source that made it, where the stack trace does not tell."""
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = str(Path(__file__).parents[1]) + os.sep


def source_line(node: fx.Node) -> tuple[str, int] | None:
    """File and line of the model's code that made a node: the innermost outside torch."""
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if not f[0].startswith(_TORCH)]
    return (frames[-1][0], int(frames[-1][1])) if frames else None


def origin(node: fx.Node) -> str:
    """Where a node comes from, for messages: op, module path and source line."""
    text = f"{getattr(node.target, '__name__', node.target)} in {module_path(node) or 'the model'}"
    line = node.meta.get(PLACE) or source_line(node)
    generated = line is None or line[0].startswith(("<", _OURS))
    return text if generated else f"{text} ({Path(line[0]).name}:{line[1]})"


def module_path(node: fx.Node) -> str:
    """Path of the module whose forward made a node."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""
