"""A model with other widths for a moment: its tensors exchanged for ones without data, then put back."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from ..reference import memory_format

__all__ = ["Widths", "fake_inputs", "with_widths"]


@dataclass
class Widths:
    """Shapes, attributes and selections that a model is to have.

    shapes: id of a parameter or buffer -> its shape. attributes: (module, name, value). selections: SelectiveAdd ->
    channels of its output and of its skip (None: plain addition), and the device they are on.
    """

    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    attributes: list[tuple[nn.Module, str, int]] = field(default_factory=list)
    selections: list[tuple[nn.Module, tuple[int, int] | None, torch.device]] = field(default_factory=list)


@contextmanager
def with_widths(model: nn.Module, widths: Widths, mode: FakeTensorMode) -> Iterator[None]:
    """The model with fake tensors of these widths. The very objects that it had come back at the end."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    fakes: dict[int, Tensor] = {}

    def exchange(members: dict[str, Any], key: str, value: Any) -> None:
        saved.append((members, key, members[key]))
        members[key] = value

    try:
        with mode:
            for module in model.modules():
                for members in (module._parameters, module._buffers):
                    for key, tensor in list(members.items()):
                        if tensor is None:
                            continue
                        if id(tensor) not in fakes:
                            fakes[id(tensor)] = _without_data(tensor, widths.shapes.get(id(tensor), tensor.shape))
                        exchange(members, key, fakes[id(tensor)])
            for module, selection, device in widths.selections:
                index = inverse = None
                if selection is not None:
                    index, inverse = (torch.empty(n, dtype=torch.int64, device=device) for n in selection)
                exchange(vars(module), "index", index)
                exchange(vars(module), "inverse", inverse)
        for module, attribute, value in widths.attributes:
            exchange(module.__dict__, attribute, value)
        yield
    finally:
        for members, key, value in reversed(saved):
            members[key] = value


def fake_inputs(model: nn.Module, inputs: tuple[Any, ...], mode: FakeTensorMode) -> tuple[Any, ...]:
    """Inputs without data on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with mode:
        return tree_map(
            lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            if isinstance(x, Tensor) else x,
            inputs,
        )


def _without_data(like: Tensor, shape: Any) -> Tensor:
    """A tensor in `like`'s layout; a parameter for a parameter. Called inside a FakeTensorMode."""
    if tuple(shape) == tuple(like.shape):
        fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    else:
        fake = torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=memory_format(like))
    return nn.Parameter(fake, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else fake
