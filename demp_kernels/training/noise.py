"""Noise on the weights of units that are alive."""
from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ..functional import weight_noise_

__all__ = ["noise_on_live"]

DEVICE_APART = 2**40
"""Between the seeds of one step's devices: a seed serves one step, and no run has so many."""


def noise_on_live(
    model: nn.Module, live: Mapping[str, Tensor], gates: Mapping[str, str], std: float, seed: Tensor, trained: Collection[int]
) -> None:
    """Add N(0, std^2) to every parameter that is trained, but for rows of units that are not alive.

    live: activation -> (units,) bool. gates: parameter -> activation whose unit r is made by its row r. seed: (1,) int64.
    trained: ids of the optimisers' parameters.
    """
    targets = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) in trained]
    for number, device in enumerate(dict.fromkeys(p.device for _, p in targets)):
        here = [(p, live.get(gates.get(name, ""))) for name, p in targets if p.device == device]
        masks = [None if mask is None else mask.to(device) for _, mask in here]
        own = seed.to(device)
        weight_noise_([p for p, _ in here], std, masks, own + number * DEVICE_APART if number else own)
