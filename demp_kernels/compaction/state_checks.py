"""Whether what a checkpoint holds fits a model and its optimisers: asked before anything is changed."""
from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["check_model_state", "check_optimizer_states", "check_tensors", "entry"]

Shape = Callable[[Tensor], tuple[int, ...]]
"""The shape that a parameter or buffer of the model will have when the state is loaded."""


def entry(content: Any, name: str, kind: type | tuple[type, ...], where: str = "it") -> Any:
    """content[name]. Raises ValueError if there is none, or it is not of `kind`."""
    value = content.get(name) if isinstance(content, Mapping) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise ValueError(f"{where} must have {name!r}, of type {wanted}, got {type(value).__name__}")
    return value


def check_tensors(name: str, value: Any) -> None:
    """Raises ValueError unless every tensor in dictionaries and sequences of them is a dense one that has values."""
    if isinstance(value, Tensor):
        _check_tensor(name, value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_tensors(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            check_tensors(f"{name}.{number}", item)


def check_model_state(
    model: nn.Module, state: Any, shape: Shape, selections: Mapping[str, tuple[int, ...]] = MappingProxyType({})
) -> None:
    """Raises ValueError unless `state` has a tensor of the right shape for every key of the model, and no other key.

    selections: keys that the model will have besides, and their shapes.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"the model's state must be a mapping of tensors, got {type(state).__name__}")
    own = model.state_dict(keep_vars=True)
    wanted = own.keys() | selections.keys()
    if wanted != state.keys():
        odd = sorted(map(str, wanted ^ state.keys()))
        raise ValueError(f"the model's state must have the model's keys: {odd[0]} is in only one of them")
    for name, size in selections.items():
        _check_tensor(name, state[name])
        if tuple(state[name].shape) != size or state[name].dtype != torch.uint8:
            raise ValueError(f"{name} must be a uint8 tensor of shape {size}, got {state[name].dtype} of shape "
                             f"{tuple(state[name].shape)}")
    for name, tensor in own.items():
        if not isinstance(tensor, Tensor):
            continue
        _check_tensor(name, state[name])
        if tuple(state[name].shape) != shape(tensor):
            raise ValueError(f"{name} must have shape {shape(tensor)}, got {tuple(state[name].shape)}")
        if _kind(state[name].dtype) != _kind(tensor.dtype):
            raise ValueError(f"{name} must be of a type like {tensor.dtype}, got {state[name].dtype}")


def check_optimizer_states(optimizers: Sequence[Optimizer], states: Any, shape: Shape) -> None:
    """Raises ValueError unless each optimiser can load its state. No states at all are right, too: nothing is loaded."""
    if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
        raise ValueError("the optimisers' states must be a list of dictionaries")
    if states and optimizers and len(states) != len(optimizers):
        raise ValueError(f"there must be a state for each optimiser, got {len(states)} for {len(optimizers)}")
    for optimizer, state in zip(optimizers, states):
        _check_groups(optimizer, entry(state, "param_groups", list, "an optimiser's state"))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kept = entry(state, "state", dict, "an optimiser's state")
        for number, values in kept.items():
            if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(values, dict):
                raise ValueError(f"an optimiser's state must be of one of its {len(parameters)} parameters, got {number!r}")
            for key, value in values.items():
                _check_moment(optimizer, f"{key} of parameter {number}", value, parameters[number], shape(parameters[number]))
            if values and type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
                _check_adam(number, values, shape(parameters[number]))
        _check_loading(optimizer, state, parameters, shape)


def _check_adam(number: int, values: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Adam takes any state while it loads, and fails in the next step, or counts wrong."""
    step = values.get("step")
    counts = isinstance(step, Tensor) and step.dim() == 0 and step.is_floating_point()
    if not counts and not (isinstance(step, (int, float)) and 0 <= step < 2**53):
        raise ValueError(f"Adam's state of parameter {number} must have a number of steps 'step', got {_described(step)}")
    for key in ("exp_avg", "exp_avg_sq", *({"max_exp_avg_sq"} & values.keys())):
        moment = values.get(key)
        if not isinstance(moment, Tensor):
            raise ValueError(f"Adam's state of parameter {number} must have a tensor {key!r}, got {type(moment).__name__}")
        if tuple(moment.shape) != shape or not moment.is_floating_point():
            raise ValueError(f"Adam's state of parameter {number} must have {key!r} of shape {shape}, got {_described(moment)}")


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_loading(optimizer: Optimizer, state: dict[str, Any], parameters: Sequence[Tensor], shape: Shape) -> None:
    """Let a copy of the optimiser, over parameters of the shapes to come and without memory, load the state."""
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        return
    trial = copy.copy(optimizer)
    stand_ins = {id(p): torch.empty(shape(p), dtype=p.dtype, device="meta", requires_grad=p.requires_grad) for p in parameters}
    trial.param_groups = [{**group, "params": [stand_ins[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    trial.state = defaultdict(dict)
    try:
        trial.load_state_dict(state)
    except Exception as error:  # each optimiser fails in its own way
        text = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{type(optimizer).__name__} must be able to load its state: {type(error).__name__}: {text}") from error


def _check_groups(optimizer: Optimizer, saved: list[Any]) -> None:
    groups = optimizer.param_groups
    if len(saved) != len(groups):
        raise ValueError(f"{type(optimizer).__name__} must have {len(groups)} parameter groups, got {len(saved)}")
    first = 0
    for own, group in zip(groups, saved):
        if not isinstance(group, dict):
            raise ValueError(f"a parameter group must be a dictionary, got {type(group).__name__}")
        numbers = list(range(first, first + len(own["params"])))
        if group.get("params") != numbers:
            raise ValueError(f"a parameter group must have {len(numbers)} parameters in their order, got other ones")
        first += len(numbers)
        for key, value in own.items():
            if key != "params" and (key not in group or not _alike(value, group[key])):
                got = type(group[key]).__name__ if key in group else "none"
                raise ValueError(f"a parameter group must have {key!r} like {value!r}, got {got}")


def _check_moment(optimizer: Optimizer, name: str, value: Any, parameter: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        return
    _check_tensor(name, value)
    if value.is_complex() and not parameter.is_complex():
        raise ValueError(f"{name} must be real as the parameter is, got {value.dtype}")
    if any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride())):
        raise ValueError(f"{name} must have an element of its own in each place, got strides {value.stride()}")
    # L-BFGS keeps its history, over all parameters, with the first of them
    flat = isinstance(optimizer, torch.optim.LBFGS) or value.numel() == 1 or value.dim() != len(shape)
    if not flat and any(size not in (1, wanted) for size, wanted in zip(value.shape, shape)):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_nested or value.is_quantized or value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError(f"{name} must be a dense tensor with values, got {value.layout} on {value.device}")


def _kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else str(dtype)


def _alike(own: Any, saved: Any) -> bool:
    """Whether a hyper-parameter can take the place of another: None and flags for each other, numbers and one-element
    tensors, sequences of numbers."""
    if own is None or isinstance(own, bool):
        return saved is None or isinstance(saved, bool)
    if isinstance(own, (Real, Tensor)):
        whole = isinstance(saved, int) and not isinstance(saved, bool) and abs(saved) < 2**63
        return whole or isinstance(saved, float) or (
            isinstance(saved, Tensor) and saved.numel() == 1 and not saved.is_complex()
        )
    if isinstance(own, (tuple, list)):
        return isinstance(saved, (tuple, list)) and len(saved) == len(own) and all(map(_alike, own, saved))
    return type(saved) is type(own)
