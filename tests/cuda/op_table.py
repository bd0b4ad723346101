"""One table of cases for every GPU implementation of the ops: test functions over a fixture `ops`.

`ops` has the ops' own signatures (`activation_forward`, `activation_forward_`, `activation_backward`, `weight_noise_`,
`compact`, `channel_select`), takes tensors on `ops.device`, and says in `ops.normals` how far its normals may be from the
reference's, which works in float64. A test module imports the functions and defines the fixture:

    emulated CUDA kernels        tests/cuda/test_emulated_ops.py
    Triton under its interpreter tests/triton/interpreted/
    a real device                tests/gpu/
"""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from demp_kernels import reference

ACTIVATIONS = {"relu": 0.0, "leaky_relu": 0.1, "gelu": 0.0, "gelu_tanh": 0.0, "silu": 0.0}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One unit in the last place for the 16-bit types: the arithmetic is in float32, but a result may round the other way.
ROUNDING = {torch.float32: 4e-6, torch.float64: 1e-12, torch.bfloat16: 2**-7, torch.float16: 2**-10}
STD = 0.5
SEED = 0x1234_5678_9ABC_DEF1

CASES: dict[str, tuple[tuple[int, ...], bool, int]] = {  # shape, channels_last, channel_dim
    "planes": ((2, 3, 32, 32), False, 1),
    "planes of 8": ((1, 2, 72, 29), False, 1),
    "one plane": ((1, 1, 40, 40), False, 1),
    "7x7": ((5, 13, 7, 7), False, 1),
    "4x4": ((9, 5, 4, 4), False, 1),
    "2x2": ((3, 7, 2, 2), False, 1),
    "channels last": ((3, 64, 5, 5), True, 1),
    "channels last, 13": ((2, 13, 5, 7), True, 1),
    "channels last, 4": ((2, 4, 3, 3), True, 1),
    "channels last 3d": ((2, 12, 3, 2, 4), True, 1),
    "linear": ((37, 24), False, 1),
    "linear, 63": ((7, 63), False, 1),
    "one row": ((1, 1025), False, 1),
    "one element": ((1, 1), False, 1),
    "tokens": ((2, 7, 40), False, -1),
    "middle": ((2, 3, 5, 11), False, 2),
    "empty": ((0, 6, 4, 4), False, 1),
    "empty planes": ((2, 6, 0, 4), False, 1),
    "no channels": ((2, 0, 4), False, 1),
}


def sample(ops: Any, case: str, dtype: torch.dtype) -> tuple[Tensor, int]:
    """x with zeros of both signs, a large value and NaN among normals, and its channel dimension."""
    shape, channels_last, channel_dim = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    x = torch.randn(shape, generator=generator)
    if x.numel() > 30:
        special = torch.tensor([0.0, -0.0, 300.0, float("nan")])
        x.view(-1)[torch.randperm(x.numel(), generator=generator)[:4]] = special
    if channels_last:
        x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x.to(dtype).to(ops.device), channel_dim


def seed_tensor(ops: Any, value: int = SEED) -> Tensor:
    return torch.tensor([value], device=ops.device)


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype, normals: float = 0.0) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape and got.stride() == wanted.stride()
    rounding = ROUNDING[dtype]
    torch.testing.assert_close(got, wanted, rtol=rounding, atol=rounding / 4 + normals, equal_nan=True)


# ---- activation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_std", [0.0, STD], ids=["plain", "noise"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("case", CASES)
def test_activation(ops: Any, case: str, dtype: torch.dtype, activation: str, noise_std: float) -> None:
    x, channel_dim = sample(ops, case, dtype)
    check_activation(ops, x, channel_dim, activation, noise_std)


def check_activation(ops: Any, x: Tensor, channel_dim: int, activation: str, noise_std: float) -> None:
    """Forward, in-place forward and backward of one x against the reference."""
    slope = ACTIVATIONS[activation]
    arguments = (activation, slope, channel_dim, noise_std, seed_tensor(ops) if noise_std else None)
    y, active, mask = ops.activation_forward(x, *arguments)
    wanted_y, wanted_active, wanted_mask = reference.activation_forward(x, *arguments)
    assert_close(y, wanted_y, x.dtype, noise_std * ops.normals)
    assert torch.equal(active, wanted_active) and active.dtype == torch.int64
    assert torch.equal(mask, wanted_mask)

    if activation in ("relu", "leaky_relu"):
        in_place = x.clone(memory_format=torch.preserve_format)
        active, mask = ops.activation_forward_(in_place, *arguments)
        assert torch.equal(torch.nan_to_num(in_place), torch.nan_to_num(y))
        assert torch.equal(active, wanted_active) and torch.equal(mask, wanted_mask)

    saved = wanted_y if activation in ("relu", "leaky_relu") else x
    if wanted_mask.numel():
        saved = x.new_empty(0)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device, x.dtype)
    grad = torch.empty_like(x).copy_(grad)
    got = ops.activation_backward(grad, saved, wanted_mask, activation, slope)
    assert_close(got, reference.activation_backward(grad, saved, wanted_mask, activation, slope), x.dtype)


@pytest.mark.parametrize("noise_std", [0.0, STD], ids=["plain", "noise"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("case", ["planes", "7x7", "channels last, 13"])
def test_activation_float64(ops: Any, case: str, activation: str, noise_std: float) -> None:
    x, channel_dim = sample(ops, case, torch.float64)
    check_activation(ops, x[:1], channel_dim, activation, noise_std)


@pytest.mark.parametrize("case", ["planes", "7x7", "channels last", "linear"])
def test_activation_noise_does_not_depend_on_layout_or_seed_sign(ops: Any, case: str) -> None:
    x, _ = sample(ops, case, torch.float32)
    for seed in (1, -1, 2**63 - 1, -(2**63)):
        y, _, _ = ops.activation_forward(x, "relu", 0.0, 1, STD, seed_tensor(ops, seed))
        again, _, _ = ops.activation_forward(x, "relu", 0.0, 1, STD, seed_tensor(ops, seed))
        assert torch.equal(torch.nan_to_num(y), torch.nan_to_num(again))
        wanted, _, _ = reference.activation_forward(x, "relu", 0.0, 1, STD, seed_tensor(ops, seed))
        assert_close(y, wanted, torch.float32, STD * ops.normals)
    if x.dim() == 4:
        flat = x.contiguous()
        flat_y, _, _ = ops.activation_forward(flat, "relu", 0.0, 1, STD, seed_tensor(ops))
        last_y, _, _ = ops.activation_forward(flat.to(memory_format=torch.channels_last), "relu", 0.0, 1, STD, seed_tensor(ops))
        torch.testing.assert_close(flat_y, last_y, rtol=0, atol=STD * ops.normals, equal_nan=True)


@pytest.mark.parametrize("case", ["planes", "channels last, 13"])
def test_relu_of_infinity(ops: Any, case: str) -> None:
    x, channel_dim = sample(ops, case, torch.float32)
    x = torch.where(x > 0, float("inf"), float("-inf"))
    y, active, _ = ops.activation_forward(x, "relu", 0.0, channel_dim, 0.0, None)
    wanted, wanted_active, _ = reference.activation_forward(x, "relu", 0.0, channel_dim, 0.0, None)
    assert torch.equal(y, wanted) and torch.equal(active, wanted_active)


BAD_ACTIVATION: dict[str, tuple[Callable[[Any], Any], str]] = {
    "name": (lambda ops: ops.activation_forward(torch.zeros(2, 3, device=ops.device), "elu", 0.0, 1, 0.0, None), "activation must be one of"),
    "dim": (lambda ops: ops.activation_forward(torch.zeros(3, device=ops.device), "relu", 0.0, 0, 0.0, None),
            "x must have a channel dimension, got shape (3,)"),
    "dtype": (lambda ops: ops.activation_forward(torch.zeros(2, 3, device=ops.device, dtype=torch.int32), "relu", 0.0, 1, 0.0, None),
              "x must be float32, bfloat16, float16 or float64, got int32"),
    "channel_dim": (lambda ops: ops.activation_forward(torch.zeros(2, 3, device=ops.device), "relu", 0.0, 2, 0.0, None),
                    "channel_dim must be between -2 and 1 for x of shape (2, 3), got 2"),
    "std": (lambda ops: ops.activation_forward(torch.zeros(2, 3, device=ops.device), "relu", 0.0, 1, -1.0, None),
            "noise_std must be finite and >= 0, got -1"),
    "seed": (lambda ops: ops.activation_forward(torch.zeros(2, 3, device=ops.device), "relu", 0.0, 1, 1.0, None),
             "seed is needed when noise_std > 0, got None"),
    "in place": (lambda ops: ops.activation_forward_(torch.zeros(2, 3, device=ops.device), "gelu", 0.0, 1, 0.0, None),
                 "only relu and leaky_relu can be done in place, got gelu"),
    "saved": (lambda ops: ops.activation_backward(
        torch.zeros(2, 3, device=ops.device), torch.zeros(3, 2, device=ops.device),
        torch.zeros(0, dtype=torch.uint8, device=ops.device), "gelu", 0.0), "saved must be like grad"),
}


@pytest.mark.parametrize("bad", BAD_ACTIVATION)
def test_activation_refuses(ops: Any, bad: str) -> None:
    call, words = BAD_ACTIVATION[bad]
    with pytest.raises((ValueError, RuntimeError), match=re.escape(words)):
        call(ops)


# ---- weight noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "live rows"])
def test_weight_noise(ops: Any, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(ops.device, dtype)

    tensors = [
        weight(17, 3, 3, 3), weight(8, 16, 3, 3).to(memory_format=torch.channels_last), weight(33), weight(), weight(5, 63),
        weight(9, 64, dtype=torch.float16), weight(12, 24, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last),
        weight(6, 10).t(), weight(0, 3), weight(1, 1025), weight(4, 6, dtype=torch.float64),
    ]
    live = [torch.rand(t.shape[0] if t.dim() else 1, generator=generator).to(ops.device) > 0.5 if masked else None for t in tensors]
    got, wanted = [t.clone() for t in tensors], [t.clone() for t in tensors]
    ops.weight_noise_(got, live, 0.3, seed_tensor(ops))
    reference.weight_noise_(wanted, live, 0.3, seed_tensor(ops))
    for a, b in zip(got, wanted):
        assert_close(a, b, a.dtype, 0.3 * ops.normals)


def test_weight_noise_over_a_long_list(ops: Any) -> None:
    tensors = [torch.zeros(5, device=ops.device) for _ in range(ops.long_list)]
    ops.weight_noise_(tensors, [None] * len(tensors), 1.0, seed_tensor(ops))
    wanted = [torch.zeros(5, device=ops.device) for _ in tensors]
    reference.weight_noise_(wanted, [None] * len(tensors), 1.0, seed_tensor(ops))
    torch.testing.assert_close(torch.stack(tensors), torch.stack(wanted), rtol=0, atol=2e-6 + ops.normals)


def test_weight_noise_refuses(ops: Any) -> None:
    t = torch.zeros(3, 2, device=ops.device)
    with pytest.raises((ValueError, RuntimeError), match="std must be finite and >= 0, got -1"):
        ops.weight_noise_([t], [None], -1.0, seed_tensor(ops))
    with pytest.raises((ValueError, RuntimeError), match=re.escape("live[0] must be bool of shape (3,)")):
        ops.weight_noise_([t], [torch.ones(2, dtype=torch.bool, device=ops.device)], 1.0, seed_tensor(ops))


# ---- compact and channel_select --------------------------------------------------------------------------------------


def test_compact(ops: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def index(size: int, kept: int) -> Tensor | None:
        return torch.randperm(size, generator=generator)[:kept].to(ops.device) if kept >= 0 else None

    table = [  # source, rows kept, columns kept (-1: all)
        (torch.randn(17, 13, 3, 3), 9, 5), (torch.randn(8, 16, 3, 3).to(memory_format=torch.channels_last), 3, 7),
        (torch.randn(33), 20, -1), (torch.randn(64, 128).half(), 20, 40), (torch.randn(64, 64), -1, -1),
        (torch.randint(0, 9, (7, 5, 2), dtype=torch.uint8), 5, 2), (torch.randn(5, 6, dtype=torch.complex128), -1, 3),
        (torch.randn(6, 8).t(), 4, -1), (torch.randn(100, 9), 50, -1), (torch.randn(9, 4), 0, 2), (torch.randn(3, 5) > 0, 2, 3),
        (torch.randn(4, 6, 2, 2, 2).to(memory_format=torch.channels_last_3d).bfloat16(), 2, 5), (torch.randn(0, 4), -1, 2),
    ]
    sources = [source.to(ops.device) for source, _, _ in table]
    rows = [index(source.shape[0], kept) for source, kept, _ in table]
    columns = [index(source.shape[1], kept) if kept >= 0 else None for source, _, kept in table]
    for got, wanted in zip(ops.compact(sources, rows, columns), reference.compact(sources, rows, columns)):
        assert got.dtype == wanted.dtype and got.stride() == wanted.stride() and torch.equal(got, wanted)


def test_compact_over_a_long_list(ops: Any) -> None:
    sources = [torch.randn(3, 5, device=ops.device) for _ in range(ops.long_list)]
    rows = torch.tensor([2, 0], device=ops.device)
    results = ops.compact(sources, [rows] * len(sources), [None] * len(sources))
    assert all(torch.equal(got, source[[2, 0]]) for got, source in zip(results, sources))


def test_compact_refuses(ops: Any) -> None:
    source = torch.zeros(3, 2, device=ops.device)
    with pytest.raises((ValueError, RuntimeError), match="rows must have one entry a source"):
        ops.compact([source], [], [None])
    with pytest.raises((ValueError, RuntimeError), match=re.escape("rows[0] must be a 1-D int64 tensor on")):
        ops.compact([source], [torch.zeros(1, device=ops.device)], [None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("case", ["planes", "7x7", "2x2", "channels last", "channels last, 13", "linear", "tokens", "middle", "empty"])
def test_channel_select(ops: Any, case: str, dtype: torch.dtype) -> None:
    x, channel_dim = sample(ops, case, torch.float32)
    x = torch.nan_to_num(x, posinf=1.0).to(dtype)
    channels = x.shape[channel_dim]
    index = torch.full((channels + 2,), -1)
    kept = torch.randperm(channels, generator=torch.Generator().manual_seed(0))[: channels // 2]
    index[1 : 1 + len(kept)] = kept
    inverse = torch.full((channels,), -1)
    inverse[kept] = torch.arange(1, 1 + len(kept))
    got = ops.channel_select(x, index.to(ops.device), inverse.to(ops.device), channel_dim)
    wanted = reference.channel_select(x, index.to(ops.device), channel_dim)
    assert got.dtype == wanted.dtype and got.stride() == wanted.stride() and torch.equal(got, wanted)
