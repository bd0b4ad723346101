"""Stand-ins: where a bias cannot make up for constant inputs, one of them stays for all.

A convolution that pads with zeros gives of a constant input less at the borders than inside, a transposed one with a stride
something else from position to position. A bias is the same everywhere. But the layer is linear: for inputs x_d = m_d u,
with means m_d and one pattern u,

    sum_d W_d * x_d = (sum_d (m_d / m_s) W_d) * x_s

So one of them, the stand-in s, stays with the weights W_s + sum_d (m_d / m_s) W_d, and the others go. That is exact at the
borders, in training mode too, and costs nothing where a unit stays for a width's sake anyway. The largest input stands in,
so that no weight is multiplied by more than about one. In a grouped convolution every group has a stand-in of its own.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .plan import Shift

__all__ = ["StandIns", "unit_dim"]


def unit_dim(layer: nn.Module, x: Tensor) -> int:
    """The dimension of a layer's units in its input, and in its output."""
    assert isinstance(layer.weight, Tensor)
    return x.dim() - 1 if isinstance(layer, nn.Linear) else x.dim() - layer.weight.dim() + 1


def _is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.conv._ConvTransposeNd)


@dataclass
class StandIns:
    """Of one layer.

    at: (groups,) int64, the input that stands in, -1 for none. ratios: for each model, (inputs,) float64: a constant input's
    mean over that of its stand-in, 0 for others.
    """

    at: np.ndarray
    ratios: list[Tensor]

    @classmethod
    def none(cls, layer: nn.Module) -> StandIns:
        return cls(np.full(getattr(layer, "groups", 1), -1), [])

    @classmethod
    def choose(
        cls, layer: nn.Module, means: Sequence[Tensor], constant: np.ndarray, lost: np.ndarray
    ) -> StandIns | None:
        """The largest in each group of the constant inputs that are lost; None if none is other than zero.

        means: of each model, (inputs,) float64. constant, lost: (inputs,) bool.
        """
        chosen = cls.none(layer)
        groups, inputs, device = len(chosen.at), len(means[0]), means[0].device
        those = torch.from_numpy(constant).to(device)  # others than now may go once the stand-in stays
        size = torch.stack([mean.abs() for mean in means]).amin(0) * (those & torch.from_numpy(lost).to(device))
        best, at = size.view(groups, -1).max(1)
        has, at = best > 0, at + torch.arange(groups, device=device) * (inputs // groups)
        if not has.any():
            return None
        chosen.at[:] = torch.where(has, at, -1).cpu().numpy()
        own, stood_for = at.repeat_interleave(inputs // groups), has.repeat_interleave(inputs // groups) & those
        chosen.ratios = [torch.where(stood_for, mean / torch.where(stood_for, mean[own], 1.0), 0.0) for mean in means]
        return chosen

    def weight_of(self, layer: nn.Module, inputs: np.ndarray, number: int) -> tuple[np.ndarray | None, Tensor]:
        """A weight of at least single precision that makes of the input what the layer makes of some inputs (indices),
        less what the stand-ins give in their place; and which inputs it reads, None for all."""
        assert isinstance(layer.weight, Tensor)
        whole = layer.weight.detach()
        whole = whole.to(torch.promote_types(whole.dtype, torch.float32))
        dim = 0 if _is_transposed(layer) else 1
        if len(self.at) == 1:
            own = whole.index_select(dim, torch.from_numpy(inputs).to(whole.device))
            if self.at[0] < 0:
                return inputs, own
            merged = self._merged(own, dim, inputs, number)
            return np.append(inputs, self.at[0]), torch.cat([own, -merged.unsqueeze(dim)], dim)
        weight = torch.zeros_like(whole)
        for g in range(len(self.at)):
            members = self._of_group(inputs, g, layer)
            local = torch.from_numpy(members % self._per_group(layer)).to(whole.device)
            own, new = _block(whole, len(self.at), g).index_select(dim, local), _block(weight, len(self.at), g)
            new.index_copy_(dim, local, own)
            if self.at[g] >= 0:
                new.select(dim, int(self.at[g]) % self._per_group(layer)).sub_(self._merged(own, dim, members, number))
        return None, weight

    def shifts(self, layer: nn.Module, inputs: np.ndarray, outputs: np.ndarray, number: int) -> list[Shift]:
        """What the weight of the numbered model's layer takes over once it has been cut.

        inputs, outputs: (size,) bool, those that stay.
        """
        assert isinstance(layer.weight, Tensor)
        weight, dim = layer.weight.detach(), 0 if _is_transposed(layer) else 1
        lost, rows = np.nonzero(~inputs)[0], outputs.reshape(len(self.at), -1)
        shifts = []
        for g, at in enumerate(self.at):
            members = self._of_group(lost, g, layer)
            if at < 0 or not members.size or not inputs[at]:
                continue
            local = torch.from_numpy(members % self._per_group(layer)).to(weight.device)
            own = _block(weight, len(self.at), g).index_select(dim, local).double()
            merged = self._merged(own, dim, members, number)[torch.from_numpy(rows[g]).to(weight.device)]
            first = int(rows[:g].sum())
            before = inputs[at - at % self._per_group(layer) : at] if dim else inputs[:at]
            place = (slice(first, first + len(merged)),) if dim else ()
            shifts.append(Shift(layer.weight, merged, (*place, int(before.sum()))))
        return shifts

    def _merged(self, own: Tensor, dim: int, inputs: np.ndarray, number: int) -> Tensor:
        """The weights of some inputs (indices) as weights of their stand-in."""
        ratios = self.ratios[number][torch.from_numpy(inputs).to(own.device)].to(own.dtype)
        return torch.tensordot(ratios, own, ([0], [dim]))

    def _per_group(self, layer: nn.Module) -> int:
        """Inputs of a group."""
        assert isinstance(layer.weight, Tensor)
        return layer.weight.shape[0] // len(self.at) if _is_transposed(layer) else layer.weight.shape[1]

    def _of_group(self, inputs: np.ndarray, g: int, layer: nn.Module) -> np.ndarray:
        return inputs[inputs // self._per_group(layer) == g]


def _block(weight: Tensor, groups: int, g: int) -> Tensor:
    """The rows of one group, a view: for a transposed convolution those of its inputs, else of its outputs."""
    return weight.unflatten(0, (groups, -1))[g]
