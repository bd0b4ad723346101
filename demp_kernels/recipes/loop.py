"""The training loop: one for the dense baseline, for DemP, and for whatever is compared with them."""
from __future__ import annotations

import itertools
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compaction import CompactionError
from ..graph import PrepareError
from ..strided import avoid_broken_kernel
from ..training import CheckpointError, load_checkpoint, save_checkpoint
from ..training.distributed import forget_compiled, mean_over_ranks, sum_counters
from .data import ImageData, load_data
from .errors import RecipeError, one_line
from .flops import count_flops, count_parameters
from .machine import StepClock
from .methods import Method, Plan
from .models import MODELS, build_model, is_convolutional
from .optimisation import build_optimizer, build_schedule
from .ranks import Stopped, current_ranks
from .settings import TrainSettings

__all__ = ["RunResult", "Stopped", "Training", "Watcher", "new_model", "read_data", "warm_up"]

ROWS = 200
"""Rows that a run writes into its log, about; the ends of epochs come on top."""


@dataclass
class RunResult:
    """What a run has come to, finished or not."""

    name: str
    accuracy: float | None = None
    train_seconds: float = 0.0
    setup_seconds: float = 0.0
    """Part of `train_seconds`: preparation and analysis of the network."""
    seconds_per_step_first: float | None = None
    seconds_per_step_last: float | None = None
    train_flops: int = 0
    """Of all steps: three times the forward's, as backward computes two products for each of the forward's."""
    steps: int = 0
    total_steps: int = 0
    steps_per_epoch: int = 1
    params: int = 0
    flops: int = 0
    live: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    units: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    """(step, live units of each activation), the first entry at step 0, then after every removal."""
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """What policy when_it_pays has weighed: the fields of `Payoff`, and whether it paid."""

    @property
    def finished(self) -> bool:
        return self.steps == self.total_steps > 0


class Watcher(Protocol):
    """Told of every row that a run logs: a progress display, a file."""

    def row(self, result: RunResult, row: dict[str, Any]) -> None: ...

    def restored(self, result: RunResult) -> None:
        """The run goes on behind `result.rows`, which an earlier process logged."""


class Training:
    """One run of `method`.

    Args:
        settings: resolved. method: what to add to plain training. data: batches on the device.
        watchers: told of every logged row.

    Equal settings give equal initial weights and equal batches, whatever the method and on however many ranks. Under
    torchrun every rank has one of these and calls its methods at the same moments: `run`, `evaluate`, `save`, `load`.
    """

    def __init__(self, settings: TrainSettings, method: Method, data: ImageData, watchers: list[Watcher]) -> None:
        self.settings, self.method, self.data, self.watchers = settings, method, data, watchers
        self.device, self.ranks = torch.device(settings.device), current_ranks()
        torch.manual_seed(settings.seed)
        model = new_model(settings, data)
        if settings.sync_batchnorm and self.ranks.count > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.layout = torch.channels_last if wants_channels_last(settings, model) else torch.contiguous_format
        model = model.to(self.device, memory_format=self.layout)
        steps_per_epoch = len(data.train)
        total_steps = settings.epochs * steps_per_epoch
        self.result = RunResult(method.name, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        self._every = max(1, -(-total_steps // ROWS))
        self.clock = StepClock(self.device)
        self._task = torch.zeros((), device=self.device)
        """Sum of the task loss since the last row, at step `_logged`."""
        self._logged = 0

        began = time.perf_counter()
        example = torch.zeros(2, data.channels, data.image_size, data.image_size, device=self.device)
        try:
            self.model = method.prepare(model, example.contiguous(memory_format=self.layout))
            self._wrapped = self.ranks.wrapped(self.model)
            self._step_model = torch.compile(self._wrapped, dynamic=False) if settings.compile else self._wrapped
            self.optimizer = build_optimizer(settings, self.model.parameters())
            self.schedule = build_schedule(settings, self.optimizer, total_steps)
            plan = Plan(settings, total_steps, steps_per_epoch, self._scan_batches, self._labelled_batches)
            method.attach(self._step_model, self.optimizer, plan)
        except (PrepareError, CompactionError, ValueError) as error:
            raise RecipeError(f"{settings.model} cannot be trained with {method.name}: {one_line(error)}") from error
        self.result.setup_seconds = time.perf_counter() - began

        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self._measure_model()

    # --- running ---

    def run(self, checkpoint: Path | None = None) -> RunResult:
        """Train to the end. Ctrl-C or SIGTERM, on any rank, stops it after the step that is running, with `Stopped`.

        checkpoint: is written every `save_every` steps (by default once an epoch), after a stop, and at the end.
        Raises RecipeError if it cannot be written.
        """
        with _stop_between_steps() as stop:
            while not self.result.finished:
                self._epoch(checkpoint, stop)
        return self.result

    def _epoch(self, checkpoint: Path | None, stop: list[bool]) -> None:
        result, clock = self.result, self.clock
        self.model.train()
        epoch = result.steps // len(self.data.train) + 1
        last = epoch * len(self.data.train)
        save_every = self.settings.save_every or len(self.data.train)
        batches = iter(self.data.train)
        while result.steps < last:
            clock.start()
            loss, changed = self._step(*next(batches))
            self._task += loss
            clock.stop()
            result.steps += 1
            result.train_flops += 3 * result.flops * self.settings.batch_size
            if changed:
                self._measure_model()
            at_end = result.steps == last
            if at_end or result.steps % self._every == 0:
                evaluate = result.finished or (at_end and epoch % self.settings.evaluate_every == 0)
                self._log(self.evaluate() if evaluate else None)
            stopping = self.ranks.any(bool(stop))
            if checkpoint is not None and (stopping or result.finished or result.steps % save_every == 0):
                self.save(checkpoint)
            if stopping:
                if self._logged < result.steps:
                    self._log(None)  # for the report; not in the checkpoint, so that a resumed run has no row too many
                raise Stopped

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, bool]:
        images = images.contiguous(memory_format=self.layout)
        task, parts = torch.zeros((), device=self.device), self.settings.accumulate
        for number, part in enumerate(zip(images.chunk(parts), labels.chunk(parts)), start=1):
            # ranks exchange their gradients once, when the last part has added its own
            with nullcontext() if number == parts else self.ranks.no_exchange(self._wrapped):
                task += self._backward(*part)
        self.scaler.unscale_(self.optimizer)
        self.method.penalise()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        changed = self.method.step(task)
        self.schedule.step()
        if changed:
            forget_compiled(self._step_model)
        return task, changed

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Add a part's gradients to those that are there. Returns its share of the loss of this rank's batch."""
        with _autocast(self.settings):
            output = self._step_model(images)
            task = F.cross_entropy(output, labels, label_smoothing=self.settings.label_smoothing) / self.settings.accumulate
        self.scaler.scale(task).backward()
        return task.detach()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Share of the test images that are classified correctly. Not part of the training time."""
        self.model.eval()
        self.ranks.align_buffers(self.model)
        right, count = torch.zeros((2, 1), dtype=torch.int64, device=self.device)
        for images, labels in self.data.test:
            with _autocast(self.settings):
                output = self.model(images.contiguous(memory_format=self.layout))
            right += (output.argmax(1) == labels).sum()
            count += len(labels)
        self.model.train()
        sum_counters([right, count])
        return right.item() / count.item()

    # --- bookkeeping ---

    def save(self, path: Path) -> None:
        """A checkpoint from which `load` goes on bit for bit, written by rank 0. Raises RecipeError if it cannot be."""
        tasks = self.ranks.gathered(self._task)
        if self.method.controller is not None:
            self.method.controller.pool_counters()
        if not self.ranks.first:
            return
        self.clock.flush()
        training = {
            "result": asdict(self.result),
            "seconds": torch.tensor(self.clock.seconds, dtype=torch.float64),
            "tasks": tasks,
            "logged": self._logged,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "data": self.data.train.state_dict(),
            "threads": torch.get_num_threads(),
            "processes": self.ranks.count,
        }
        extra = {"settings": self.settings.as_json(), "steps": self.result.steps, "training": training}
        try:
            save_checkpoint(path, self.model, self.optimizer, self.method.controller, extra=extra)
        except OSError as error:
            raise RecipeError(f"{path}: {error.strerror}") from error

    def load(self, path: Path) -> tuple[int, int]:
        """Go on from a checkpoint of the same run. Returns the threads and the processes that it was made with: with other
        numbers the last bits differ. Raises RecipeError if it is damaged or of another run; this object is of no use then."""
        try:
            extra = load_checkpoint(path, self._step_model, self.optimizer, self.method.controller)
            saved = extra["training"]
            result = RunResult(**saved["result"])
            if (result.name, result.total_steps) != (self.result.name, self.result.total_steps):
                raise CheckpointError(f"{path} is of a run {result.name} of {result.total_steps} steps")
            result.steps_per_epoch = self.result.steps_per_epoch
            self.result = result
            self.clock.seconds = saved["seconds"].tolist()
            tasks = saved["tasks"].to(self.device)
            self._task = (tasks[self.ranks.rank] if len(tasks) == self.ranks.count else tasks.mean()).clone()
            self._logged = saved["logged"]
            self.schedule.load_state_dict(saved["schedule"])
            self.scaler.load_state_dict(saved["scaler"])
            self.data.train.load_state_dict(saved["data"])
            made_with = saved["threads"], saved["processes"]
        except (CheckpointError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise RecipeError(f"out cannot be resumed: {one_line(error)}") from error
        for watcher in self.watchers:
            watcher.restored(result)
        return made_with

    def _log(self, accuracy: float | None) -> None:
        result = self.result
        steps = result.steps - self._logged
        loss = mean_over_ranks(self._task).item() / steps
        self._task.zero_()
        self._logged = result.steps
        if not math.isfinite(loss):
            raise RecipeError(f"the loss of {result.name} is {loss} at step {result.steps}: try a lower lr")
        self.clock.flush()
        seconds = self.clock.seconds
        edge = max(1, min(len(self.data.train), result.total_steps // 10))
        result.train_seconds = result.setup_seconds + sum(seconds)
        result.seconds_per_step_first = median(seconds[:edge])
        result.seconds_per_step_last = median(seconds[-edge:])
        if accuracy is not None:
            result.accuracy = accuracy
        if self.method.controller is not None:
            result.decisions = [{**asdict(d), "pays": d.pays} for d in self.method.controller.report().decisions]
        row = {
            "run": result.name, "step": result.steps, "epoch": -(-result.steps // len(self.data.train)),
            "seconds": result.train_seconds, "seconds_per_step": median(seconds[-steps:]), "loss": loss,
            "accuracy": accuracy, "lr": self.schedule.get_last_lr()[0], **self.method.state(),
            "live_units": sum(result.live.values()) or None, "params": result.params, "flops": result.flops,
        }
        result.rows.append(row)
        for watcher in self.watchers:
            watcher.row(result, row)

    def _measure_model(self) -> None:
        result = self.result
        result.live, result.total = self.method.units()
        result.units.append((result.steps, dict(result.live)))
        result.params = count_parameters(self.model)
        shape = (1, self.data.channels, self.data.image_size, self.data.image_size)
        result.flops = count_flops(self.model, torch.zeros(shape, device=self.device))

    def _scan_batches(self) -> Iterator[Tensor]:
        for images in self.data.train.scan():
            yield images.contiguous(memory_format=self.layout)

    def _labelled_batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        # drawing from `self.data.train` would change the order of the run's own batches
        for images, labels in itertools.islice(self.data.train.again(), count):
            yield images.contiguous(memory_format=self.layout), labels


def read_data(settings: TrainSettings) -> ImageData:
    """The data set of a run, with a fresh order of batches. Raises RecipeError in one line if it cannot be had."""
    ranks = current_ranks()
    with ranks.first_goes_first():
        return load_data(
            settings.data, settings.data_dir, batch_size=settings.batch_size, seed=settings.seed,
            device=torch.device(settings.device), train_size=settings.train_size, image_size=settings.image_size,
            channels=None if settings.model in MODELS else 3, workers=settings.workers, ranks=ranks,
        )


def warm_up(settings: TrainSettings, data: ImageData) -> None:
    """Two steps of a network that is thrown away, so that the first run does not pay for what a process pays once: lazy
    imports, thread pools, kernels of the layout and the precision that it will use."""
    torch.manual_seed(settings.seed)
    model = new_model(settings, data)
    device = torch.device(settings.device)
    layout = torch.channels_last if wants_channels_last(settings, model) else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    if settings.compile:
        torch.compile(nn.ReLU())(torch.zeros(1, device=device))  # the compiler's import and its processes
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, fused=True)
    count = settings.batch_size // (current_ranks().count * settings.accumulate)
    for _ in range(2):
        images = torch.randn(count, data.channels, data.image_size, data.image_size, device=device).to(memory_format=layout)
        with _autocast(settings):
            loss = F.cross_entropy(model(images), torch.zeros(count, dtype=torch.int64, device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def new_model(settings: TrainSettings, data: ImageData) -> nn.Module:
    """The network of a run on the CPU, tried on two images. Raises RecipeError if it does not take them."""
    model = build_model(
        settings.model, channels=data.channels, classes=data.classes, image_size=data.image_size, width=settings.width
    )
    for module in model.modules():
        avoid_broken_kernel(module)  # the dense network's too: with AVX2 one of width 4 crashed in its first steps
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, data.channels, data.image_size, data.image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = f"{data.channels}x{data.image_size}x{data.image_size}"
        raise RecipeError(f"{settings.model} does not take images of {size}; image-size resizes ({one_line(error)})") from error
    return model.train()


def _autocast(settings: TrainSettings) -> torch.autocast:
    dtype = torch.float16 if settings.amp == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(settings.device).type, dtype, enabled=settings.amp is not None)


def wants_channels_last(settings: TrainSettings, model: nn.Module) -> bool:
    """As asked for; by default for convolutional networks: 1.2 to 1.9 times faster on CPUs, good for tensor cores."""
    return is_convolutional(model) if settings.channels_last is None else settings.channels_last


@contextmanager
def _stop_between_steps() -> Iterator[list[bool]]:
    """Yields a list that becomes non-empty at the first Ctrl-C or SIGTERM, so that no step is cut in half; the second
    one interrupts at once. Outside the main thread signals are left alone."""
    asked: list[bool] = []

    def on_signal(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
