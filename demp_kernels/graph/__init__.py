"""Which entry of which parameter belongs to which unit, and rewriting a model so that its units can be counted."""
from __future__ import annotations

from .capture import AnalysisError
from .plain import finalize
from .rewrite import PrepareError, prepare, remembered_inputs, swap_activations
from .units import Keep, UnitGraph

__all__ = [
    "AnalysisError", "Keep", "PrepareError", "UnitGraph", "finalize", "prepare", "remembered_inputs", "swap_activations",
]
