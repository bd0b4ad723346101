"""Runs the table of cases (tests/cuda/op_table.py) through the Triton kernels under Triton's interpreter, in a process of
its own, because Triton decides when it is imported."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def test_table_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = dict(os.environ, TRITON_INTERPRET="1", DEMP_BACKEND="reference")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted")],
        env=environment, capture_output=True, text=True, timeout=600, cwd=HERE.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
