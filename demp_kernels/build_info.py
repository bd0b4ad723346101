"""What was built, what is in use here, and why not the rest: `build_info()`, printed by `demp info`."""
from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from . import build_record, host
from .host import tune_allocator
from .ops import backend
from .version import __version__

__all__ = ["BuildInfo", "LibraryInfo", "build_info", "tune_allocator"]


@dataclass(frozen=True)
class LibraryInfo:
    """One compiled library of the package."""

    built: bool
    loaded: bool
    reason: str
    """Why it is not built or not loaded; empty when loaded."""

    def __str__(self) -> str:
        if self.loaded:
            return "loaded"
        # A failed compile keeps the compiler's words; the first lines name the file and the error.
        lines = self.reason.splitlines()[:4] or ["no reason is known"]
        return f"{'not loaded' if self.built else 'not built'}: " + ("\n" + " " * 16).join(lines)


@dataclass(frozen=True)
class BuildInfo:
    """Facts about this installation. `str()` of it is what `demp info` prints."""

    version: str
    python: str
    torch: str
    cuda: str | None
    """CUDA version of the installed torch; None in builds without CUDA."""
    threads: int
    simd_level: str
    cpu_features: dict[str, bool]
    backend: str
    """DEMP_BACKEND as it was followed."""
    devices: dict[str, str]
    """Which implementation serves each device type: native, triton or reference."""
    libraries: dict[str, LibraryInfo]
    compiler: str
    flags: str
    built_with_torch: str
    nvcc: str
    """The CUDA compiler that the build saw, or why it saw none."""
    triton: str
    """The installed Triton and whether its kernels are in use, or why not."""

    def __str__(self) -> str:
        features = " ".join(name for name, present in self.cpu_features.items() if present)
        rows = {
            "python": f"{self.python}, {platform.system()} {platform.machine()}",
            "torch": f"{self.torch}, {self.threads} threads" + ("" if self.cuda else ", without CUDA"),
            "simd": self.simd_level + (f" ({features})" if features else ""),
            "backend": f"{self.backend}: " + ", ".join(f"{device} {name}" for device, name in self.devices.items()),
            **{name: str(library) for name, library in self.libraries.items()},
            "compiler": self.compiler or "none when the package was built",
            "flags": self.flags or "-",
            "built with": f"torch {self.built_with_torch}" if self.built_with_torch else "no torch",
            "nvcc": self.nvcc or "-",
            "triton": self.triton,
        }
        return "\n".join([f"demp_kernels {self.version}", *(f"  {name:<12}{text}" for name, text in rows.items())])


def build_info() -> BuildInfo:
    """Which libraries were built and are usable here, and why not."""
    record = build_record.read()
    return BuildInfo(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        threads=torch.get_num_threads(),
        simd_level=host.simd_level(),
        cpu_features=host.cpu_features(),
        backend=backend.chosen,
        devices=_devices(),
        libraries={name: _library(name) for name in build_record.LIBRARIES},
        compiler=record.get("compiler", ""),
        flags=record.get("flags", ""),
        built_with_torch=record.get("torch", ""),
        nvcc=record.get("nvcc", ""),
        triton=_triton(),
    )


def _library(name: str) -> LibraryInfo:
    built = build_record.library_file(name) is not None
    if name == "_host":
        return LibraryInfo(built, not host.import_error, host.import_error)
    loaded = name in backend.loaded
    if loaded or built:
        return LibraryInfo(built, loaded, "" if loaded else backend.reasons.get(name, ""))
    return LibraryInfo(False, False, build_record.missing_reason(name))


def _devices() -> dict[str, str]:
    devices = {"cpu": "native" if "_C" in backend.loaded else "reference"}
    gpu = "native" if "_C_cuda" in backend.loaded else "triton" if "triton" in backend.loaded else "reference"
    if torch.cuda.is_available():  # NVIDIA, or AMD under ROCm
        devices["cuda"] = gpu
    if torch.xpu.is_available():
        devices["xpu"] = gpu
    return devices


def _triton() -> str:
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "not installed"
    return installed + ("" if "triton" in backend.loaded else f", not in use: {backend.reasons.get('triton', '')}")
