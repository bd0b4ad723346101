"""Training that shrinks and speeds up the network it trains (DemP, arXiv 2403.07688).

The public names, all importable as `demp_kernels.<name>`:

    modules      DemPReLU, DemPLeakyReLU, DemPGELU, DemPSiLU, DemPBatchNormAct2d, DemPActivation, SelectiveAdd
    preparation  prepare, swap_activations, finalize, PrepareError
    compaction   compact, shrink_to, CompactionReport, CompactionError, UnitGraph
    training     DemP, Steering, DemPReport, save_checkpoint, load_checkpoint, CheckpointError,
                 save_sharded, load_sharded, compact_sharded
    kernels      functional.relu and its like, build_info, tune_allocator
"""
from __future__ import annotations

from . import functional
from .build_info import build_info, tune_allocator
from .compaction import CompactionError, CompactionReport, compact, shrink_to
from .graph import PrepareError, UnitGraph, finalize, prepare, swap_activations
from .modules import DemPActivation, DemPGELU, DemPLeakyReLU, DemPReLU, DemPSiLU, SelectiveAdd
from .norm_modules import DemPBatchNormAct2d
from .training import (
    CheckpointError,
    DemP,
    DemPReport,
    Steering,
    compact_sharded,
    load_checkpoint,
    load_sharded,
    save_checkpoint,
    save_sharded,
)
from .version import __version__

__all__ = [
    "CheckpointError", "CompactionError", "CompactionReport", "DemP", "DemPActivation", "DemPBatchNormAct2d", "DemPGELU",
    "DemPLeakyReLU", "DemPReLU", "DemPReport", "DemPSiLU", "PrepareError", "SelectiveAdd", "Steering", "UnitGraph",
    "__version__", "build_info", "compact", "compact_sharded", "finalize", "functional", "load_checkpoint",
    "load_sharded", "prepare", "save_checkpoint", "save_sharded", "shrink_to", "swap_activations", "tune_allocator",
]
