"""`policy="when_it_pays"`: dead units go only if the steps that are left save more time than their removal takes.

    s (1 - f'/f) n  >  c + w

s: seconds of a step now, the median of the last ones. f, f': multiply-adds of convolutions and linear layers at the widths
now and at those to be, every width rounded up to the block that the device's kernels work in (`width_step`): time jumps at
multiples of it. Units short of the next one count as nothing, which is so in NCHW and too little in channels_last. The
whole step is taken to scale with f, which is too much where it waits for data or for the launch of small kernels. With
`fold_batches` some of the units may stay all the same.
n: steps that are left.
c: seconds of the removal, as the last one took; before the first `TENSOR_SECONDS` a tensor and `BYTE_SECONDS` a byte.
w: by how much the first step at new widths is slower than others, as measured behind earlier removals; before the first
`COMPILE_SECONDS` for a model under torch.compile, whose code is made anew, else 0.

In a data-parallel run the largest s and the largest c + w over all ranks decide, on every rank alike.
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compaction.entry import width_step
from ..compaction.optimizer import with_inner
from ..compaction.report import CompactionReport, Payoff
from ..graph import UnitGraph
from ..graph.units import Keep
from .budget import flops_cost, parameter_cost
from .distributed import is_compiled, largest_over_ranks, unwrap

__all__ = ["POLICIES", "Pace", "Weighing"]

POLICIES = ("always", "when_it_pays")
RECENT = 50
"""Steps over which the median is taken."""
TENSOR_SECONDS = 1e-4
BYTE_SECONDS = 2.5e-10
"""Before a removal was measured. On two cores they give three to nine times what resnet18, vgg16_bn, mobilenet_v2,
densenet121 and vit_b_16 with AdamW take for half of their units (`demp bench compaction`)."""
COMPILE_SECONDS = 30.0
"""Before a compilation was measured: Inductor takes from some seconds to minutes. A run whose guess is wrong loses no
more than so much, or one compilation."""


class Pace:
    """Seconds of training steps, taken between the calls of the controller.

    A GPU is not made to wait: events are recorded there, and read at a look for dead units, which waits for it anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._warm_up: float | None = None
        self.forget()

    def forget(self) -> None:
        """What comes next is another run, or another part of this one."""
        self._began: Any = None
        self._report: CompactionReport | None = None
        self._first: tuple[Any, Any] | None = None
        self._recent: deque[tuple[Any, Any]] = deque(maxlen=RECENT)
        self._after_look: deque[tuple[Any, Any]] = deque(maxlen=RECENT)

    def ends(self) -> None:
        """A step has ended."""
        if self._began is None:
            return
        span = self._began, self._now()
        if self._report is not None and self._report.changed:
            self._first = span
            return
        self._recent.append(span)
        if self._report is not None:
            self._after_look.append(span)

    def begins(self, report: CompactionReport | None) -> None:
        """The next one begins. report: of a look for dead units in between, which is no part of a step."""
        if report is not None and report.changed:
            self._recent.clear()
        self._report, self._began = report, self._now()

    def seconds(self) -> float:
        """Of a step at the present widths, or 0 if there was none yet, but for the first."""
        return self._median(self._recent) if self._recent else 0.0

    def warm_up(self) -> float | None:
        """By how much the first step at new widths was slower, the least of all removals; None before one was measured.

        Compared with steps behind a look that changed nothing, if there were any: a loop may evaluate or save after a look.
        It need not every time, hence the least.
        """
        others = self._after_look or self._recent
        if self._first is not None and others:
            slower = max(0.0, self._length(self._first) - self._median(others))
            self._warm_up = slower if self._warm_up is None else min(self._warm_up, slower)
            self._first = None
        return self._warm_up

    def _median(self, spans: deque[tuple[Any, Any]]) -> float:
        return median(self._length(span) for span in spans)

    def _length(self, span: tuple[Any, Any]) -> float:
        began, ended = span
        if self._device.type != "cuda":
            return float(ended - began)
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Weighing:
    """Weighs removals of one run.

    Args:
        model: as it is trained, with its wrappers. graph: of the model inside, kept up to date by the controller.
        example_inputs: positional arguments of the forward; meta tensors will do.

    pace: to be told of steps. removal_seconds: of the last removal, to be set by whoever carries it out.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], graph: UnitGraph, example_inputs: tuple[Any, ...]
    ) -> None:
        self._wrapper, self._model, self._optimizers, self._graph = model, unwrap(model), optimizers, graph
        self._device = next(self._model.parameters()).device
        self.pace = Pace(self._device)
        self.removal_seconds: float | None = None
        flops = flops_cost(self._model, example_inputs, width_step(self._model))
        # a network whose products are all plain functions of parameters has no such layers
        self._cost = flops if flops({}) > 0 else parameter_cost(self._model)

    def weigh(self, keep: Keep, step: int, steps_left: int) -> Payoff:
        """A removal after which only `keep` stays, `steps_left` steps before the end. The same on all ranks."""
        share = self._cost(self._graph.widths(self._model, keep.atoms).shapes) / self._cost({})
        price = self._removal_seconds() + self._warm_up()
        seconds, price = largest_over_ranks([self.pace.seconds(), price], self._device)
        return Payoff(step, seconds, seconds * (1 - share), steps_left, price)

    def _removal_seconds(self) -> float:
        if self.removal_seconds is not None:
            return self.removal_seconds
        states = [value for one in with_inner(self._optimizers) for state in one.state.values() for value in state.values()]
        held = [*self._model.parameters(), *self._model.buffers(), *(s for s in states if isinstance(s, Tensor))]
        return TENSOR_SECONDS * len(held) + BYTE_SECONDS * sum(tensor.nbytes for tensor in held)

    def _warm_up(self) -> float:
        measured = self.pace.warm_up()
        if measured is not None:
            return measured
        return COMPILE_SECONDS if is_compiled(self._wrapper) else 0.0
