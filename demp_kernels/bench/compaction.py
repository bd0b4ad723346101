"""`demp bench compaction`: removing half of the units, known to be dead, beside a warm copy of everything that is kept.

What is kept are weights, both Adam moments and buffers. Torch-Pruning and torch-kirigami, where they are installed, remove half
of the channels of the same network; they leave the optimiser as it is.
"""
from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..compaction import CompactionError, compact
from ..graph import PrepareError, UnitGraph, prepare
from ..recipes.errors import RecipeError, need
from .machine import Machine, OthersMeter
from .peers import peers_of
from .rows import Row, row_of
from .timing import Timing

__all__ = ["MODELS", "Subject", "compaction_rows", "known"]

MODELS = (
    "resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "densenet121", "vit_b_16",
)
SIDE = {"vit_b_16": 224}
"""Side of the example images where it is not 64."""
ROUNDS = 5
SLOW = 5.0
"""Seconds."""


@dataclass
class Subject:
    """A network, an AdamW with state, its analysis, and which units are dead: every other one."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    graph: UnitGraph
    dead: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> Subject:
        """Prepared where that can be done: only there can identity skips select."""
        model.train()
        try:
            model = prepare(model, images)
        except PrepareError:
            pass
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        graph = UnitGraph.trace(model, images)
        return cls(model, optimizer, graph, {name: torch.arange(units) % 2 == 1 for name, units in graph.units.items()})

    def compact(self) -> tuple[float, float]:
        """Seconds of the plan (everything before the first tensor changes) and of the commit."""
        report = compact(self.model, self.optimizer, dead=self.dead, graph=self.graph)
        return report.plan_seconds, report.commit_seconds

    def tensors(self) -> list[Tensor]:
        """Parameters, buffers and the optimiser's tensors of their shapes."""
        moments = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
        return [p.detach() for p in self.model.parameters()] + list(self.model.buffers()) + moments


def compaction_rows(name: str, machine: Machine, *, rounds: int = ROUNDS) -> list[Row]:
    """Rows of one torchvision model: copy_into (of what is kept), plan, commit, demp (both), and the peers
    that are installed; one that takes longer than `SLOW` is timed once.

    Raises RecipeError if the model cannot be had or compacted.
    """
    models = need("torchvision", "the models of this benchmark").models
    images = torch.randn(2, 3, SIDE.get(name, 64), SIDE.get(name, 64))

    def build() -> nn.Module:
        options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return models.get_model(name, weights=None, **options)

    try:
        original = Subject.of(build(), images)
        trial = copy.deepcopy(original)
        trial.compact()
    except CompactionError as error:
        raise RecipeError(f"compaction: {name} must be one that can shrink, got: {error}") from error
    kept = sum(t.nbytes for t in trial.tensors())
    parameters = sum(p.numel() for p in trial.model.parameters())
    del trial
    source, target = torch.ones(kept, dtype=torch.uint8), torch.zeros(kept, dtype=torch.uint8)
    peers = peers_of(build, images)
    samples: dict[str, list[float]] = {"copy_into": [], "plan": [], "commit": []}
    meter = OthersMeter()
    for _ in range(rounds):
        subject = copy.deepcopy(original)
        for _ in range(2):  # the first warms what the second is timed on
            copied = _seconds(lambda: target.copy_(source))
        samples["copy_into"].append(copied)
        gc.collect()  # the last round's subject goes now, and not in the middle of this one
        planned, committed = subject.compact()
        samples["plan"].append(planned)
        samples["commit"].append(committed)
        for peer, run in peers.items():
            times = samples.setdefault(peer, [])
            if not times or times[0] < SLOW:
                times.append(run())
    samples["demp"] = [sum(pair) for pair in zip(samples["plan"], samples["commit"])]
    others = meter.share(torch.get_num_threads())
    return [
        row_of(
            Timing.of(seconds), machine, moved=2 * kept, op="compaction", function=name, noise=False, layout="nchw",
            dtype="float32", shape=str(parameters), direction="half", variant=variant, peak_bytes=None, others=others,
            threads=torch.get_num_threads(),
        )
        for variant, seconds in samples.items()
    ]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def known(names: Sequence[str]) -> list[str]:
    """The names, checked. Raises RecipeError for one that torchvision does not have."""
    models = need("torchvision", "the models of this benchmark").models
    there = models.list_models(module=models)
    for name in names:
        if name not in there:
            raise RecipeError(f"models must be classification models of torchvision, got {name!r}")
    return list(names)
