"""Which implementations of the ops are there. Decided once, at import: no Python choice is made per call.

The schemas and the reference (for every device) are registered by the op modules. Loading a compiled extension adds
kernels for its device, which win over the reference by dispatch key.

`DEMP_BACKEND` chooses: `auto` (default: the fastest there is), `native` (the compiled extension, or an error),
`triton` (Triton kernels on GPUs even where the extension has its own, or an error), or `reference` (plain PyTorch only).
Without the CUDA extension `auto` uses Triton on GPUs, if there is one and Triton is installed.
"""
from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from .. import build_record

CHOICES = ("auto", "native", "triton", "reference")

chosen: str = "auto"
"""The value of DEMP_BACKEND that was followed."""
loaded: list[str] = []
"""What is in use: "_C" (compiled CPU kernels), "_C_cuda" (compiled CUDA kernels), "triton" (GPU kernels without them)."""
reasons: dict[str, str] = {}
"""Why a library that is not in `loaded` is not in use."""


def load(package: Path = Path(__file__).resolve().parent.parent) -> None:
    """Load the compiled kernels next to the package. Raises ValueError for an unknown DEMP_BACKEND, RuntimeError for one
    that is asked for and cannot be had (with `native`, on a machine with a GPU, CUDA kernels too); warns if there are no compiled
    kernels, or none for the GPU."""
    global chosen
    chosen = os.environ.get("DEMP_BACKEND", "auto").strip().lower() or "auto"
    if chosen not in CHOICES:
        raise ValueError(f"DEMP_BACKEND: must be one of {', '.join(CHOICES)}, got {chosen}")
    if chosen == "reference":
        reasons.update(dict.fromkeys(("_C", "_C_cuda", "triton"), "DEMP_BACKEND=reference"))
        return
    _load_library(package, "_C")
    if chosen == "triton":
        reasons["_C_cuda"] = "DEMP_BACKEND=triton"
    elif torch.version.cuda is None:
        reasons["_C_cuda"] = "this torch is built without CUDA"
    else:
        _load_library(package, "_C_cuda")
    _register_triton()
    missing = [] if "_C" in loaded else [("compiled kernels", reasons["_C"])]
    if "_C_cuda" not in loaded and "triton" not in loaded and _has_cuda_device():
        missing.append(("kernels for the GPU", f"CUDA: {reasons['_C_cuda']}; Triton: {reasons['triton']}"))
    for what, why in missing:
        if chosen == "native":
            raise RuntimeError(f"DEMP_BACKEND=native: no {what}: {why}")
        warnings.warn(f"demp_kernels: no {what}, using the slower PyTorch reference: {why}", RuntimeWarning, stacklevel=2)


def _has_cuda_device() -> bool:
    """Asked of NVML, where it is there: a CUDA driver that is awake at import could not be used behind a fork."""
    return torch.cuda.device_count() > 0


def _register_triton() -> None:
    """Make Triton the kernels of GPUs where the extension has none for them. Importing Triton takes half a second, so it is
    done only where there is a GPU or DEMP_BACKEND asks for it."""
    if "_C_cuda" in loaded:
        reasons["triton"] = "the compiled CUDA kernels are used"
        return
    if chosen == "native":
        reasons["triton"] = "DEMP_BACKEND=native"
        return
    if chosen != "triton" and not (_has_cuda_device() or torch.xpu.is_available()):
        reasons["triton"] = "no GPU"
        return
    try:
        from . import triton
    except ImportError as error:
        if chosen == "triton":
            raise RuntimeError(f"DEMP_BACKEND=triton: Triton cannot be imported: {error}") from error
        reasons["triton"] = f"Triton cannot be imported: {error}"
        return
    triton.register()
    loaded.append("triton")


def _load_library(package: Path, name: str) -> None:
    files = sorted(package.glob(f"{name}.*so"))
    if not files:
        reasons[name] = build_record.missing_reason(name, package)
        return
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:  # built against another torch, or a library it needs is missing
        reasons[name] = f"{files[0].name} cannot be loaded: {error}"
        return
    loaded.append(name)
