"""The Triton kernels compiled for GPUs that are not here: NVIDIA sm_80, sm_90, sm_100 and AMD gfx942."""
from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from demp_kernels import kernel_table  # noqa: E402
from demp_kernels.ops.triton import activation, norm_act, weight_noise  # noqa: E402
from demp_kernels.ops.triton.channel_select import _select  # noqa: E402
from demp_kernels.ops.triton.compact import BLOCK, FIELDS, _gather_list  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
_FORWARD = dict(x="*bf16", y="*bf16", active="*i64", mask="*u8", seed="*i64", channels="i32", slope="fp32", noise_std="fp32")
_NOISY = dict(ACTIVATION="relu", NOISE=True, MASK=True, WIDE=tl.float32, LARGE=False)
_PLAIN = dict(ACTIVATION="gelu", NOISE=False, MASK=False, WIDE=tl.float32, LARGE=False)
_PLANES = dict(_FORWARD, inner="i32", positions="i32")
_ROWS = dict(_FORWARD, rows="i32")
_GATHER = dict(source="*i32", target="*i32", index="*i64", outer="i32", source_columns="i32", target_columns="i32", column_units="i32")

_NORM = dict(
    x="*fp32", residual="*fp32", weight="*fp32", bias="*fp32", mean="*fp32", var="*fp32", y="*fp32", active="*i64", mask="*u8",
    seed="*i64", grad="*fp32", grad_x="*fp32", grad_residual="*fp32", grad_weight="*fp32", grad_bias="*fp32", partial="*fp32",
    totals="*fp32", outer="i32", channels="i32", inner="i32", slope="fp32", eps="fp32", noise_std="fp32", n="fp32", splits="i32",
    part="i32", elements="i32",
)
_ROWS_OF = dict(inner=1, PLANES=False, WIDE=tl.float32, ROWS=norm_act.BLOCK // norm_act.COLUMNS, CHANNELS=norm_act.COLUMNS)
_PLANES_OF = dict(PLANES=True, WIDE=tl.float32, ROWS=norm_act.BLOCK, CHANNELS=1)
_COMBINED = dict(WIDE=tl.float32, SPLITS=norm_act.PARTS, CHANNELS=norm_act.COMBINED)
_AFFINE = dict(ACTIVATION="relu", HAS_WEIGHT=True, HAS_BIAS=True)
_BITS = dict(_AFFINE, ADDED=True, NOISE=False, MASK=True)


def _without(*names: str) -> dict[str, str]:
    return {name: kind for name, kind in _GATHER.items() if name not in names}


def _norm_act_kernel(kernel: object, constants: dict[str, object], wide: bool) -> tuple[object, dict[str, str], dict[str, object], bool]:
    types = {name: kind for name, kind in _NORM.items() if name in kernel.arg_names and name not in constants}
    return kernel, types, {name: value for name, value in constants.items() if name in kernel.arg_names}, wide


# kernel, types of its arguments, its constants, whether its loads must be 16 bytes wide
KERNELS = {
    "planes, noise": (activation._forward_planes, _PLANES, dict(_NOISY, BLOCK=activation.BLOCK), True),
    "planes": (activation._forward_planes, _PLANES, dict(_PLAIN, BLOCK=activation.BLOCK), True),
    "rows, noise": (activation._forward_rows, _ROWS, dict(_NOISY, QUADS=activation.ROW_QUADS // 64, COLUMNS=64), True),
    "rows": (activation._forward_rows, _ROWS, dict(_PLAIN, QUADS=activation.ROW_QUADS // 64, COLUMNS=64), True),
    "backward": (
        activation._backward, dict(grad="*fp32", saved="*fp32", mask="*u8", result="*fp32", elements="i32", slope="fp32"),
        dict(ACTIVATION="silu", FROM_BITS=False, WIDE=tl.float32, BLOCK=activation.BLOCK), True,
    ),
    "weight noise": (
        weight_noise._add, dict(table="*i64", seed="*i64", std="fp32", programs="i32"),
        dict(DTYPE=tl.float32, WIDE=tl.float32, ITEMS=weight_noise.ITEMS, FIELDS=weight_noise.FIELDS), False,
    ),
    "compact": (
        _gather_list, dict(table="*i64", programs="i32"), dict(UNIT=tl.int32, BLOCK=BLOCK, FIELDS=FIELDS), False,
    ),
    "channel_select": (_select, _GATHER, dict(BLOCK=BLOCK), False),
    # arguments that are 1 come as numbers
    "channel_select, channels_last": (_select, _without("column_units"), dict(BLOCK=BLOCK, column_units=1), False),
    "channel_select, one channel of one image": (
        _select, _without("outer", "source_columns", "target_columns"),
        dict(BLOCK=BLOCK, outer=1, source_columns=1, target_columns=1), False,
    ),
    "norm_act statistics, planes": _norm_act_kernel(norm_act._statistics, _PLANES_OF, True),
    "norm_act statistics, rows": _norm_act_kernel(norm_act._statistics, _ROWS_OF, True),
    "norm_act combined statistics": _norm_act_kernel(norm_act._combine_statistics, _COMBINED, False),
    "norm_act normalise, planes": _norm_act_kernel(norm_act._normalise, dict(_BITS, **_PLANES_OF), True),
    "norm_act normalise, rows": _norm_act_kernel(norm_act._normalise, dict(_BITS, **_ROWS_OF), True),
    "norm_act statistics, planes of one image": _norm_act_kernel(norm_act._statistics, dict(_PLANES_OF, outer=1), True),
    "norm_act bits": _norm_act_kernel(norm_act._bits, dict(_AFFINE, WIDE=tl.float32, BLOCK=norm_act.BLOCK), True),
    "norm_act sums, planes": _norm_act_kernel(norm_act._sums, dict(_BITS, FROM_BITS=True, **_PLANES_OF), True),
    "norm_act sums, rows": _norm_act_kernel(norm_act._sums, dict(_BITS, FROM_BITS=True, **_ROWS_OF), True),
    "norm_act combined sums": _norm_act_kernel(norm_act._combine_sums, _COMBINED, False),
    "norm_act input, planes": _norm_act_kernel(norm_act._input, dict(_AFFINE, IS_DZ=False, **_PLANES_OF), True),
    "norm_act input, rows": _norm_act_kernel(norm_act._input, dict(_AFFINE, IS_DZ=False, **_ROWS_OF), True),
}  # fmt: skip


def _compile(name: str, target: str) -> object:
    kernel, types, constants, _ = KERNELS[name]
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    assert {argument for argument, kind in signature.items() if kind == "constexpr"} == set(constants)
    # Pointers and sizes are multiples of 16, as they are for most layers: Triton then makes a variant of its own.
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind == "i32"
    }
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=TARGETS[target], options=dict(num_warps=4))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, target: str, tmp_path: Path) -> None:
    compiled = _compile(name, target)
    wide = KERNELS[name][3]
    if target == "gfx942":
        code = compiled.asm["amdgcn"]
        assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", code) == ["0"]
        assert not wide or "load_dwordx4" in code
        return
    assert not wide or re.search(r"ld\.global[.\w]*\.v4\.b32", compiled.asm["ptx"])
    try:
        tool = kernel_table.find_cuobjdump()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups())
    assert stack == 0 and local == 0
    assert registers <= 128  # four blocks of 128 threads on a multiprocessor
