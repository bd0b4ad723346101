"""Builds the grid emulator with kernels into a shared library for ctypes, and watches tensors for it.

See `emulator/runtime.h` for what the emulator is, what it checks and what it cannot see.
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent / "emulator"
RUNTIME = [EMULATOR / "runtime.cpp", EMULATOR / "access_checks.cpp", EMULATOR / "c_api.cpp"]
CXX = os.environ.get("CXX", "").split() or [shutil.which("g++") or shutil.which("c++") or ""]
FLAGS = ["-std=c++17", "-fPIC", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
SCHEDULES = (0, 1, 7)
"""In order, reversed, shuffled and preempted: a dropped barrier can pass unnoticed in any one of them."""
GUARD = 256


def build(kernels: Sequence[Path], checks: str = "accesses") -> Path:
    """Compile `kernels` with the emulator and return the library; one that is up to date is reused.

    checks: "accesses" instruments the kernels for `access_checks.cpp`, "sanitizers" is AddressSanitizer and UBSan (the
    process must then have AddressSanitizer's library preloaded).
    """
    if checks == "accesses":
        kernel_flags, runtime_flags = ["-O1", "-fsanitize=thread"], ["-O2"]
    else:
        runtime_flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        kernel_flags = runtime_flags
    jobs = [(source, kernel_flags) for source in kernels] + [(source, runtime_flags) for source in RUNTIME]
    folder = _cache_folder()
    library = folder / f"{_fingerprint(jobs)}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = []
        for source, flags in jobs:
            objects.append(str(Path(scratch) / (source.stem + ".o")))
            language = ["-x", "c++"] if source.suffix in (".cu", ".cuh") else []
            _run([*CXX, *FLAGS, *flags, *language, "-c", str(source), "-o", objects[-1]])
        # Without -fsanitize=thread, which would bring in ThreadSanitizer's own hooks.
        link = [] if checks == "accesses" else ["-fsanitize=address,undefined"]
        fresh = Path(scratch) / "library.so"
        _run([*CXX, "-shared", *link, "-o", str(fresh), *objects])
        os.replace(fresh, library)
    return library


def _cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"demp_kernels-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else")
    return folder


def _fingerprint(jobs: Sequence[tuple[Path, list[str]]]) -> str:
    """A name that changes with any source, any header in reach, the flags and the compiler."""
    compiler = subprocess.run([*CXX, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((FLAGS, [(str(s), f) for s, f in jobs], compiler)).encode())
    headers = [*EMULATOR.glob("*.h"), *(ROOT / "csrc" / "common").glob("*"), *(ROOT / "csrc" / "ops" / "cuda").glob("*.cuh")]
    for path in sorted({*headers, *(source for source, _ in jobs)}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _run(command: list[str]) -> None:
    nice = ["nice", "-n", "15"] if shutil.which("nice") else []
    done = subprocess.run([*nice, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


class Emulator:
    """A loaded library. Its functions return an error message or None; `call` turns a message into an EmulationError."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_watch.argtypes = [ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]

    def set_schedule(self, schedule: int) -> None:
        self.library.emulator_set_schedule(ctypes.c_uint(schedule))

    def set_multiprocessors(self, count: int) -> None:
        """How many multiprocessors launches are sized for: few make every thread loop."""
        self.library.emulator_set_multiprocessors(count)

    @contextmanager
    def watching(self, *tensors: Tensor) -> Iterator[None]:
        """Check every access of the launches inside against these tensors; see `guarded` for the room around them."""
        try:
            for t in tensors:
                if t.numel():
                    self.library.emulator_watch(t.data_ptr(), t.numel() * t.element_size(), GUARD)
            yield
        finally:
            self.library.emulator_forget_watched()

    def call(self, name: str, *arguments: object) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*map(_as_c, arguments))
        if message is not None:
            raise EmulationError(message.decode())


class EmulationError(RuntimeError):
    """What the emulator found wrong with a kernel."""


def _as_c(argument: object) -> object:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, bool):
        return ctypes.c_int(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return argument


def guarded(like: Tensor, offset: int = 0) -> Tensor:
    """A copy of `like`, same strides, with at least GUARD bytes of room before and after it.

    offset: elements by which it starts after a 16-byte boundary.
    """
    size = like.element_size()
    room = -(-GUARD // size) * 2
    flat = torch.empty(like.numel() + 2 * room + 16, dtype=like.dtype)
    flat.view(torch.uint8).fill_(0xFF)  # floats read NaN
    first = room + offset + (-(flat.data_ptr() + room * size) % 16) // size
    copy = flat.as_strided(like.shape, like.stride(), first)
    return copy.copy_(like)


def tight(like: Tensor, offset: int = 0) -> Tensor:
    """As `guarded`, with nothing before or after: for AddressSanitizer, which guards allocations itself."""
    flat = torch.empty(like.numel() + offset, dtype=like.dtype)  # torch aligns allocations to 64 bytes
    return flat.as_strided(like.shape, like.stride(), offset).copy_(like)
