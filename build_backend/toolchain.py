"""Finds what a build needs: the C++ compiler, torch's headers and libraries, nvcc.

Nothing here imports torch (seconds, and it may lack dependencies at build time) or runs on import.
"""
from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from glob import glob
from pathlib import Path

OLDEST_TORCH = (2, 11)
# The same version as TORCH_TARGET_VERSION wants it: major, minor, patch, one byte each from the top.
TORCH_TARGET_VERSION = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000ULL"


class Unavailable(Exception):
    """Something a library needs is not there; the text is the reason that users read."""


@dataclass(frozen=True)
class Torch:
    version: str
    cuda: str | None  # of the CUDA toolkit torch was built with, None in CPU builds
    include: Path
    lib: Path


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: str
    home: Path


def release_of(version: str) -> tuple[int, int]:
    """The first two numbers of a version: `"2.14.1+cu130"` -> `(2, 14)`."""
    numbers = [int(n) for n in re.findall(r"\d+", version.split("+")[0])[:2]]
    return (numbers + [0, 0])[0], (numbers + [0, 0])[1]


def find_cxx() -> list[str] | None:
    """The C++ compiler as a command: `$CXX`, which may carry arguments ("ccache g++"), or one on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def require_cxx() -> list[str]:
    command = find_cxx()
    if command is None:
        named = os.environ.get("CXX")
        raise Unavailable(f"CXX={named} cannot be run" if named else "no C++ compiler (c++, g++, clang++) on PATH")
    return command


def describe_compiler(command: list[str]) -> str:
    """The first line of `--version`, for the build record."""
    try:
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return " ".join(command)
    return (shown.splitlines() or [" ".join(command)])[0]


def find_torch() -> Torch:
    """The torch that this interpreter would import. Raises Unavailable without one, or if it is too old."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("torch was not installed when the package was built")
    root = Path(spec.origin).parent
    facts = runpy.run_path(str(root / "version.py"))
    version = str(facts["__version__"])
    if release_of(version) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        raise Unavailable(f"needs the headers of torch >= {wanted}, the build saw torch {version}")
    return Torch(version, facts.get("cuda"), root / "include", root / "lib")


def find_nvcc(torch: Torch) -> Nvcc:
    """The newest usable nvcc. Raises Unavailable if CUDA is switched off, missing, or of another major version.

    An nvcc on PATH may be a wrapper outside its toolkit, so a candidate counts only if the toolkit's
    headers lie beside it.
    """
    if torch.cuda is None:
        raise Unavailable(f"torch {torch.version} is a build without CUDA")
    candidates = [os.path.join(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(os.path.realpath(on_path))
    candidates += ["/usr/local/cuda/bin/nvcc", *sorted(glob("/usr/local/cuda-*/bin/nvcc"), reverse=True)]
    seen = []
    for candidate in candidates:
        home = Path(candidate).resolve().parent.parent
        if not (home / "include" / "cuda_runtime.h").is_file() or not os.access(candidate, os.X_OK):
            continue
        version = _nvcc_version(Path(candidate))
        if version and release_of(version)[0] == release_of(torch.cuda)[0]:
            return Nvcc(Path(candidate).resolve(), version, home)
        seen.append(f"{candidate} is CUDA {version}")
    if seen:
        raise Unavailable(f"torch {torch.version} needs CUDA {release_of(torch.cuda)[0]}, but " + ", ".join(dict.fromkeys(seen)))
    raise Unavailable("no CUDA toolkit: nvcc is neither on PATH nor in CUDA_HOME or /usr/local/cuda*")


def _nvcc_version(path: Path) -> str | None:
    try:
        shown = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+\.\d+)", shown)
    return found.group(1) if found else None


def default_cuda_architectures(nvcc: Nvcc) -> str:
    """GPUs from sm_75 (T4, RTX 20) on, which are all that CUDA 13 knows, by machine code or, the newest, by PTX. nvcc knows 10.0 from
    12.8 on."""
    return "7.5;8.0;9.0;10.0+PTX" if release_of(nvcc.version) >= (12, 8) else "7.5;8.0;9.0+PTX"


def cuda_architecture_flags(listed: str) -> list[str]:
    """`"8.0;9.0+PTX"` -> the `-gencode` flags for those. Raises Unavailable on anything else."""
    flags = []
    for entry in re.split(r"[;,\s]+", listed.strip()):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if not found:
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 10.0+PTX, got {entry!r}")
        number = found.group(1) + found.group(2) + found.group(3)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_pybind11(torch: Torch | None) -> Path:
    """The folder that holds `pybind11/pybind11.h`: of the pybind11 package, or the copy that torch ships."""
    spec = importlib.util.find_spec("pybind11")
    folders = [Path(spec.origin).parent / "include"] if spec and spec.origin else []
    if torch:
        folders.append(torch.include)
    for folder in folders:
        if (folder / "pybind11" / "pybind11.h").is_file():
            return folder
    raise Unavailable("no pybind11 headers: neither the package nor a torch that ships them was there")
