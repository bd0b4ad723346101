"""The ops in Triton: for GPUs without the compiled extension (no nvcc where it was built, AMD, Intel).

Importing this package imports Triton; `ops.backend` does so only where the kernels are to be used, and calls `register`.

Numbers (slope, eps, noise_std) reach a kernel as float32, which is all that Triton's arguments have: float64 tensors get results
that are as exact as these, 1e-7.
"""
from __future__ import annotations

import torch

from .activation import activation_backward, activation_forward, activation_forward_
from .channel_select import channel_select
from .compact import compact
from .norm_act import norm_act_backward, norm_act_forward
from .weight_noise import weight_noise_

KERNELS = {
    "activation_forward": activation_forward,
    "activation_forward_": activation_forward_,
    "activation_backward": activation_backward,
    "weight_noise_": weight_noise_,
    "compact": compact,
    "channel_select": channel_select,
    "norm_act_forward": norm_act_forward,
    "norm_act_backward": norm_act_backward,
}

_libraries: list[torch.library.Library] = []


def register(keys: tuple[str, ...] = ("CUDA", "XPU")) -> None:
    """Make these the kernels of the ops for the dispatch keys (AMD GPUs are CUDA to PyTorch)."""
    library = torch.library.Library("demp_kernels", "FRAGMENT")
    for name, kernel in KERNELS.items():
        for key in keys:
            library.impl(name, kernel, key)
    _libraries.append(library)  # implementations live as long as their library
