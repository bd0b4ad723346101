"""What a model may do in training only: whether there is something to look for, and the graph of it."""
from __future__ import annotations

from typing import Any

from torch import nn

from .builder import Builder
from .capture import AnalysisError, Capture, capture

__all__ = ["capture_training", "leaves_something", "looks_at_training", "unread_parameters"]


def looks_at_training(model: nn.Module) -> bool:
    """Whether the code of a module with children, not one of torch's, mentions `training`. Childless ones are analysed as in
    evaluation either way."""
    kinds = {base for m in model.modules() if next(m.children(), None) is not None for base in type(m).__mro__}
    return any(
        "training" in getattr(getattr(member, "__code__", None), "co_names", ())
        for kind in kinds if not _is_known(kind) for member in vars(kind).values()
    )


def leaves_something(model: nn.Module, built: Builder) -> bool:
    """Whether the walked graphs leave parameters, or buffers that could have an entry a unit, unread."""
    return bool(unread_parameters(model, built) or _owners_of_unread_buffers(model, built))


def unread_parameters(model: nn.Module, built: Builder) -> list[str]:
    """Names of the parameters that the walked graphs never read."""
    return [name for name, _ in model.named_parameters() if not built.is_read(name)]


def capture_training(model: nn.Module, inputs: tuple[Any, ...], built: Builder) -> list[Capture]:
    """The training forward. Empty if it wants more than the inputs, targets say, and evaluation reads every parameter: then
    evaluation is all there is to go by. Raises AnalysisError if some are left."""
    try:
        return [capture(model, inputs, leaves_only=True, awake=_owners_of_unread_buffers(model, built))]
    except AnalysisError:
        if unread_parameters(model, built):
            raise
        return []


def _owners_of_unread_buffers(model: nn.Module, built: Builder) -> set[nn.Module]:
    """Modules, not torch's or this package's, with a buffer that could have an entry a unit and that no walked graph reads."""
    return {
        module for path, module in model.named_modules() if not _is_known(type(module))
        for leaf, buffer in module.named_buffers(recurse=False)
        if buffer.dim() and not built.is_read(f"{path}.{leaf}" if path else leaf)
    }


def _is_known(kind: type) -> bool:
    return kind.__module__.startswith(("torch.", "demp_kernels."))
