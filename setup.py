"""Builds the package's three shared libraries; everything else is in pyproject.toml.

    _C       CPU kernels (csrc/ops/cpu) on the LibTorch stable ABI: needs no Python headers, and one file
             serves every Python and every torch from the oldest supported one on
    _C_cuda  CUDA kernels (csrc/ops/cuda), where nvcc and a CUDA torch are there. A library of its own,
             because one that needs libtorch_cuda cannot be loaded by a CPU build of torch
    _host    pybind11 module without torch: build and CPU facts, the noise's integer stream, the allocator

A library that cannot be built is left out and the package works without it; the reason is kept in
demp_kernels/_build_record.json, where `demp info` finds it. Environment:

    DEMP_REQUIRE_EXT=1     a library that should be there and cannot be built is an error
    DEMP_CUDA=0|1|auto     never build _C_cuda, insist on it, or build it where possible (default)
    DEMP_SANITIZE=WHAT     build _C and _host with -fsanitize=WHAT (address,undefined or thread), into --build-lib only
    DEMP_KERNELS=A,B       build these CPU kernels (activation, compact, ...) and nothing else, into --build-lib only
    TORCH_CUDA_ARCH_LIST   as in PyTorch; default 7.5;8.0;9.0;10.0+PTX (7.5;8.0;9.0+PTX before CUDA 12.8)
    CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, NVCC_FLAGS, MAX_JOBS   as usual
"""
from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import native  # noqa: E402
import toolchain  # noqa: E402
from toolchain import Unavailable  # noqa: E402

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
KERNELS = list(filter(None, os.environ.get("DEMP_KERNELS", "").split(",")))
SANITIZE = os.environ.get("DEMP_SANITIZE", "")
# -O1 and lines for readable reports; going on after one, so that a run tells all of them.
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fsanitize-recover=all", "-O1", "-g", "-fno-omit-frame-pointer"] if SANITIZE else []
# -z defs: a symbol that nobody provides is an error here, not on the user's first import.
LINK_FLAGS = ["-Wl,-z,defs", "-Wl,--as-needed"]
TORCH_FLAGS = [f"-DTORCH_TARGET_VERSION={toolchain.TORCH_TARGET_VERSION}"]
RECORD = "_build_record.json"
HOST_FILE = "_host" + sysconfig.get_config_var("EXT_SUFFIX")


def cpu_library(torch: toolchain.Torch) -> native.Library:
    sources = sorted((ROOT / "csrc" / "ops" / "cpu").glob("*.cpp"))
    sources = [path for path in sources if not KERNELS or path.stem.removesuffix("_kernel") in KERNELS]
    if not sources:
        raise Unavailable("no sources in csrc/ops/cpu")
    cxx = toolchain.require_cxx()
    return native.Library(
        name="_C",
        filename="_C.so",
        sources=sources,
        # -isystem: warnings in torch's headers are not ours to mend.
        compile=[
            *(*cxx, *CXX_FLAGS, *TORCH_FLAGS, *SANITIZE_FLAGS, f"-I{ROOT / 'csrc'}", "-isystem", str(torch.include)),
            *_flags("CXXFLAGS"),
        ],
        link=[*cxx, *LINK_FLAGS, *SANITIZE_FLAGS],
        link_after=[f"-L{torch.lib}", "-ltorch_cpu", *_flags("LDFLAGS")],
    )


def cuda_library(torch: toolchain.Torch) -> native.Library:
    wish = os.environ.get("DEMP_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"DEMP_CUDA: expected 0, 1 or auto, got {wish!r}")
    if wish == "0":
        raise Unavailable("switched off by DEMP_CUDA=0")
    if SANITIZE or KERNELS:
        raise Unavailable("left out by DEMP_SANITIZE or DEMP_KERNELS")
    sources = sorted((ROOT / "csrc" / "ops" / "cuda").glob("*.cu"))
    if not sources:
        raise Unavailable("no sources in csrc/ops/cuda")
    nvcc = toolchain.find_nvcc(torch)
    cxx = toolchain.require_cxx()
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or toolchain.default_cuda_architectures(nvcc)
    return native.Library(
        name="_C_cuda",
        filename="_C_cuda.so",
        sources=sources,
        compile=[
            *(str(nvcc.path), "-std=c++17", "-O3", "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
            *(["-ccbin", cxx[0]] if len(cxx) == 1 else []),
            *toolchain.cuda_architecture_flags(architectures),
            *(*TORCH_FLAGS, f"-I{ROOT / 'csrc'}", "-isystem", str(torch.include), *_flags("NVCC_FLAGS")),
        ],
        link=[*cxx, *LINK_FLAGS],
        link_after=[
            *(f"-L{torch.lib}", "-ltorch_cpu", "-ltorch_cuda"),
            *(f"-L{nvcc.home / 'lib64'}", "-lcudart", *_flags("LDFLAGS")),
        ],
    )


def host_library(torch: toolchain.Torch | None) -> native.Library:
    if KERNELS:
        raise Unavailable("left out by DEMP_KERNELS")
    cxx = toolchain.require_cxx()
    includes = [toolchain.find_pybind11(torch), sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    return native.Library(
        name="_host",
        filename=HOST_FILE,
        sources=[ROOT / "csrc" / "module.cpp", ROOT / "csrc" / "host.cpp"],
        compile=[
            *(*cxx, *CXX_FLAGS, f"-I{ROOT / 'csrc'}"),
            *(word for folder in dict.fromkeys(includes) for word in ("-isystem", str(folder))),
            *(*SANITIZE_FLAGS, *_flags("CXXFLAGS")),
        ],
        link=[*cxx, "-Wl,--as-needed", *SANITIZE_FLAGS],  # without -z defs: Python's own symbols come from the interpreter
        link_after=_flags("LDFLAGS"),
    )


def _flags(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


LIBRARIES = {"_C": cpu_library, "_C_cuda": cuda_library, "_host": host_library}


def build_all(scratch: Path) -> tuple[dict[str, Path], dict[str, object]]:
    """Build what can be built: the files by library, and the record of it."""
    try:
        torch, no_torch = toolchain.find_torch(), ""
    except Unavailable as reason:
        torch, no_torch = None, str(reason)
    scratch = scratch / f"{sys.implementation.cache_tag}-torch{torch.version if torch else 'none'}" / SANITIZE
    scratch.mkdir(parents=True, exist_ok=True)
    plans: list[native.Library] = []
    outcomes: dict[str, Path | Unavailable] = {}
    for name, plan in LIBRARIES.items():
        try:
            if torch is None and name != "_host":
                raise Unavailable(no_torch)
            plans.append(plan(torch))
        except Unavailable as reason:
            outcomes[name] = reason
    with open(scratch / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two installs of one source tree take turns
        outcomes |= native.build(plans, ROOT, scratch)
    files = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Path)}
    libraries = {
        name: {"built": name in files, "reason": "" if name in files else str(outcomes[name])} for name in LIBRARIES
    }
    cxx = toolchain.find_cxx()
    record: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.version if torch else "",
        "compiler": toolchain.describe_compiler(cxx) if cxx else "",
        "flags": " ".join([*CXX_FLAGS, *SANITIZE_FLAGS, *_flags("CXXFLAGS")]),
        "nvcc": _describe_nvcc(torch),
        "libraries": libraries,
    }
    return files, record


def _describe_nvcc(torch: toolchain.Torch | None) -> str:
    if torch is None:
        return ""
    try:
        nvcc = toolchain.find_nvcc(torch)
    except Unavailable as reason:
        return str(reason)
    return f"{nvcc.version} at {nvcc.path}"


def check_required(libraries: dict[str, dict[str, object]]) -> None:
    """Stop where the environment insists on a library that was not built, warn otherwise."""
    missing = {name: facts["reason"] for name, facts in libraries.items() if not facts["built"]}
    required = {"_C", *([] if KERNELS else ["_host"])} if os.environ.get("DEMP_REQUIRE_EXT", "0") not in ("", "0") else set()
    if os.environ.get("DEMP_CUDA") == "1":
        required.add("_C_cuda")
    for name, reason in missing.items():
        print(f"demp_kernels: {name} was not built: {reason}", file=sys.stderr, flush=True)
    if required & missing.keys():
        raise SystemExit(f"demp_kernels: required but not built: {', '.join(sorted(required & missing.keys()))}")


class BuildLibraries(build_ext):
    """`build_ext` that builds the three libraries and writes the record beside them."""

    def run(self) -> None:
        if self.inplace and (SANITIZE or KERNELS):
            raise SystemExit("DEMP_SANITIZE, DEMP_KERNELS: such a build must go into a folder of its own (--build-lib), not --inplace")
        files, record = build_all(ROOT / "build" / "native")
        check_required(record["libraries"])
        package = (ROOT if self.inplace else Path(self.build_lib)) / "demp_kernels"
        package.mkdir(parents=True, exist_ok=True)
        # A library of an earlier build would be loaded with kernels that no longer fit the Python code.
        for name in {"_C.so", "_C_cuda.so", HOST_FILE} - {path.name for path in files.values()}:
            (package / name).unlink(missing_ok=True)
        self._written = [package / RECORD]
        self._written[0].write_text(json.dumps(record, indent=2) + "\n")
        for path in files.values():
            fresh = package / (path.name + ".new")
            shutil.copy2(path, fresh)
            os.replace(fresh, package / path.name)
            self._written.append(package / path.name)

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(path) for path in getattr(self, "_written", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # A name for setuptools to see that the wheel is tied to a platform; BuildLibraries knows the sources.
    ext_modules=[Extension("demp_kernels._host", sources=[])],
    cmdclass={"build_ext": BuildLibraries},
)
