"""One kernel built with sanitizers: mistakes that are planted are found, and its tests give no report. The long form, all
kernels on all instruction sets, is `demp selfcheck`'s. DEMP_SANITIZERS="address,undefined thread" runs both here too, half a
minute of processor time each."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from demp_kernels.ops import backend
from demp_kernels.selfcheck import sanitizers

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    "_C" not in backend.loaded or shutil.which("g++") is None, reason="needs g++, and a torch that kernels can be built for"
)


@pytest.mark.parametrize("sanitizer", os.environ.get("DEMP_SANITIZERS", "address,undefined").split())
def test_a_kernel_under_a_sanitizer(sanitizer: str) -> None:
    figures = sanitizers.run_sanitizer(
        sanitizer, kernels=["weight_noise"], tests=["tests/ops/test_weight_noise.py"], levels=["portable"], source=ROOT
    )
    assert not figures.reports and not figures.failures, str(figures)
    assert figures.found == figures.planted == len(sanitizer.split(",")) and figures.passed >= 10


def test_reports_are_read_off_the_output() -> None:
    """What each sanitizer writes, as its documentation has it; a line of another kind is none."""
    lines = [
        "==1==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x1",
        "WARNING: ThreadSanitizer: data race (pid=1)",
        "csrc/a.cpp:3:5: runtime error: signed integer overflow",
    ]
    assert len(sanitizers.REPORT.findall("\n".join([*lines, "RuntimeError: relu"]))) == len(lines)


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sanitizer must be one of address,undefined and thread, got memory"):
        sanitizers.run_sanitizer("memory")
    with pytest.raises(RuntimeError, match="needs? the source tree"):
        sanitizers.run_sanitizer("thread", source=tmp_path)


def test_a_sanitized_build_never_replaces_the_installed_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "DEMP_SANITIZE": "thread"},
    )
    assert done.returncode != 0 and "must go into a folder of its own" in done.stderr
