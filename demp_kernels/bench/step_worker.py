"""A process that runs training steps on demand: one for each setting of the allocator, which is for a whole process."""
from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..build_info import tune_allocator
from ..graph import prepare
from ..modules import DemPReLU
from ..recipes.models import ResNet18
from ..training import DemP
from ..training.liveness import activations_of

__all__ = ["COMPILED", "SETUPS", "Setup", "StepSpec", "serve"]

TOTAL_STEPS = 10_000
PRUNE_EVERY = 500
"""Steps between two decisions: the default of `DemP`."""
PEAK_PENALTY, PEAK_NOISE = 0.03, 5e-5


@dataclass(frozen=True)
class StepSpec:
    """width: of the ResNet-18. shape: of a batch (N, C, H, W). compile: with the setups of `COMPILED`, where the compiler works."""

    width: int
    shape: tuple[int, int, int, int]
    threads: int
    classes: int = 10
    compile: bool = False


@dataclass(frozen=True)
class Setup:
    """One way to train. prepared: None (plain PyTorch), "unfused" or "fused"."""

    layout: str = "channels_last"
    fused_optimizer: bool = True
    prepared: str | None = None
    compile: bool = False


SETUPS = {
    "plain_nchw": Setup("nchw", fused_optimizer=False),
    "plain_channels_last": Setup(fused_optimizer=False),
    "plain_fused_optimizer": Setup(),
    "demp_unfused": Setup(prepared="unfused"),
    "demp": Setup(prepared="fused"),
}
"""From what PyTorch does by itself to everything that this package offers."""
COMPILED = {"plain_compile": Setup(compile=True), "demp_compile": Setup(prepared="fused", compile=True)}


@dataclass(frozen=True)
class Call:
    """What is timed, and what has to happen before it, which is not."""

    run: Callable[[], Any]
    before: Callable[[], Any] = lambda: None


class Trainer:
    """A network, its optimiser and one batch that is used again and again."""

    def __init__(self, spec: StepSpec, setup: Setup) -> None:
        torch.manual_seed(0)
        layout = torch.channels_last if setup.layout == "channels_last" else torch.contiguous_format
        self.images = torch.randn(spec.shape).contiguous(memory_format=layout)
        self.labels = torch.randint(spec.classes, spec.shape[:1])
        self.model: nn.Module = ResNet18(spec.shape[1], spec.classes, spec.width).to(memory_format=layout)
        if setup.prepared is not None:
            self.model = prepare(self.model, self.images[:2], fuse=setup.prepared == "fused")
        if setup.compile:
            self.model = torch.compile(self.model, dynamic=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=setup.fused_optimizer or None)
        self.demp = self._controller(PEAK_NOISE, TOTAL_STEPS) if setup.prepared is not None else None

    def _controller(self, noise: float, prune_every: int) -> DemP:
        # min_units: the decision is made and finds nothing to remove
        return DemP(
            self.model, self.optimizer, total_steps=TOTAL_STEPS, peak_penalty=PEAK_PENALTY, peak_noise=noise,
            prune_every=prune_every, min_units=10**6, seed=0,
        )

    def step(self) -> None:
        F.cross_entropy(self.model(self.images), self.labels).backward()
        if self.demp is not None:
            self.demp.penalise_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.demp is not None:
            self.demp.step()

    def parts(self) -> dict[str, Call]:
        """What DemP adds to a step, piece by piece: the penalty's gradients, the noise (with schedule and
        liveness), a decision. The counts are measured against plain activations, see `Sites`."""
        assert self.demp is not None
        demp, decider = self.demp, self._controller(0.0, 1)

        def gradients_exist() -> None:
            for p in self.model.parameters():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)

        def forward_happened() -> None:
            for module in activations_of(self.model).values():
                module.active.add_(1)  # else all units would seem silent, and get no noise

        return {
            "own_penalty": Call(demp.penalise_gradients, before=gradients_exist), "own_noise": Call(demp.step, before=forward_happened),
            "own_decision": Call(decider.step, before=forward_happened),
        }


class Sites:
    """All activations of the network on inputs of their shapes, forward and backward, counted or plain."""

    def __init__(self, trainer: Trainer) -> None:
        shapes: list[Tensor] = []
        hooks = [
            module.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].detach()))
            for module in trainer.model.modules() if isinstance(module, (nn.ReLU, DemPReLU))
        ]
        trainer.model(trainer.images)
        for hook in hooks:
            hook.remove()
        self._inputs = [x.clone().requires_grad_() for x in shapes]
        self._grads = [torch.randn_like(x) for x in shapes]
        self._counting = [DemPReLU() for _ in shapes]

    def counted(self) -> None:
        for x, grad, module in zip(self._inputs, self._grads, self._counting):
            torch.autograd.grad(module(x), x, grad)

    def plain(self) -> None:
        for x, grad in zip(self._inputs, self._grads):
            torch.autograd.grad(torch.relu(x), x, grad)


def serve(connection: Connection, spec: StepSpec, tuned: bool) -> None:
    """Build everything, send (names, whether the allocator was tuned), then run what is asked for by name and send its
    seconds and this process's CPU seconds so far, until None comes. An error is sent as a string."""
    try:
        torch.set_num_threads(spec.threads)
        took = bool(tune_allocator()) if tuned else False
        calls = _calls(spec)
        connection.send((list(calls), took))
        while (name := connection.recv()) is not None:
            calls[name].before()
            start = time.perf_counter()
            calls[name].run()
            connection.send((time.perf_counter() - start, time.process_time()))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _calls(spec: StepSpec) -> dict[str, Call]:
    trainers = {name: Trainer(spec, setup) for name, setup in SETUPS.items()}
    sites = Sites(trainers["demp_unfused"])
    if spec.compile:
        trainers |= _compiled(spec)
    return {
        **{name: Call(trainer.step) for name, trainer in trainers.items()},
        **trainers["demp"].parts(),
        "sites_counted": Call(sites.counted), "sites_plain": Call(sites.plain),
    }


def _compiled(spec: StepSpec) -> dict[str, Trainer]:
    """Those that run: a compiler that is not there must not cost the other rows."""
    working = {}
    for name, setup in COMPILED.items():
        try:
            trainer = Trainer(spec, setup)
            trainer.step()
        except Exception as error:
            print(f"step: {name} is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        else:
            working[name] = trainer
    return working
