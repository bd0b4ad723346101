"""Runs the table of cases (tests/cuda/op_table.py) through the Triton kernels under Triton's interpreter, in a process of
its own, because Triton decides when it is imported."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_rows_too_long_to_index_are_refused() -> None:
    pytest.importorskip("triton")
    from demp_kernels.ops.triton.compact import check_rows

    with pytest.raises(ValueError, match=r"sources\[0\] has rows too long to index, got shape \(2, 3\)"):
        check_rows("compact: sources[0]", torch.empty(2, 3), 1 << 30)
