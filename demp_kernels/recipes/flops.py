"""Cost of a network: floating-point operations a sample and parameters."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops", "count_parameters"]


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
