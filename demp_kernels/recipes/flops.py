"""Cost of a network: floating-point operations a sample and parameters."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops", "count_parameters", "in_units"]


def count_flops(model: nn.Module, sample: Tensor) -> int:
    """Operations (a multiply-add is two) of one forward pass in evaluation mode.

    sample: (1, ...), what the model takes. Convolutions, matrix products and attention count, as in
    torch.utils.flop_counter; normalisation and activations do not. The train flags are left as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(sample)
    finally:
        for module, training in modes:
            module.training = training
    return counter.get_total_flops()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def in_units(number: float) -> str:
    """Three digits with a unit prefix: 69.4 M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
