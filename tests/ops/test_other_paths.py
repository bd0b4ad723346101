"""The paths that this machine does not take by itself: narrower instruction sets, and the reference behind the public
functions. They are chosen once a process, so each runs its tests in a process of its own."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from demp_kernels.ops import backend

HERE = Path(__file__).resolve().parent
needs_kernels = pytest.mark.skipif("_C" not in backend.loaded, reason=f"no compiled kernels: {backend.reasons.get('_C')}")


@pytest.mark.parametrize(
    ("variable", "value", "tests"),
    [
        pytest.param("DEMP_SIMD", "avx2", "test_native_table.py", marks=needs_kernels),
        pytest.param("DEMP_SIMD", "portable", "test_native_table.py", marks=needs_kernels),
        ("DEMP_BACKEND", "reference", "test_activation.py"),
    ],
)
def test_passes_the_same_tests(variable: str, value: str, tests: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not compiles", str(HERE / tests)],
        env={**os.environ, variable: value}, cwd=HERE.parent.parent, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout
