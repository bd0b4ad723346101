"""What public functions ask of the kind of an argument. Every error says the argument, what is required and what it got."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["at_least", "one_of", "require_integer", "require_module", "require_not_negative", "require_number", "require_tensor"]


def require_module(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a module (a class of modules is none)."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {_kind(value)}")


def require_tensor(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a tensor, ValueError unless it is a dense one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_kind(value)}")
    if value.is_nested or value.layout != torch.strided:
        layout = "a nested tensor" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name} must be a dense tensor, got {layout}")


def require_number(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is an int or a float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")


def require_not_negative(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is an int or a float, ValueError unless it is >= 0; infinity is."""
    require_number(name, value)
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0, got {value}")


def require_integer(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is an int, ValueError if it does not fit 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")


def at_least(name: str, value: Any, least: float, kind: type = float) -> Any:
    """`value`. Raises TypeError unless it is a number (kind int: an integer), ValueError unless it is >= least and finite."""
    number = isinstance(value, int) if kind is int else isinstance(value, (int, float))
    if not number or isinstance(value, bool):
        wanted = "an integer" if kind is int else "a number"
        raise TypeError(f"{name} must be {wanted} >= {least}, got {value!r}")
    if not least <= value < float("inf"):
        raise ValueError(f"{name} must be >= {least} and finite, got {value}")
    return value


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """`value`. Raises ValueError unless it is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
