"""What a run adds to plain training. The loop is the same for every method."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from ..graph import prepare
from ..training import DemP, Steering
from ..training.penalty import penalised_parameters
from .settings import TrainSettings

__all__ = ["Demon", "Dense", "Method", "Plan"]


class Method(Protocol):
    """Hooks of the training loop, in the order in which it calls them."""

    name: str
    controller: DemP | None

    def prepare(self, model: nn.Module, example: Tensor) -> nn.Module:
        """The network to train, from a freshly built one."""

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Once, before the first step."""

    def penalise(self) -> None:
        """After the backward pass: what a penalty adds to the gradients."""

    def step(self, loss: Tensor) -> bool:
        """After the optimiser's step; loss: of the task. Returns whether the network has changed its shape."""

    def units(self) -> tuple[dict[str, int], dict[str, int]]:
        """(live, total) units of every activation; empty where none are counted."""

    def state(self) -> dict[str, float]:
        """Numbers of the coming step for the log."""


@dataclass(frozen=True)
class Plan:
    """What a method may need to know about the run."""

    settings: TrainSettings
    total_steps: int
    steps_per_epoch: int
    scan_batches: Callable[[], Iterable[Any]]
    labelled_batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]]
    """So many batches of training images and labels, which the run itself does not draw."""


class Dense:
    """The baseline: plain PyTorch, nothing counted, nothing removed."""

    name = "dense"
    controller = None

    def prepare(self, model: nn.Module, example: Tensor) -> nn.Module:
        return model

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        pass

    def penalise(self) -> None:
        pass

    def step(self, loss: Tensor) -> bool:
        return False

    def units(self) -> tuple[dict[str, int], dict[str, int]]:
        return {}, {}

    def state(self) -> dict[str, float]:
        return {}


class Demon:
    """DemP: penalty on the scales, noise on live weights, dead units removed on the way. The settings say how hard, and
    whether a budget steers it."""

    controller: DemP | None = None

    def __init__(self, name: str = "demp") -> None:
        self.name = name

    def prepare(self, model: nn.Module, example: Tensor) -> nn.Module:
        return prepare(model, example)

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        settings = plan.settings
        self.controller = DemP(
            model,
            optimizer,
            total_steps=plan.total_steps,
            peak_penalty=settings.peak_penalty,
            peak_noise=settings.peak_noise,
            ramp_steps=max(1, int(settings.ramp * plan.total_steps)),
            prune_every=settings.prune_every or _prune_every(settings, plan.steps_per_epoch),
            criterion=settings.criterion,
            policy=settings.policy,
            scan_batches=plan.scan_batches if settings.criterion == "scan" else None,
            penalty_on=settings.penalty_on or _penalised(model),
            round_to=settings.round_to,
            seed=settings.seed,
            steering=_steering(settings),
        )

    def penalise(self) -> None:
        self.controller.penalise_gradients()

    def step(self, loss: Tensor) -> bool:
        report = self.controller.step(loss)
        return report is not None and report.changed

    def units(self) -> tuple[dict[str, int], dict[str, int]]:
        return self.controller.live_units, self.controller.total_units

    def state(self) -> dict[str, float]:
        return {"penalty_weight": self.controller.penalty_weight, "noise_std": self.controller.noise_std}


def _prune_every(settings: TrainSettings, steps_per_epoch: int) -> int:
    """Once an epoch: a unit is dead that no training image has stirred. Pushed units do not come back, so a quarter of an
    epoch tells, and the sooner they go the more of the run is fast."""
    steered = settings.target_flops is not None or settings.target_sparsity is not None
    return max(1, steps_per_epoch // 4) if steered else steps_per_epoch


def _steering(settings: TrainSettings) -> Steering | None:
    if settings.target_flops is None and settings.target_sparsity is None:
        return None
    return Steering(
        settings.target_flops, settings.target_sparsity, start=settings.steer_start, until=settings.steer_until,
        rate=settings.push_rate,
    )


def _penalised(model: nn.Module) -> str:
    """The scales of normalisation layers; networks without any need the weights."""
    try:
        penalised_parameters(model, "scales")
    except ValueError:
        return "weights"
    return "scales"
