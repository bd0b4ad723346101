"""Torch-Pruning's methods beside DemP: its own dependency graph, importance and removal, in the same training loop.

    tp-magnitude     L2 norm of a group of coupled channels, once, after a quarter of the run
    tp-group-lasso   DepGraph: sparse training by Torch-Pruning's group regulariser (its default strength) for half of the run, then
                     the same norm

Both remove the channels that are lowest over all layers until the network has the parameter sparsity asked for, in rounds of a
hundredth of the channels; a layer keeps at least a twentieth. Widths are not rounded: Torch-Pruning's `round_to` rounds down, and
would take channels that are not the lowest. Torch-Pruning makes new parameters and knows no optimiser: the
moments of those start anew.

Source: Fang et al., DepGraph, arXiv 2301.12900; torch-pruning 1.6.
"""
from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..strided import avoid_broken_kernel
from ..training.distributed import unwrap
from .errors import RecipeError, need
from .methods import Plan

__all__ = ["OUTSIDE", "TorchPruning"]

OUTSIDE = {"tp-magnitude": 0.25, "tp-group-lasso": 0.5}
"""Name -> after which share of the run it prunes."""
ROUNDS, MOST = 100, 0.95


class TorchPruning:
    """A method of the training loop (see `methods.Method`) that prunes once, with Torch-Pruning.

    Args:
        name: of `OUTSIDE`. sparsity: 1 - parameters left / parameters at first, in [0, 1).

    Raises RecipeError where torch_pruning is not installed.
    """

    controller = None

    def __init__(self, name: str, sparsity: float) -> None:
        self.name, self.sparsity = name, sparsity
        self._package: Any = need("torch_pruning", f"the method {name}")

    def prepare(self, model: nn.Module, example: Tensor) -> nn.Module:
        self._example = example
        return model

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        self._model, self._optimizer = unwrap(model), optimizer
        self._at_first = sum(p.numel() for p in model.parameters())
        self._channels_last = _is_channels_last(self._model)
        self._prune_at = max(1, int(OUTSIDE[self.name] * plan.total_steps))
        self._steps, self._regularising = 0, self.name == "tp-group-lasso"
        self._pruner = self._make_pruner(self._model)
        if self._regularising:
            self._pruner.update_regularizer()

    def penalise(self) -> None:
        if self._regularising:
            self._pruner.regularize(self._model)

    def step(self, loss: Tensor) -> bool:
        self._steps += 1
        if self._steps != self._prune_at:
            return False
        before = dict(self._model.named_parameters())
        target = (1 - self.sparsity) * self._at_first
        rounds = 0
        while sum(p.numel() for p in self._model.parameters()) > target:
            if (rounds := rounds + 1) > ROUNDS:
                raise RecipeError(f"{self.name}: sparsity must be one that Torch-Pruning can reach, got {self.sparsity:.2f}")
            self._pruner.step()
        if self._channels_last:  # what it cut lies in NCHW
            self._model.to(memory_format=torch.channels_last)
        for module in self._model.modules():
            avoid_broken_kernel(module)  # in channels_last a run at width 16 hung behind the cut
        _adopt(self._optimizer, before, dict(self._model.named_parameters()))
        self._regularising = False
        return True

    def units(self) -> tuple[dict[str, int], dict[str, int]]:
        return {}, {}

    def state(self) -> dict[str, float]:
        return {}

    def _make_pruner(self, model: nn.Module) -> Any:
        package = self._package
        kind = package.pruner.GroupNormPruner if self._regularising else package.pruner.BasePruner
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        device = next(model.parameters()).device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of parameters that no module of its own holds; they stay as they are
            return kind(
                model, self._example.to(device), importance=package.importance.GroupMagnitudeImportance(p=2), global_pruning=True,
                pruning_ratio=1.0, max_pruning_ratio=MOST, iterative_steps=ROUNDS, ignored_layers=head,
            )


def _is_channels_last(model: nn.Module) -> bool:
    weights = [p for p in model.parameters() if p.dim() == 4]
    return any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in weights)


def _adopt(optimizer: Optimizer, before: dict[str, nn.Parameter], after: dict[str, nn.Parameter]) -> None:
    """Give the optimiser the parameters that took the place of those it has. Their state is gone."""
    successors = {id(old): after[name] for name, old in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [successors[id(parameter)] for parameter in group["params"]]
    for name, old in before.items():
        if after[name] is not old:
            optimizer.state.pop(old, None)
