"""Builds the grid emulator with kernels into a shared library for ctypes, and watches tensors for it.

See `emulator/runtime.h` for what the emulator is, what it checks and what it cannot see.
"""
from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
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
    """Compile `kernels` with the emulator and return the library; objects that are up to date are reused.

    checks: "accesses" instruments the kernels for `access_checks.cpp`, "sanitizers" is AddressSanitizer and UBSan (the
    process must then have AddressSanitizer's library preloaded).
    """
    if checks == "accesses":
        kernel_flags, runtime_flags = ["-O1", "-fsanitize=thread"], ["-O2"]
    else:
        runtime_flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        kernel_flags = runtime_flags
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        kernel_objects = pool.map(lambda source: _compile(source, kernel_flags), kernels)
        objects = [*pool.map(lambda source: _compile(source, runtime_flags), RUNTIME), *kernel_objects]
    # Without -fsanitize=thread, which would bring in ThreadSanitizer's own hooks.
    link = [] if checks == "accesses" else ["-fsanitize=address,undefined"]
    name = hashlib.sha256(repr((link, [str(o) for o in objects])).encode()).hexdigest()[:24]
    return _made_once(_cache_folder() / f"{name}.so", [*CXX, "-shared", *link, *map(str, objects)])


def _compile(source: Path, flags: list[str]) -> Path:
    language = ["-x", "c++"] if source.suffix in (".cu", ".cuh") else []
    command = [*CXX, *FLAGS, *flags, *language, "-c", str(source)]
    return _made_once(_cache_folder() / f"{source.stem}-{_fingerprint(source, command)}.o", command)


def _made_once(target: Path, command: list[str]) -> Path:
    """`target`, made by `command` if it is not there; test processes that run side by side wait for each other."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            fresh = target.with_suffix(".new")
            _run([*command, "-o", str(fresh)])
            os.replace(fresh, target)
    return target


def _cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"demp_kernels-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else")
    return folder


def _fingerprint(source: Path, command: list[str]) -> str:
    """A name that changes with the source, any header in reach, the command and the compiler."""
    digest = hashlib.sha256(repr((command, _compiler_version())).encode())
    headers = [*EMULATOR.glob("*.h"), *(ROOT / "csrc" / "common").glob("*"), *(ROOT / "csrc" / "ops" / "cuda").glob("*.cuh")]
    for path in sorted({*headers, source}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


@cache
def _compiler_version() -> str:
    return subprocess.run([*CXX, "--version"], capture_output=True, text=True, check=True).stdout


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
