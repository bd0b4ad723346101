"""The machine that a row was measured on."""
from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..host import simd_level
from ..ops import backend
from ..recipes.machine import processor
from ..version import __version__

__all__ = ["Machine", "OthersMeter", "commit", "last_level_cache"]

FALLBACK_CACHE = 32 * 2**20
"""Bytes taken for the last-level cache where the machine does not tell."""
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "": 1}


@dataclass(frozen=True)
class Machine:
    """Facts that stand in every row of a run."""

    device: str
    machine: str
    simd: str
    cache_bytes: int
    allocator: str
    backend: str
    torch: str
    commit: str
    date: str

    @classmethod
    def here(cls, device: torch.device, *, tuned: bool) -> Machine:
        """tuned: whether `tune_allocator()` took in this process."""
        on_gpu = device.type == "cuda"
        library = "_C_cuda" if on_gpu else "_C"
        return cls(
            device=device.type,
            machine=torch.cuda.get_device_name(device) if on_gpu else processor(),
            simd="" if on_gpu else simd_level(),
            cache_bytes=last_level_cache(device),
            allocator="caching" if on_gpu else "tuned" if tuned else "default",
            torch=torch.__version__,
            commit=commit(),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            backend="native" if library in backend.loaded else "reference",
        )


class OthersMeter:
    """How much other processes are in the way, from its start to `share()`."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = time.perf_counter(), _busy_seconds(), time.process_time()

    def share(self, threads: int, own_elsewhere: float = 0.0) -> float | None:
        """Their part of the time of the cores that our threads need: what others do on cores that we leave idle is not in the
        way. None where the system does not tell. own_elsewhere: CPU seconds that other processes of ours took meanwhile."""
        wall, busy = time.perf_counter() - self._wall, _busy_seconds()
        if busy is None or self._busy is None or wall < 0.05:  # the system counts in hundredths of a second
            return None
        others = (busy - self._busy - (time.process_time() - self._own) - own_elsewhere) / wall
        spare = max((os.cpu_count() or 1) - threads, 0)
        return max(others - spare, 0.0) / threads


def _busy_seconds() -> float | None:
    """CPU seconds since the start of the system that were not idle, over all cores, stolen ones included."""
    try:
        numbers = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = map(int, numbers)
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache: L2 of a GPU, L3 (or what is last) of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size or FALLBACK_CACHE
    return _largest_cache(Path("/sys/devices/system/cpu/cpu0/cache"))


def _largest_cache(folder: Path) -> int:
    sizes = []
    for file in folder.glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
        if found:
            sizes.append(int(found[1]) * _UNITS[found[2]])
    return max(sizes, default=FALLBACK_CACHE)


def commit() -> str:
    """Short hash of the sources' commit, with "+" if they were changed since; the version where there is no git."""
    package = Path(__file__).resolve().parent.parent
    try:
        head = _git(package, "rev-parse", "--short=10", "HEAD")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", str(package), str(package.parent / "csrc"))
    except (OSError, subprocess.SubprocessError):
        return __version__
    return head + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()
