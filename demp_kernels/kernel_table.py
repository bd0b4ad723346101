"""Static facts about the compiled CUDA kernels, read from the library itself: `demp info --kernels`.

    print(format_table(kernel_table()))

Needs `cuobjdump`: of the CUDA toolkit, or the one inside Triton's wheel. No GPU is asked.
"""
from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .sass import HotLoops, widest

THREADS = 256
"""Threads of a block, of every kernel here."""
_SIZES = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}
_SHORT = {"float": "float32", "double": "float64", "__half": "float16", "__nv_bfloat16": "bfloat16"}
_TYPE = {"f": "float", "d": "double", "6__half": "__half", "13__nv_bfloat16": "__nv_bfloat16"}
_NOISE = ("no noise", "noise down", "noise across", "noise single")
_KIND = ("linear", "smooth")
_NORM_ACT_STEP = {"Statistics": "statistics", "Normalise": "normalise", "GradientSums": "sums", "Input": "input"}
_NORM_ACT_READS_AND_WRITES = {"Statistics": 1, "Normalise": 2, "GradientSums": 2, "Input": 3}
"""Elements moved for one of x, where no residual is added."""


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    name: str
    """As in the source, with its variant: "activation_rows float32 linear, noise down"."""
    element: str
    architecture: str
    registers: int
    shared: int
    """Bytes of static shared memory a block."""
    local: int
    """Bytes of local memory a thread: spills, or arrays indexed at run time."""
    load: int
    """Bytes of the widest load and store from global memory."""
    store: int
    loops: HotLoops
    """What the smallest loops that hold the widest loads are made of."""
    bytes_an_element: float | None
    """Moved by the kernel's definition, where it is a number: each input read once, each output written once."""

    @property
    def occupancy(self) -> float:
        """Resident threads by registers and threads alone, of the 2048 a multiprocessor has (8.0, 9.0, 10.0)."""
        a_warp = -(-self.registers * 32 // 256) * 256
        return min(65536 // (a_warp * THREADS // 32), 2048 // THREADS) * THREADS / 2048


def kernel_table(library: Path | None = None, architecture: str | None = None) -> list[Kernel]:
    """The kernels in `library` (default: the installed _C_cuda), of one architecture ("sm_90") or all.

    Raises FileNotFoundError, saying what is missing, without the library or cuobjdump.
    """
    library = library or _installed_library()
    tool = find_cuobjdump()
    resources = _resources(_run([tool, "-res-usage", str(library)]))
    architectures = sorted({found for found, _ in resources}) if architecture is None else [architecture]
    table = []
    for arch in architectures:
        for function, code in _functions(_run([tool, "-sass", "-arch", arch, str(library)])):
            described = describe(function)
            if described is not None and (arch, function) in resources:
                registers, shared, local = resources[arch, function]
                name, element, moved = described
                load, store = widest(code, "LDG"), widest(code, "STG")
                table.append(Kernel(name, element, arch, registers, shared, local, load, store, HotLoops.of(code), moved))
    return sorted(table, key=lambda kernel: (kernel.architecture, kernel.name, kernel.element))


def format_table(table: list[Kernel]) -> str:
    """As text, a line a kernel. instr/byte and mix are those of the hot loops, see `sass.HotLoops`."""
    head = ("kernel", "element", "arch", "registers", "shared", "local", "load", "store", "bytes/element", "occupancy", "instr/byte", "mix")
    rows = [
        (
            kernel.name, kernel.element, kernel.architecture, str(kernel.registers), str(kernel.shared), str(kernel.local),
            str(kernel.load), str(kernel.store), "-" if kernel.bytes_an_element is None else f"{kernel.bytes_an_element:g}",
            f"{kernel.occupancy:.0%}", "-" if kernel.loops.instructions_a_byte is None else f"{kernel.loops.instructions_a_byte:.1f}",
            " ".join(f"{name} {share:.0%}" for name, share in kernel.loops.shares.items()),
        )
        for kernel in table
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows])


def find_cuobjdump() -> str:
    """The tool's path. Raises FileNotFoundError without one."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    candidates = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates.append(Path("/usr/local/cuda/bin"))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in candidates:
        if os.access(folder / "cuobjdump", os.X_OK):
            return str(folder / "cuobjdump")
    raise FileNotFoundError("cuobjdump: neither on PATH nor in CUDA_HOME, /usr/local/cuda or Triton's wheel")


def _installed_library() -> Path:
    library = Path(__file__).resolve().parent / "_C_cuda.so"
    if not library.exists():
        raise FileNotFoundError("_C_cuda was not built; `demp info` says why")
    return library


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(listing: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(architecture, mangled name) -> registers, shared bytes, local bytes."""
    found: dict[tuple[str, str], tuple[int, int, int]] = {}
    arch = function = ""
    for line in listing.splitlines():
        if match := re.match(r"arch = (sm_\d+\w?)", line.strip()):
            arch = match.group(1)
        elif match := re.match(r"Function (\w+):", line.strip()):
            function = match.group(1)
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found[arch, function] = (registers, shared, stack + local)
    return found


def _functions(listing: str) -> list[tuple[str, list[str]]]:
    """Mangled names and their instructions."""
    found: list[tuple[str, list[str]]] = []
    for line in listing.splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            found.append((match.group(1), []))
        elif found and re.match(r"\s*/\*[0-9a-f]{4,}\*/\s", line):
            found[-1][1].append(line)
    return found


def describe(mangled: str) -> tuple[str, str, float | None] | None:
    """Name with variant, element type and bytes an element of a kernel of ours, from its mangled name."""
    if "compact_rows_and_columns" in mangled:
        capacity = re.search(r"ILi(\d+)E", mangled)
        return f"compact, {capacity.group(1)} tensors" if capacity else "compact", "any", None
    types = "|".join(_TYPE)
    if match := re.search(rf"weight_noise_rowsI({types})Li(\d+)E", mangled):
        element = _TYPE[match.group(1)]
        return f"weight_noise, {match.group(2)} tensors", _SHORT[element], 2.0 * _SIZES[element]
    passes = "|".join(_NORM_ACT_STEP)
    if match := re.search(rf"norm_act_(planes|rows)I\w*?({passes})I({types})(?:LNS_4KindE(\d)E)?EELi(\d)E", mangled):
        layout, step, element, group = match.group(1), match.group(2), _TYPE[match.group(3)], int(match.group(5))
        variant = "single elements" if group == 1 else _KIND[int(match.group(4))] if match.group(4) else "words"
        moved: float = _NORM_ACT_READS_AND_WRITES[step] * _SIZES[element]
        return f"norm_act_{layout} {_NORM_ACT_STEP[step]}, {variant}", _SHORT[element], moved
    if match := re.search(rf"norm_act_(moments|gradients|bits)I({types})E", mangled):
        return f"norm_act_{match.group(1)}", _SHORT[_TYPE[match.group(2)]], None
    if match := re.search(rf"activation_backwardI({types})LNS_4KindE(\d)ELb(\d)E", mangled):
        element, kind, bits = _TYPE[match.group(1)], int(match.group(2)), match.group(3) == "1"
        moved = 2 * _SIZES[element] + (1 / 8 if bits else _SIZES[element])
        return f"activation_backward {_KIND[kind]}{', bits' if bits else ''}", _SHORT[element], moved
    if match := re.search(rf"activation_(planes|rows)I({types})LNS_4KindE(\d)ELNS\w_5NoiseE(\d)E", mangled):
        element, kind, noise = _TYPE[match.group(2)], int(match.group(3)), int(match.group(4))
        moved = 2 * _SIZES[element] + (1 / 8 if noise and kind == 0 else 0)
        return f"activation_{match.group(1)} {_KIND[kind]}, {_NOISE[noise]}", _SHORT[element], moved
    return None
