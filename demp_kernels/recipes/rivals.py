"""Structured pruning methods that DemP is compared with, on the same unit graph and the same compaction.

A rival scores every unit, and at one moment of the run removes the lowest of all layers together until the network has
the parameter sparsity asked for (at least one unit of every layer stays, with `round_to` at least so many):

    snap         |sum over batches of dL/dg_u|                             before training
    cropit       |sum over batches of (H g)_u|, H the Hessian in the gates  before training
    early-snap, early-crop   the same scores, once the weights' drift has settled
    l1           L1 norm of the unit's incoming weights, over its layer's mean, after a quarter of the run
    random       no score at all, before training

A gate g_u = 1 multiplies the unit's output. What gates score goes in rounds, all at that moment: to `START`, then half of the
way that is left each time, and to the end, with new scores of the network so far before each cut. One cut by scores of the whole
network is known to be weaker. Drift: d_t = |theta_t - theta_0| at the end of epoch t; it has settled when
|d_t - d_{t-1}| / |theta_0| < 1 - sparsity, and is taken to be halfway through the run at the latest. The authors put the share of
units that go where the sparsity stands here, a looser bound: theirs can only prune earlier.

Sources: SNAP, Verdenius et al., arXiv 2006.00896. CroP and the drift, Rachwan et al., arXiv 2206.10451; with the gates and
ten batches and five rounds as in the experiments of arXiv 2403.07688. L1, Li et al., arXiv 1608.08710 (there layer by layer).
"""
from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from ..compaction import compact
from ..graph import UnitGraph, prepare, remembered_inputs
from ..graph.units import ActivationUnits
from ..modules import DemPActivation
from ..training.budget import lowest_units
from ..training.distributed import unwrap
from .methods import Plan

__all__ = ["RIVALS", "Rival", "crop_scores", "l1_scores", "random_scores", "snap_scores"]

SCORE_BATCHES = 10
START, ROUNDS = 0.5, 5
SETTLED_AT_THE_LATEST = 0.5
Scores = dict[str, Tensor]
"""Activation name -> (units,), low for what is to go."""


# --- scores ---


def snap_scores(model: nn.Module, graph: UnitGraph, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> Scores:
    """|sum_b dL_b/dg_u|."""
    return _gate_scores(model, graph, batches, second_order=False)


def crop_scores(model: nn.Module, graph: UnitGraph, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> Scores:
    """|sum_b (H_b g_b)_u|, with gradient and Hessian in the gates."""
    return _gate_scores(model, graph, batches, second_order=True)


def l1_scores(model: nn.Module, graph: UnitGraph, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> Scores:
    """sum |w| of the rows that make a unit, over the mean of its layer; several weights (a shortcut) are averaged."""
    parameters = dict(model.named_parameters())
    norms: dict[str, list[Tensor]] = {name: [] for name in graph.units}
    for name, activation in graph.gates.items():
        weight = parameters.get(name)
        if weight is not None and weight.dim() > 1 and len(weight) == graph.units[activation]:
            rows = weight.detach().abs().flatten(1).sum(1)
            norms[activation].append(rows / rows.mean().clamp_min(torch.finfo(rows.dtype).tiny))
    # units that no single weight makes are neither better nor worse than others
    return {name: torch.stack(found).mean(0) if found else torch.ones(graph.units[name]) for name, found in norms.items()}


def random_scores(model: nn.Module, graph: UnitGraph, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(units, generator=generator) for name, units in graph.units.items()}


def _gate_scores(
    model: nn.Module, graph: UnitGraph, batches: Iterable[tuple[Tensor, Tensor]], second_order: bool
) -> Scores:
    """On a copy, with batch statistics: a network that was never trained has no others."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = True
    like = next(model.parameters())
    gates = {
        name: torch.ones(units, device=like.device, dtype=like.dtype, requires_grad=True)
        for name, units in graph.units.items()
    }
    total = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    # second derivatives: fused attention has none
    with _gated(model, graph, gates), sdpa_kernel(SDPBackend.MATH):
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            first = torch.autograd.grad(loss, list(gates.values()), create_graph=second_order)
            if second_order:
                product = sum((g * g.detach()).sum() for g in first)
                first = torch.autograd.grad(product, list(gates.values()))
            for name, gradient in zip(gates, first):
                total[name] += gradient.detach()
    return {name: score.abs().cpu() for name, score in total.items()}


@contextmanager
def _gated(model: nn.Module, graph: UnitGraph, gates: dict[str, Tensor]) -> Iterator[None]:
    """Multiply what each call of an activation gives by its gate."""

    def gate(calls: list[ActivationUnits]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        names = itertools.cycle(call.name for call in calls)

        def multiply(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            shape = [1] * y.dim()
            shape[module.channel_dim] = -1
            return y * gates[next(names)].view(shape)

        return multiply

    hooks = [
        module.register_forward_hook(gate(calls))
        for module, calls in graph.calls_of(model).items() if isinstance(module, DemPActivation)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- when ---


class Rival:
    """A method of the training loop (see `methods.Method`) that prunes once.

    Args:
        name: of `RIVALS`. sparsity: 1 - parameters left / parameters at first, in [0, 1).
    """

    controller = None

    def __init__(self, name: str, sparsity: float) -> None:
        self.name, self.sparsity = name, sparsity
        self.scores, self.when = RIVALS[name]
        self.sparsities = round_sparsities(sparsity) if self.scores in (snap_scores, crop_scores) else [sparsity]

    def prepare(self, model: nn.Module, example: Tensor) -> nn.Module:
        return prepare(model, example)

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        self._model, self._optimizer, self._plan = unwrap(model), optimizer, plan
        self._graph = UnitGraph.trace(self._model, remembered_inputs(self._model))
        self._total = dict(self._graph.units)
        self._initial = [p.detach().clone() for p in model.parameters()] if self.when == "settled" else []
        self._at_first = sum(p.numel() for p in model.parameters())
        self._steps, self._drift, self._pruned = 0, 0.0, False
        if self.when == "before":
            self._prune()

    def penalise(self) -> None:
        pass

    def step(self, loss: Tensor) -> bool:
        self._steps += 1
        if self._pruned or not self._is_time():
            return False
        self._prune()
        return True

    def units(self) -> tuple[dict[str, int], dict[str, int]]:
        return dict(self._graph.units), self._total

    def state(self) -> dict[str, float]:
        return {}

    def _is_time(self) -> bool:
        share = self._steps / self._plan.total_steps
        if self.when != "settled":
            return share >= self.when
        if share >= SETTLED_AT_THE_LATEST:
            return True
        if self._steps % self._plan.steps_per_epoch:
            return False
        before, norm = self._drift, _norm(self._initial)
        self._drift = _norm([p.detach() - q for p, q in zip(self._model.parameters(), self._initial)])
        return 0 < abs(self._drift - before) / norm < 1 - self.sparsity

    def _prune(self) -> None:
        settings = self._plan.settings
        for sparsity in self.sparsities:
            scores = self.scores(self._model, self._graph, self._plan.labelled_batches(SCORE_BATCHES), settings.seed)
            target = (1 - sparsity) * self._at_first
            dead = lowest_units(self._model, self._graph, scores, target, round_to=settings.round_to)
            compact(self._model, self._optimizer, dead=dead, graph=self._graph)
        self._initial, self._pruned = [], True


def round_sparsities(sparsity: float) -> list[float]:
    """Sparsities of the rounds: `START`, then 1 - 2^-i of the way from there to `sparsity`, and `sparsity` itself."""
    if sparsity <= START:
        return [sparsity]
    return [sparsity - (sparsity - START) / 2**i for i in range(ROUNDS + 1)] + [sparsity]


def _norm(tensors: list[Tensor]) -> float:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).item()


RIVALS: dict[str, tuple[Callable[..., Scores], str | float]] = {
    "snap": (snap_scores, "before"),
    "cropit": (crop_scores, "before"),
    "early-snap": (snap_scores, "settled"),
    "early-crop": (crop_scores, "settled"),
    "l1": (l1_scores, 0.25),
    "random": (random_scores, "before"),
}
"""Name -> (score, when: before training, when the drift has settled, or after that share of the run)."""
