"""The machine a run is on: its facts for the report, its settings for speed, its clock."""
from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch

from ..build_info import tune_allocator
from ..ops import backend
from ..version import __version__
from .ranks import current_ranks, local_device

__all__ = ["StepClock", "machine_facts", "prepare_machine", "processor", "versions"]


def prepare_machine(device: torch.device, threads: int | None) -> None:
    """The device and threads as asked for, and memory that stays with the process between steps.

    glibc hands large blocks back to the kernel after every step, and the next step faults them in page by page: keeping
    them took a ResNet-18 step of width 16 from 214 to 182 ms on two cores. Both runs of `demp train` profit.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(local_device(device))
    tune_allocator()


def processor() -> str:
    """Name of the CPU as /proc/cpuinfo has it, with family and model where they are told.

    A cloud's "AMD EPYC" is any of its generations: one trained ResNet-18 at half the speed of another.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    first = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", text.split("\n\n")[0], re.MULTILINE))
    name = first.get("model name") or platform.processor() or platform.machine()
    told = "cpu family" in first and "model" in first
    return f"{name} (family {first['cpu family']} model {first['model']})" if told else name


def machine_facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "processes": current_ranks().count, "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def versions() -> dict[str, Any]:
    return {
        "demp_kernels": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "kernels": backend.loaded or ["reference"],
    }


class StepClock:
    """Seconds of each training step, without making a GPU wait: there, events are read when `flush` is called.

    `start` and `stop` enclose a step, batch included; what lies between a `stop` and the next `start` (evaluation,
    logging) is not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._cuda = device.type == "cuda"
        self._began: Any = None
        self._pending: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        now = self._now()
        if self._cuda:
            self._pending.append((self._began, now))
        else:
            self.seconds.append(now - self._began)

    def flush(self) -> None:
        """Make `seconds` complete."""
        if self._pending:
            torch.cuda.synchronize()
            self.seconds += [began.elapsed_time(ended) / 1e3 for began, ended in self._pending]
            self._pending.clear()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
