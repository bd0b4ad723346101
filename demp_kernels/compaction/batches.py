"""Batches of inputs that a model is watched on."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..graph.capture import evaluation_mode
from ..graph.process_wide import without_compilation

__all__ = ["Batches", "as_arguments", "as_batches", "watch"]


def _of_one_process(tensors: list[Tensor]) -> None:
    """Sums over the processes of a run, where there is one: they are as they should be."""


@dataclass
class Batches:
    """Positional arguments of forwards, and how float64 tensors are summed in place over processes that have other ones."""

    arguments: list[tuple[Any, ...]]
    add_up: Callable[[list[Tensor]], None] = _of_one_process


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """The positional arguments that a batch of inputs, a tensor or a tuple of them, stands for."""
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def as_batches(batches: Any, add_up: Callable[[list[Tensor]], None] = _of_one_process) -> Batches:
    """Batches out of an iterable of inputs (tensors, or tuples of positional arguments) or a function that returns one.

    Raises TypeError for anything else, ValueError if there is no batch.
    """
    if isinstance(batches, Batches):
        return batches
    found = batches() if callable(batches) else batches
    if not isinstance(found, Iterable) or isinstance(found, (str, Mapping, Tensor)):
        raise TypeError(f"fold_batches must be batches of inputs or a function that returns them, got {type(found).__name__}")
    arguments = [as_arguments(batch) for batch in found]
    if not arguments:
        raise ValueError("fold_batches must have at least one batch, got none")
    return Batches(arguments, add_up)


def watch(
    model: nn.Module, batches: Iterable[tuple[Any, ...]], hooks: Sequence[tuple[nn.Module, Callable[..., None]]]
) -> None:
    """Forwards in evaluation mode, of the positional arguments that each batch has; a hook, on a module, takes (module, args,
    kwargs, output)."""
    # compiled code would not call hooks that came after it
    with _watched(hooks), evaluation_mode(model), without_compilation():
        for arguments in batches if hooks else ():
            model(*arguments)


@contextmanager
def _watched(hooks: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield
