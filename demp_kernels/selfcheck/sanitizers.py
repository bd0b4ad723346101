"""The CPU kernels and the host module, built with a sanitizer into a folder of their own, under the tests of the ops.

    AddressSanitizer    reads and writes outside of allocations, of freed memory
    UBSan               overflows of signed integers, misaligned pointers, shifts and conversions out of range, null
    ThreadSanitizer     two threads at one address without an order between them

Needs the source tree, g++ with its sanitizers, and pytest. A run proves nothing if the sanitizer sees nothing, so each
first has to find mistakes that are planted in the arguments of a call: a tensor longer than its memory, a seed at an odd
address, a list that names a tensor twice.

Not seen: torch itself and the CUDA libraries, which are not built for it; leaks (Python frees little at its end); memory that
is read before it is written (that would take clang, and all of Python and torch built for it); reads and writes through
intrinsics that compilers do not follow: in the AVX2 and AVX-512 loops the conversion of float16 and stores past the
caches. The portable loops have none of these, and the arithmetic of addresses is the same. ThreadSanitizer runs the
shares on std::thread instead of torch's OpenMP, whose barriers it cannot see, and what torch itself does is left out.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from .. import build_record
from ..host import simd_level

__all__ = ["SANITIZERS", "SanitizerFigures", "run_sanitizer"]

SANITIZERS = ("address,undefined", "thread")
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
REPORT = re.compile(r"ERROR: AddressSanitizer.*|WARNING: ThreadSanitizer.*|.*runtime error: .*")
TESTS = (
    "tests/ops/test_activation.py", "tests/ops/test_channel_select.py", "tests/ops/test_compact.py", "tests/ops/test_determinism.py",
    "tests/ops/test_native_table.py", "tests/ops/test_norm_act.py", "tests/ops/test_philox.py",
    "tests/ops/test_random_inputs.py", "tests/ops/test_weight_noise.py", "tests/test_modules.py",
)
SUPPRESSIONS = "suppressions.txt"
UNSEEN = ("libtorch_cpu.so", "libtorch_python.so", "libgomp.so")
"""Libraries with threads of their own that ThreadSanitizer knows only by their calls of memcpy: without the order among them."""
LEVELS = ("portable", "avx2", "avx512")
PLANTED = {"address": r"AddressSanitizer", "undefined": r"runtime error: .*misaligned", "thread": r"ThreadSanitizer: data race"}
"""Sanitizer -> what it has to say to the mistake of its name in `MISTAKES`."""
MISTAKES = """
import ctypes, sys
import torch
import demp_kernels
from demp_kernels import functional

print("package", demp_kernels.__file__, demp_kernels.build_info().libraries["_C"].loaded, file=sys.stderr, flush=True)
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

def tensor(shape, dtype, missing=0, offset=0):
    # over memory that ends `missing` bytes too early and begins at `offset`
    like = torch.empty(shape, dtype=dtype)
    size = like.numel() * like.element_size()
    address = malloc(size - missing + offset) + offset
    storage = torch._C._construct_storage_from_data_pointer(address, torch.device("cpu"), size)
    return torch.empty(0, dtype=dtype).set_(storage, 0, like.shape, like.stride())

for name in sys.argv[1:]:
    print("planted", name, file=sys.stderr, flush=True)
    if name == "address":
        functional.weight_noise_([tensor((64, 16), torch.float32, missing=4)], 0.1, seed=1)
    if name == "undefined":
        functional.weight_noise_([torch.zeros(4, 4)], 0.1, seed=tensor((1,), torch.int64, offset=1).zero_())
    if name == "thread":
        weight = torch.zeros(512, 512)
        functional.weight_noise_([weight, weight], 0.1, seed=1)
"""
START = "import sys, demp_kernels, pytest; sys.exit(pytest.main(sys.argv[1:]))"
"""The package is imported before pytest puts the source tree on the path."""


@dataclass
class SanitizerFigures:
    """passed: tests, over all instruction sets. found: planted mistakes reported, of `planted`. reports: the others, which
    should be none. failures: tests that failed, and planted mistakes that went by."""

    sanitizer: str
    levels: tuple[str, ...] = ()
    passed: int = 0
    planted: int = 0
    found: int = 0
    reports: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = (
            f"{self.sanitizer}: {self.passed} tests passed on {', '.join(self.levels)}, {len(self.reports)} reports, "
            f"{self.found} of {self.planted} planted mistakes found"
        )
        return "\n".join([head, *self.reports, *self.failures])


def run_sanitizer(
    sanitizer: str,
    *,
    tests: Sequence[str] = TESTS,
    levels: Sequence[str] | None = None,
    kernels: Sequence[str] | None = None,
    source: Path = build_record.PACKAGE.parent,
    say: Callable[[str], None] = lambda text: None,
) -> SanitizerFigures:
    """Build with `sanitizer` and run the tests, once for every instruction set. Minutes: the build takes two with
    address,undefined on two cores and half a minute with thread, and the tests run several times slower.

    Args:
        sanitizer: one of `SANITIZERS`.
        tests: files under `source`. levels: of LEVELS; default: those that this machine has.
        kernels: build these alone (the reference does the work of the others); default: all.
        source: the source tree. say: told how it goes.

    Raises ValueError for an unknown sanitizer; RuntimeError without source tree or runtime, or if it does not build.
    """
    if sanitizer not in SANITIZERS:
        raise ValueError(f"sanitizer must be one of {' and '.join(SANITIZERS)}, got {sanitizer}")
    if not (source / "setup.py").is_file():
        raise RuntimeError(f"sanitizers need the source tree, and {source} has no setup.py")
    runtimes = [_runtime(name) for name in sanitizer.split(",")]
    figures = SanitizerFigures(sanitizer, tuple(_levels() if levels is None else levels))
    with tempfile.TemporaryDirectory() as folder:
        say(f"{sanitizer}: building")
        _build(sanitizer, kernels, source, Path(folder))
        (Path(folder) / SUPPRESSIONS).write_text("".join(f"called_from_lib:{library}\n" for library in UNSEEN))
        for level in figures.levels:
            environment = _environment(runtimes, level, Path(folder))
            _find_planted(figures, level, environment, Path(folder))
            _test(figures, level, environment, Path(folder), source, tests)
            say(str(figures))
    return figures


def _levels() -> tuple[str, ...]:
    widest = simd_level()
    return LEVELS[: LEVELS.index(widest) + 1] if widest in LEVELS else LEVELS[:1]


def _runtime(name: str) -> str:
    """The library that has to be there before Python. Raises RuntimeError if the compiler has none."""
    compiler = os.environ.get("CXX", "").split() or ["g++"]
    try:
        found = subprocess.run([*compiler, f"-print-file-name={RUNTIMES[name]}"], capture_output=True, text=True).stdout.strip()
    except OSError as error:
        raise RuntimeError(f"{compiler[0]}: {error.strerror}") from error
    if not os.path.isabs(found):
        raise RuntimeError(f"{compiler[0]} has no {RUNTIMES[name]}")
    return found


def _build(sanitizer: str, kernels: Sequence[str] | None, source: Path, folder: Path) -> None:
    """The package in `folder`, with libraries of its own."""
    ignored = shutil.ignore_patterns("*.so", "_build_record.json", "__pycache__")
    shutil.copytree(source / "demp_kernels", folder / "demp_kernels", ignore=ignored)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)], cwd=source, capture_output=True, text=True,
        env={
            **os.environ, "DEMP_SANITIZE": sanitizer, "DEMP_KERNELS": ",".join(kernels or ()), "DEMP_CUDA": "0",
            "DEMP_REQUIRE_EXT": "1",
        },
    )
    if done.returncode != 0:
        raise RuntimeError(f"{sanitizer}: it does not build: {(done.stdout + done.stderr).strip()[-2000:]}")


def _environment(runtimes: list[str], level: str, folder: Path) -> dict[str, str]:
    return {
        **os.environ, "LD_PRELOAD": " ".join(runtimes), "PYTHONPATH": str(folder), "DEMP_SIMD": level, "DEMP_BACKEND": "native",
        "OMP_NUM_THREADS": "1" if "libtsan" in runtimes[0] else "4",  # ThreadSanitizer's build has threads of its own
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:halt_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": f"exitcode=0:report_mutex_bugs=0:suppressions={folder / SUPPRESSIONS}",
    }


def _find_planted(figures: SanitizerFigures, level: str, environment: dict[str, str], folder: Path) -> None:
    names = figures.sanitizer.split(",")
    done = subprocess.run(
        [sys.executable, "-c", MISTAKES, *names], env=environment, cwd=folder, capture_output=True, text=True, errors="replace",
    )
    start, *said = done.stderr.split("planted ")
    if f"package {folder / 'demp_kernels' / '__init__.py'} True" not in start or len(said) != len(names):
        raise RuntimeError(f"{figures.sanitizer}, {level}: the package does not run: {done.stderr.strip()[-2000:]}")
    figures.planted += len(names)
    for name, text in zip(names, said):
        if re.search(PLANTED[name], text):
            figures.found += 1
        else:
            figures.failures.append(f"{level}: the mistake planted for {name} was not found")


def _test(
    figures: SanitizerFigures, level: str, environment: dict[str, str], folder: Path, source: Path, tests: Sequence[str]
) -> None:
    result, output = folder / "result.xml", folder / "output.txt"
    result.unlink(missing_ok=True)
    helpers = " ".join(str(path) for path in sorted((source / "tests").iterdir()) if path.is_dir())
    with output.open("w") as file:
        # -s: what a sanitizer writes while a test runs must not end in pytest's own hands. Compiling tests start a compiler
        # that has nothing to do with these libraries.
        subprocess.run(
            [
                *(sys.executable, "-c", START, "-q", "-s", "-p", "no:cacheprovider", "-k", "not compile"),
                *("-c", str(source / "pyproject.toml"), "--rootdir", str(source), "-o", f"pythonpath={helpers}"),
                *("--junitxml", str(result), *(str(source / test) for test in tests if (source / test).is_file())),
            ],
            env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT,
        )
    said = output.read_text(errors="replace")
    figures.reports += [f"{level}: {line}" for line in REPORT.findall(said)]
    if not result.is_file():
        figures.failures.append(f"{level}: the tests ended early: {said.strip()[-1000:]}")
        return
    for case in ElementTree.parse(result).iter("testcase"):
        outcomes = {child.tag for child in case} & {"failure", "error", "skipped"}
        if not outcomes:
            figures.passed += 1
        elif outcomes != {"skipped"}:
            figures.failures.append(f"{level}: {case.get('classname')}.{case.get('name')} failed")
