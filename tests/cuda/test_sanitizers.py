"""The emulated kernels once under AddressSanitizer and UBSan, in a process of their own that has them preloaded."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import CXX

HERE = Path(__file__).resolve().parent
START = """
import sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
import emulated
"""
MISTAKE = START + """
from test_emulator import LOAD_PAST_END
sample = emulated.Emulator(emulated.build([emulated.EMULATOR / "sample_kernels.cpp"], "sanitizers"))
x, total, positive = torch.ones(200), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
sample.call("sample_sum_and_count", x, 200, total, positive, LOAD_PAST_END)
print("done")
"""
TABLE = START + """
import emulated_ops
import norm_act_table
import op_table
emulated_ops.guarded = emulated.tight
ops = emulated_ops.EmulatedOps.load("sanitizers")
ops.watch, ops.long_list = False, 20
for offset in (0, 1):
    ops.offset = offset
    for case in ("planes", "7x7", "4x4", "channels last", "channels last, 13", "one element", "empty"):
        for activation, noise in (("relu", 0.0), ("leaky_relu", 0.5), ("silu", 0.5)):
            for dtype in (torch.float32, torch.bfloat16):
                x, channel_dim = op_table.sample(ops, case, dtype)
                op_table.check_activation(ops, x, channel_dim, activation, noise)
    for case in ("planes", "14x14", "7x7", "channels last", "channels last, 13", "empty"):
        for activation, noise, dtype in (("relu", 0.0, torch.float32), ("silu", 0.5, torch.float32), ("relu", 0.0, torch.bfloat16)):
            norm_act_table.check_norm_act(ops, *norm_act_table.sample(ops, case, dtype, True), activation, noise)
    op_table.test_weight_noise(ops, True)
    op_table.test_compact(ops)
print("done")
"""


def _runtime(name: str) -> str:
    found = subprocess.run([*CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{CXX[0]} has no {name}")
    return found


def _run(program: str) -> subprocess.CompletedProcess[str]:
    preload = [_runtime("libasan.so"), _runtime("libubsan.so")]
    environment = dict(
        os.environ, LD_PRELOAD=" ".join(preload), DEMP_BACKEND="reference", OMP_NUM_THREADS="1",
        # Python frees little at exit, and torch's libraries are not instrumented.
        ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0", UBSAN_OPTIONS="print_stacktrace=1",
    )  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", program.format(here=str(HERE))],
        env=environment, capture_output=True, text=True, timeout=600, cwd=HERE.parents[1],
    )  # fmt: skip


def test_kernels_under_sanitizers() -> None:
    done = _run(TABLE)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stdout[-1000:] + done.stderr[-4000:]


def test_a_load_past_the_end_is_found() -> None:
    done = _run(MISTAKE)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stdout[-1000:] + done.stderr[-4000:]
