"""Closed loop: what is left of the network follows a curve down to a budget.

The open-loop schedule sets how strong the penalty is and takes what dies. Here the budget is set, FLOPs or parameters by a
certain step, and at every moment as many units are pushed towards death as the budget asks for. A penalty in the loss cannot
do that under Adam, which divides it by its own size: a scale falls by about the learning rate a step, whatever the penalty.
So the push is a step of its own behind the optimiser's, as AdamW's weight decay is. For a pushed unit, with rate r,

    gamma <- sign(gamma) max(|gamma| - r, 0)    scale of its normalisation (the proximal step of r |gamma|)
    w     <- sign(w) max(|w| - r, 0)            row of weights, where no normalisation follows
    beta  <- beta - r                           offsets; past the end of the way by 5 r, where the strength is zero

until the unit is silent for whatever it is given. The units with the lowest scores are pushed, all layers compared together:

    score = s              for a budget of operations
    score = s N / (k c)    for one of parameters

s: strength, |gamma|, or the L1 norm of the row over its layer's mean. N: units of the layer at the analysis. k: the unit's
place in its layer, 1 for the strongest, so that halving a layer counts as much however few of its units are left. c: what
the cost falls by when one unit of the layer goes. Of layers equally strong each keeps a share k / N in proportion to 1 / c.

Parameters lie in the late, wide layers, and these can spare them: by s alone, layers end as bottlenecks of two units, 88.2%
instead of 89.5% (ResNet-18 of width 16, Fashion-MNIST, 90% of the parameters gone). Operations lie evenly in all stages, but
a unit of an early, narrow layer has most of them: divided by c, an early layer keeps an eighth, 88.4% instead of 90.0%
(width 32, 0.12 of the operations by 0.05 of the run). Both on training images held out, means of two or three seeds.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compaction.optimizer import parameters_of
from ..compaction.state_checks import entry
from ..graph import UnitGraph
from .budget import flops_cost, lowest_units, parameter_cost, unit_savings
from .penalty import NORMALISATIONS

__all__ = ["Steerer", "Steering"]

CONTROLS = 30
"""How often, at most, the units to push are chosen anew on the way to the budget."""
HASTE = 5
"""How many times faster an offset falls whose unit should be gone and has no strength left. Behind a residual addition it has
to outweigh what the skip brings: at 1, the last units of ResNet-18 of width 16 were still there at the end, 630 steps late,
their offsets at -15 (90% of the parameters to go, rate 0.02); at 5 the budget was met."""
MEMORY = 0.95
"""Of the running mean of the loss, a step: about twenty steps."""


@dataclass(frozen=True)
class Steering:
    """A budget, and the way there: `DemP(..., peak_penalty=0, steering=Steering(target_flops=0.2))`, then `demp.step(loss)`.

    target_flops: share of the operations (of convolutions and linear layers) that is LEFT in the end; or
    target_sparsity: share of the parameters that is GONE. One of the two, above 0 and below 1.
    start, until: shares of the run between which the budget falls from all to the target, as 1 - (1 - x)^3: fast at first.
    rate: what a pushed scale, weight or offset moves in a step; above Adam's learning rate, which pulls back.
    floor: share of its units that every layer keeps.
    tolerance: nothing is pushed while the mean of the loss is above its lowest by more than this share of the first one.
        Needs `demp.step(loss)`.

    Raises ValueError for a value out of its range.
    """

    target_flops: float | None = None
    target_sparsity: float | None = None
    start: float = 0.05
    until: float = 0.3
    rate: float = 0.02
    floor: float = 0.1
    tolerance: float = 0.2

    def __post_init__(self) -> None:
        if (self.target_flops is None) == (self.target_sparsity is None):
            raise ValueError(
                "one of target_flops and target_sparsity must be given, got "
                f"{self.target_flops} and {self.target_sparsity}"
            )
        for name in ("target_flops", "target_sparsity", "rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must be above 0 and below 1, got {value}")
        if not 0 <= self.start < self.until <= 1:
            raise ValueError(f"start and until must be 0 <= start < until <= 1, got {self.start} and {self.until}")
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor must be at least 0 and below 1, got {self.floor}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be above 0, got {self.tolerance}")

    def left(self, share_of_run: float) -> float:
        """The share of the cost that the budget leaves at that moment of the run."""
        way = min(max((share_of_run - self.start) / (self.until - self.start), 0.0), 1.0)
        target = self.target_flops if self.target_sparsity is None else 1 - self.target_sparsity
        assert target is not None  # one of the two is given
        return target + (1 - target) * (1 - way) ** 3


@dataclass(frozen=True)
class _Push:
    """rows: what a step takes off each row of `parameter`. strength: of the same units, for an offset; None where it has none
    of its own, as in front of a normalisation."""

    parameter: nn.Parameter
    rows: Tensor
    is_offset: bool
    strength: nn.Parameter | None = None


class Steerer:
    """Carries a `Steering` out on the model of a `DemP`.

    Args:
        graph: of `model`; the controller keeps it up to date. example_inputs: of the forward, meta tensors will do.
        optimizers: of the model: what they do not train is not pushed.
        round_to, min_units: as the removal has them, so that no unit is pushed that would have to stay.
    """

    def __init__(
        self, steering: Steering, model: nn.Module, graph: UnitGraph, optimizers: Sequence[Optimizer],
        example_inputs: tuple[Any, ...], total_steps: int, round_to: int, min_units: int,
    ) -> None:
        self.steering, self.model, self.graph, self.optimizers = steering, model, graph, optimizers
        self.total_steps, self.round_to, self.min_units = total_steps, round_to, min_units
        by_flops = steering.target_flops is not None
        self.cost = flops_cost(model, example_inputs) if by_flops else parameter_cost(model)
        self.full_cost = self.cost({})
        self.every = max(1, math.ceil((steering.until - steering.start) * total_steps / CONTROLS))
        self.pushed: dict[str, Tensor] = {}
        self.losses: Tensor | None = None
        """(3,) float64: running mean of the loss, its lowest, the first loss."""
        self._pushes: list[_Push] = []

    def step(self, step: int, loss: Tensor | None) -> None:
        """Push, after the optimiser's step number `step`. loss: the mean over all ranks, a scalar, or None."""
        steering = self.steering
        resting = None if loss is None else self._resting(loss)
        if step < steering.start * self.total_steps:
            return
        on_the_way = step <= steering.until * self.total_steps and step % self.every == 0
        if on_the_way or not self.pushed or self._widths_changed():
            self.choose(step)
        self._push(resting, haste=HASTE if step > steering.until * self.total_steps else 1)

    def choose(self, step: int) -> None:
        """Which units are pushed from now on."""
        budget = self.steering.left(step / self.total_steps) * self.full_cost
        self.pushed = lowest_units(
            self.model, self.graph, self.scores(), budget, cost=self.cost, round_to=self.round_to,
            floor=self.steering.floor, min_units=self.min_units,
        )
        self._plan_pushes()

    def scores(self) -> dict[str, Tensor]:
        """Activation name -> (units,) on the CPU; infinite, so that they are never pushed, for units that no parameter makes
        or whose going saves nothing."""
        savings = unit_savings(self.model, self.graph, self.cost)
        scores = {}
        for name, strength in self._strengths().items():
            if strength is None or savings[name] <= 0:
                scores[name] = torch.full((self.graph.units[name],), torch.inf)
            elif self.steering.target_flops is not None:
                scores[name] = strength
            else:
                place = strength.argsort(descending=True, stable=True).argsort() + 1
                scores[name] = strength * self.graph.total_units[name] / (place * savings[name])
        return scores

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        losses = None if self.losses is None else self.losses.clone()
        return {"pushed": {name: mask.clone() for name, mask in self.pushed.items()}, "losses": losses}

    def check_state_dict(self, state: Any, units: dict[str, int]) -> None:
        """Raises ValueError if `state` is no `state_dict()` of a network with these `units`."""
        pushed, losses = entry(state, "pushed", dict, "the steering's state"), state.get("losses")
        for name, mask in pushed.items():
            # its length may be that before the last removal: units are chosen anew before the next push then
            if name not in units or not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 1:
                raise ValueError(f"the steering's state must have bool tensors for activations of the model, got {name!r}")
        if losses is not None and (not isinstance(losses, Tensor) or losses.shape != (3,) or losses.dtype != torch.float64):
            raise ValueError("the steering's state must have three float64 losses, or None")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(self.model.parameters()).device
        self.pushed = {name: mask.cpu() for name, mask in state["pushed"].items()}
        losses = state.get("losses")
        self.losses = None if losses is None else losses.to(device)
        self._plan_pushes()

    # --- parts ---

    def _gated(self) -> list[tuple[str, str, nn.Parameter]]:
        """(name, activation, parameter) of the parameters whose row r belongs to unit r."""
        parameters, trained = dict(self.model.named_parameters()), parameters_of(self.optimizers)
        gated = [(name, activation, parameters.get(name)) for name, activation in self.graph.gates.items()]
        return [
            (name, activation, p) for name, activation, p in gated
            if p is not None and p.requires_grad and id(p) in trained and len(p) == self.graph.units[activation]
        ]

    def _strengths(self) -> dict[str, Tensor | None]:
        """Activation name -> (units,) on the CPU, a mean where several parameters make them; None where none does."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.graph.units}
        for _, activation, p in self._measures():
            size = p.detach().abs()
            if p.dim() > 1:
                size = size.flatten(1).sum(1)
                size = size / size.mean().clamp_min(torch.finfo(size.dtype).tiny)
            found[activation].append(size)
        return {name: torch.stack(sizes).mean(0).cpu().float() if sizes else None for name, sizes in found.items()}

    def _measures(self) -> list[tuple[str, str, nn.Parameter]]:
        """Scales of normalisations; of activations that have none in front, the weights."""
        scales = {id(m.weight) for m in self.model.modules() if isinstance(m, NORMALISATIONS)}
        gated = self._gated()
        normalised = {activation for _, activation, p in gated if id(p) in scales}
        return [g for g in gated if id(g[2]) in scales or (g[2].dim() > 1 and g[1] not in normalised)]

    def _widths_changed(self) -> bool:
        units = self.graph.units
        return any(len(mask) != units.get(name) for name, mask in self.pushed.items())

    def _plan_pushes(self) -> None:
        """What `_push` moves: all parameters with a pushed row, strengths in front of the offsets that go by them."""
        measures = {id(p) for _, _, p in self._measures()}
        parameters = dict(self.model.named_parameters())
        self._pushes = []
        for name, activation, p in self._gated():
            mask = self.pushed.get(activation)
            if mask is None or not mask.any():
                continue
            rows = mask.to(p.device, p.dtype).mul_(self.steering.rate).view(-1, *[1] * (p.dim() - 1))
            if id(p) in measures:
                self._pushes.insert(0, _Push(p, rows, is_offset=False))
            elif p.dim() == 1:
                weight = parameters.get(name.rpartition(".")[0] + ".weight")
                self._pushes.append(_Push(p, rows, is_offset=True, strength=weight if id(weight) in measures else None))

    @torch.no_grad()
    def _push(self, resting: Tensor | None, haste: int = 1) -> None:
        for push in self._pushes:
            p, rows, strength = push.parameter, push.rows, push.strength
            if resting is not None:
                rows = torch.where(resting.to(rows.device), 0.0, rows)
            if not push.is_offset:
                # of weights too: taking off a share, (1 - r) w, loses to an Adam step at |w| = lr / r
                p.copy_(p.sign() * (p.abs() - rows).clamp_min_(0))
            elif haste == 1 or strength is None:
                p.sub_(rows)
            else:
                used_up = (strength == 0).flatten(1).all(1) if strength.dim() > 1 else strength == 0
                p.sub_(torch.where(used_up, haste * rows, rows))

    @torch.no_grad()
    def _resting(self, loss: Tensor) -> Tensor:
        """() bool on the device: the loss has risen too far. No host synchronisation."""
        loss = loss.detach().double()
        if self.losses is None:
            self.losses = loss.repeat(3)
        # a loss that is not finite says nothing: a GradScaler skips its step
        self.losses.copy_(torch.where(self.losses.isfinite(), self.losses, loss))
        mean, lowest, first = self.losses.unbind()
        loss = torch.where(loss.isfinite(), loss, mean)
        mean.mul_(MEMORY).add_(loss, alpha=1 - MEMORY)
        lowest.copy_(torch.minimum(lowest, mean))
        return mean > lowest + self.steering.tolerance * first
