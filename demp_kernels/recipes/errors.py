"""Errors that a person causes and can mend: the command line shows them as one line, with exit code 2."""
from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["RecipeError", "need", "one_line"]


class RecipeError(ValueError):
    """A request that cannot be met. Its text is one line: what was asked, what is required, what was found."""


def one_line(error: Exception) -> str:
    """What an error says, as a part of a line."""
    return " ".join(str(error).split()) or type(error).__name__


def need(module: str, purpose: str, extra: str = "train") -> ModuleType:
    """Import an optional dependency, or say in one line what it is for and how to get it. extra: of this package, that has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn", "torch_pruning": "torch-pruning"}.get(module.split(".")[0], module.split(".")[0])
        wanted = package if package in ("timm", "torch-pruning") else f"'demp-kernels[{extra}]'"  # those belong to no extra of their own
        reason = f"{purpose} needs {package}, which cannot be imported ({error}): pip install {wanted}"
        raise RecipeError(reason) from error
