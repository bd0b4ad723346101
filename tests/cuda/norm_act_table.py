"""The table of cases of norm_act for every GPU implementation, as op_table.py for the other ops: test functions over `ops`
with `norm_act_forward` and `norm_act_backward`."""
from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from op_table import ACTIVATIONS, DTYPES, ROUNDING, STD, seed_tensor
from torch import Tensor

from demp_kernels import reference

EPS = 1e-5
CASES: dict[str, tuple[tuple[int, ...], bool]] = {  # shape, channels_last
    "planes": ((3, 3, 16, 24), False),
    "one large plane": ((1, 2, 72, 61), False),
    "14x14": ((3, 5, 14, 14), False),
    "7x7": ((5, 13, 7, 7), False),
    "2x2": ((9, 3, 2, 2), False),
    "channels last": ((3, 64, 5, 5), True),
    "channels last, 20": ((2, 20, 5, 7), True),
    "channels last, 13": ((2, 13, 5, 7), True),
    "channels last 3d": ((2, 24, 3, 2, 4), True),
    "linear": ((333, 24), False),
    "linear, 63": ((37, 63), False),
    "one channel": ((2, 1, 5, 5), False),
    "many channels": ((3, 520), False),
    "sequence": ((3, 6, 40), False),
    "empty": ((0, 6, 4, 4), False),
    "no channels": ((2, 0, 4), False),
}


def sample(ops: Any, case: str, dtype: torch.dtype, added: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """x, weight, bias, residual, grad."""
    shape, channels_last = CASES[case]
    generator = torch.Generator().manual_seed(len(case))

    def image(scale: float, shift: float) -> Tensor:
        x = torch.randn(shape, generator=generator) * scale + shift
        if channels_last:
            x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        return x.to(dtype).to(ops.device)

    weight, bias = torch.randn(2, shape[1], generator=generator)
    weight, bias = weight.to(dtype), bias.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return image(2.0, 0.7), weight.to(ops.device), bias.to(ops.device), image(1.0, 0.0) if added else None, image(1.0, 0.0)


@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("case", CASES)
def test_norm_act(ops: Any, case: str, dtype: torch.dtype, activation: str, added: bool) -> None:
    check_norm_act(ops, *sample(ops, case, dtype, added), activation, 0.0)


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
@pytest.mark.parametrize("case", ["planes", "7x7", "channels last", "channels last, 13"])
def test_norm_act_other_activations(ops: Any, case: str, activation: str) -> None:
    check_norm_act(ops, *sample(ops, case, torch.float32, True), activation, 0.0)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("case", ["planes", "7x7", "channels last", "channels last, 13", "linear"])
def test_norm_act_noise(ops: Any, case: str, activation: str) -> None:
    check_norm_act(ops, *sample(ops, case, torch.float32, activation == "relu"), activation, STD)


@pytest.mark.parametrize("case", ["planes", "7x7", "channels last, 13"])
def test_norm_act_float64(ops: Any, case: str) -> None:
    check_norm_act(ops, *sample(ops, case, torch.float64, True), "relu", 0.0)


@pytest.mark.parametrize("case", ["planes", "channels last"])
def test_norm_act_without_parameters(ops: Any, case: str) -> None:
    x, _, _, residual, grad = sample(ops, case, torch.float32, True)
    check_norm_act(ops, x, None, None, residual, grad, "relu", 0.0)


def check_norm_act(
    ops: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, grad: Tensor, activation: str,
    noise_std: float,
) -> None:  # fmt: skip
    """Forward and backward of one x against the reference."""
    slope, added, rounding = ACTIVATIONS[activation], residual is not None, ROUNDING[x.dtype]
    parameters = (x, weight, bias, residual, activation, slope, EPS)
    seed = seed_tensor(ops) if noise_std else None
    y, active, mean, var, mask = ops.norm_act_forward(*parameters, noise_std, seed)
    wanted_y, wanted_active, wanted_mean, wanted_var, wanted_mask = reference.norm_act_forward(*parameters, noise_std, seed)
    statistics = dict(rtol=1e-12, atol=1e-12) if x.dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean, wanted_mean, **statistics)
    torch.testing.assert_close(var, wanted_var, **statistics)
    assert y.dtype == x.dtype and y.stride() == x.stride()

    # A sign can be rounding's: there, and only there, counts, bits and noise may differ from the reference's.
    z = reference._normalised(x, weight, bias, residual, wanted_mean, wanted_var, EPS)
    unsure = z.abs() < 1e-4 if x.dtype != torch.float64 else torch.zeros_like(z, dtype=torch.bool)
    others = [d for d in range(x.dim()) if d != 1]
    torch.testing.assert_close(
        y.where(~unsure, 0), wanted_y.where(~unsure, 0), rtol=rounding, atol=4 * max(rounding, 1e-5 * (x.dtype != torch.float64))
        + noise_std * ops.normals,
    )  # fmt: skip
    assert active.dtype == torch.int64 and ((active - wanted_active).abs() <= unsure.sum(others)).all()
    assert mask.shape == wanted_mask.shape and mask.dtype == torch.uint8
    if mask.numel():
        live = reference._unpack_runs(mask, x)
        assert torch.equal(live.sum(others), active)
        assert torch.equal(live | unsure, ~(z <= 0) | unsure)
        assert torch.equal(reference._pack_runs(live), mask)  # nothing in the bits that fill up a plane's last byte
    elif activation == "relu" and noise_std == 0 and x.dtype == torch.float32:
        assert torch.equal(active, (y > 0).sum(others))

    saved = residual if activation not in ("relu", "leaky_relu") else None
    arguments = (grad, x, weight, bias, saved, mean, var, mask, activation, slope, EPS, added)
    names = ("grad_x", "grad_weight", "grad_bias", "grad_residual")
    exact = 1e-11 if x.dtype == torch.float64 else 2e-5
    for name, got, wanted in zip(names, ops.norm_act_backward(*arguments), reference.norm_act_backward(*arguments)):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape and got.stride() == wanted.stride(), name
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        atol = max(4 * exact, 2 * ROUNDING[got.dtype])
        torch.testing.assert_close(got.double() / scale, wanted.double() / scale, rtol=atol, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1.0), (1e6, 10.0), (0.0, 1e-6)])
def test_norm_act_statistics_far_from_zero(ops: Any, mean: float, std: float, channels_last: bool) -> None:
    """E[x^2] - E[x]^2 would lose every digit here."""
    x = torch.randn(4, 8, 12, 12, generator=torch.Generator().manual_seed(0)) * std + mean
    x[0, 0, 0, 0] = mean + 100 * std  # the first element, which is taken off the others, is an outlier
    x = (x.to(memory_format=torch.channels_last) if channels_last else x).to(ops.device)
    _, _, got_mean, got_var, _ = ops.norm_act_forward(x, None, None, None, "relu", 0.0, EPS, 0.0, None)
    exact = x.double()
    torch.testing.assert_close(got_mean.double(), exact.mean((0, 2, 3)), rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(got_var.double(), exact.var((0, 2, 3), unbiased=False), rtol=2e-4, atol=1e-14)


@pytest.mark.parametrize("case", ["planes", "channels last"])
def test_norm_act_of_nan_counts_as_active(ops: Any, case: str) -> None:
    x, weight, bias, _, _ = sample(ops, case, torch.float32, False)
    x[0, 1] = float("nan")
    y, active, _, _, _ = ops.norm_act_forward(x, weight, bias, None, "relu", 0.0, EPS, 0.0, None)
    assert y[:, 1].isnan().all() and not y[:, 0].isnan().any() and int(active[1]) == x.numel() // x.shape[1]


def test_norm_act_refuses(ops: Any) -> None:
    x = torch.zeros(2, 3, 4, device=ops.device)
    for change, words in (
        (dict(weight=torch.zeros(5, device=ops.device)), "weight must have shape (3,)"),
        (dict(residual=torch.zeros(2, 3, 5, device=ops.device)), "residual must be like x"),
        (dict(x=torch.zeros(3, device=ops.device)), "x must have shape (N, C, *)"),
        (dict(activation="elu"), "activation must be one of"),
        (dict(noise_std=1.0), "seed is needed when noise_std > 0"),
    ):
        arguments = dict(x=x, weight=None, bias=None, residual=None, activation="relu", slope=0.0, eps=EPS, noise_std=0.0, seed=None)
        with pytest.raises((ValueError, RuntimeError), match=re.escape(words)):
            ops.norm_act_forward(*{**arguments, **change}.values())
