"""What the built CUDA library says about its kernels without a device: `demp_kernels.kernel_table`."""
from __future__ import annotations

from pathlib import Path

import pytest

import demp_kernels
from demp_kernels import kernel_table, sass
from demp_kernels.kernel_table import Kernel
from demp_kernels.sass import HotLoops

LIBRARY = Path(demp_kernels.__file__).resolve().parent / "_C_cuda.so"


@pytest.fixture(scope="module")
def table() -> list[Kernel]:
    if not LIBRARY.exists():
        pytest.skip("_C_cuda was not built here (no nvcc, or a torch without CUDA); `demp info` says why")
    try:
        return kernel_table.kernel_table(LIBRARY)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


def test_every_kernel_is_there(table: list[Kernel]) -> None:
    names = {kernel.name.split()[0].rstrip(",") for kernel in table}
    assert names == {
        "activation_planes", "activation_rows", "activation_backward", "weight_noise", "compact", "norm_act_planes",
        "norm_act_rows", "norm_act_moments", "norm_act_gradients", "norm_act_bits",
    }  # fmt: skip
    for element in ("float32", "bfloat16", "float16"):
        assert {kernel.name.split()[0] for kernel in table if kernel.element == element} >= {"activation_planes", "activation_rows"}


def test_no_local_memory(table: list[Kernel]) -> None:
    """No spills, and no arrays indexed at run time."""
    assert [kernel for kernel in table if kernel.local] == []


def test_words_of_16_bytes(table: list[Kernel]) -> None:
    """float64 takes the way of single elements, except in lists; so do other types in memory that is not aligned, and what
    norm_act does between its passes."""
    between = {"norm_act_moments", "norm_act_gradients", "norm_act_bits"}
    narrow = [
        kernel
        for kernel in table
        if (kernel.load != 16 or kernel.store != (4 if "statistics" in kernel.name else 16))
        and not (kernel.element == "float64" and "act" in kernel.name.split()[0] and "compact" not in kernel.name)
        and "single elements" not in kernel.name and kernel.name not in between
    ]  # fmt: skip
    assert narrow == []


def test_registers_leave_room_for_two_blocks(table: list[Kernel]) -> None:
    """The occupancy that csrc/ops/cuda/activation_common.cuh counts on."""
    assert [kernel for kernel in table if kernel.occupancy < 0.25] == []


def test_no_global_atomics_in_hot_loops(table: list[Kernel]) -> None:
    assert [kernel for kernel in table if kernel.loops.atomics] == []


def test_table_as_text(table: list[Kernel]) -> None:
    lines = kernel_table.format_table(table).splitlines()
    assert len(lines) == len(table) + 1 and lines[0].split()[:3] == ["kernel", "element", "arch"]


def test_memory_and_not_instructions_limits_what_has_no_noise(table: list[Kernel]) -> None:
    """In float32, by construction: fewer instructions a byte than an H100 issues while it moves one."""
    plain = [
        kernel for kernel in table
        if kernel.element == "float32" and kernel.loops.moved and "single" not in kernel.name
        and (kernel.name.endswith(("linear, no noise", "linear, bits")) or kernel.name == "activation_backward linear")
    ]  # fmt: skip
    assert len({kernel.name for kernel in plain}) == 4
    assert [(kernel.name, kernel.loops.instructions_a_byte) for kernel in plain if kernel.loops.instructions_a_byte > 8.5] == []


def test_hot_loops_are_recognised() -> None:
    """A loop with a wide load and an atomic is one; an atomic after it or in a loop of its own is not."""
    loop = ["/*0010*/ LDG.E.128 R4, [R2] ;", "/*0020*/ {}", "/*0030*/ @P0 BRA 0x10 ;"]
    inside = [line.format("REDG.E.ADD.64.STRONG.GPU [R2], R4 ;") for line in loop]
    outside = [line.format("FADD R4, R4, R4 ;") for line in loop]
    after = ["/*0040*/ REDG.E.ADD.64.STRONG.GPU [R2], R4 ;", "/*0050*/ @P1 BRA 0x40 ;"]
    assert HotLoops.of(inside).atomics == 1
    loops = HotLoops.of(outside + after)
    assert loops.atomics == 0 and loops.counts == {"memory": 1, "float": 1, "control": 1}
    assert loops.moved == 16 and loops.instructions_a_byte == 3 / 16


@pytest.mark.parametrize(("line", "kind"), [
    ("/*0010*/ @!P1 IMAD.WIDE.U32 R2, R4, 0x10, R2 ;", "integer"), ("/*0010*/ MUFU.LG2 R2, R4 ;", "special"),
    ("/*0010*/ @P0 STG.E.128 desc[UR4][R2.64], R4 ;", "memory"), ("/*0010*/ HFMA2.BF16_V2 R2, R4, R5, R6 ;", "float"),
    ("/*0010*/ FSETP.GT.AND P0, PT, R2, RZ, PT ;", "float"), ("/*0010*/ LOP3.LUT R2, R4, R5, RZ, 0xfc, !PT ;", "integer"),
])  # fmt: skip
def test_classes_of_instructions(line: str, kind: str) -> None:
    assert HotLoops.of(["/*0000*/ LDG.E R1, [R2] ;", line, "/*0020*/ BRA 0x0 ;"]).counts[kind] >= 1
    assert sass._class(line) == kind
