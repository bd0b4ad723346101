"""The kernels on a real device, native and Triton: the table of every implementation, then what only a device shows.

`pytest -m gpu`; everything here is skipped without a CUDA device.
"""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from norm_act_table import (  # noqa: F401
    EPS,
    check_norm_act,
    sample,
    test_norm_act,
    test_norm_act_float64,
    test_norm_act_noise,
    test_norm_act_of_nan_counts_as_active,
    test_norm_act_other_activations,
    test_norm_act_refuses,
    test_norm_act_statistics_far_from_zero,
    test_norm_act_without_parameters,
)
from op_table import (  # noqa: F401
    seed_tensor,
    test_activation,
    test_activation_float64,
    test_activation_noise_does_not_depend_on_layout_or_seed_sign,
    test_activation_refuses,
    test_channel_select,
    test_compact,
    test_compact_over_a_long_list,
    test_compact_refuses,
    test_relu_of_infinity,
    test_weight_noise,
    test_weight_noise_over_a_long_list,
    test_weight_noise_refuses,
)

from demp_kernels import reference
from demp_kernels.ops import backend

NAMES = (
    "activation_forward", "activation_forward_", "activation_backward", "weight_noise_", "compact", "channel_select",
    "norm_act_forward", "norm_act_backward",
)  # fmt: skip
# The device's fast logarithm, sine and cosine are good to 2^-21 absolute, and a normal is at most 5.8.
NORMALS = 2e-5


@pytest.fixture(scope="module", params=["native", "triton"])
def ops(request: pytest.FixtureRequest) -> SimpleNamespace:
    if request.param == "native":
        if "_C_cuda" not in backend.loaded:
            # a run that was to test the device must not pass without its CUDA kernels
            give_up = pytest.fail if "gpu" in request.config.getoption("markexpr") and torch.version.cuda else pytest.skip
            give_up(f"no native CUDA kernels: {backend.reasons.get('_C_cuda')}")
        kernels = {name: getattr(torch.ops.demp_kernels, name).default for name in NAMES}
    else:
        pytest.importorskip("triton")
        from demp_kernels.ops import triton

        kernels = triton.KERNELS
    return SimpleNamespace(device="cuda:0", normals=NORMALS, long_list=600, name=request.param, **kernels)


def _step(ops: SimpleNamespace, x: torch.Tensor, weights: list[torch.Tensor], seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y, active, mask = ops.activation_forward(x, "relu", 0.0, 1, 0.5, seed)
    grad = ops.activation_backward(x, y.new_empty(0), mask, "relu", 0.0)
    if ops.name == "native":  # Triton's lists copy a table to the device
        ops.weight_noise_(weights, [None] * len(weights), 0.1, seed)
    return y, active, mask, grad


def test_cuda_graph(ops: SimpleNamespace) -> None:
    """A captured step replays with the seed and the data that are in memory then."""
    x, seed = torch.randn(8, 16, 12, 12, device="cuda"), seed_tensor(ops)
    weights = [torch.zeros(16, 16, 3, 3, device="cuda"), torch.zeros(16, device="cuda")]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(ops, x, weights, seed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, active, mask, grad = _step(ops, x, weights, seed)
    for value in (3, 4):
        x.normal_()
        seed.fill_(value)
        for w in weights:
            w.zero_()
        graph.replay()
        wanted_y, wanted_active, wanted_mask = reference.activation_forward(x, "relu", 0.0, 1, 0.5, seed)
        torch.testing.assert_close(y, wanted_y, rtol=1e-6, atol=NORMALS)
        assert torch.equal(active, wanted_active) and torch.equal(mask, wanted_mask)
        assert torch.equal(grad, torch.where(x > 0, x, 0))
        if ops.name == "native":
            wanted = [torch.zeros_like(w) for w in weights]
            reference.weight_noise_(wanted, [None] * len(wanted), 0.1, seed)
            for got, want in zip(weights, wanted):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=NORMALS)


def test_cuda_graph_of_norm_act(ops: SimpleNamespace) -> None:
    """Both directions, captured, follow the data that is in memory when they are replayed."""
    x, weight, bias, residual, grad = sample(ops, "channels last", torch.float32, True)

    def step() -> tuple[torch.Tensor, ...]:
        y, active, mean, var, mask = ops.norm_act_forward(x, weight, bias, residual, "relu", 0.0, EPS, 0.0, None)
        return y, active, *ops.norm_act_backward(grad, x, weight, bias, None, mean, var, mask, "relu", 0.0, EPS, True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.normal_()
    graph.replay()
    assert all(torch.equal(got, wanted) for got, wanted in zip(captured, step()))


def test_norm_act_of_large_tensors(ops: SimpleNamespace) -> None:
    """All multiprocessors at work; the same bits every time."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    for shape, channels_last in (((64, 96, 56, 56), False), ((64, 96, 56, 56), True), ((16, 50, 33, 35), False)):
        x, residual, grad = torch.randn(3, *shape, device="cuda", generator=generator).unbind()
        if channels_last:
            x, residual, grad = (t.to(memory_format=torch.channels_last) for t in (x, residual, grad))
        weight, bias = torch.randn(2, shape[1], device="cuda", generator=generator).unbind()
        check_norm_act(ops, x, weight, bias, residual, grad, "relu", 0.0)
        first, again = (ops.norm_act_forward(x, weight, bias, None, "gelu", 0.0, EPS, 0.0, None) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_two_streams(ops: SimpleNamespace) -> None:
    """Each launch is on the stream that is current, in order with the work before it there."""
    results = []
    inputs = [torch.randn(64, 64, 56, 56, device="cuda") for _ in range(2)]
    torch.cuda.synchronize()
    for x, stream in zip(inputs, (torch.cuda.Stream(), torch.cuda.Stream())):
        with torch.cuda.stream(stream):
            shifted = x
            for _ in range(20):
                shifted = shifted * 1.01
            results.append((shifted, ops.activation_forward(shifted, "relu", 0.0, 1, 0.0, None)))
    torch.cuda.synchronize()
    for shifted, (y, active, _) in results:
        assert torch.equal(y, torch.relu(shifted)) and torch.equal(active, (shifted > 0).sum((0, 2, 3)))


def test_more_than_2_31_elements(ops: SimpleNamespace) -> None:
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free device memory")
    x = torch.full((33, 1 << 26), -1.0, device="cuda", dtype=torch.bfloat16)
    x[-1, -3:] = 2.0
    x[0, 5] = 1.0
    for view, channels in ((x, 1 << 26), (x.view(33, 64, 1 << 10, 1 << 10), 64)):
        y, active, _ = ops.activation_forward(view, "relu", 0.0, 1, 0.0, None)
        assert active.numel() == channels and active.sum() == 4
        assert y.view(33, -1)[-1, -3:].tolist() == [2.0] * 3 and y.sum(dtype=torch.float32) == 7
        del y


def test_peak_memory(ops: SimpleNamespace) -> None:
    """Forward allocates y, the counts and the bits; in place, no y."""
    x, seed = torch.randn(64, 64, 64, 64, device="cuda"), seed_tensor(ops)
    size, bits = x.numel() * x.element_size(), x.numel() // 8
    for call, expected in ((ops.activation_forward, size + bits), (ops.activation_forward_, bits)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call(x, "relu", 0.0, 1, 0.5, seed)
        assert torch.cuda.max_memory_allocated() - before <= expected + (1 << 20)
        del result


def test_peak_memory_of_norm_act(ops: SimpleNamespace) -> None:
    """Forward allocates y and the bits, backward grad_x and the residual's gradient: nothing of x's size in between."""
    x, residual, grad = torch.randn(3, 64, 64, 64, 64, device="cuda").unbind()
    size = x.numel() * x.element_size()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, _, mean, var, mask = ops.norm_act_forward(x, None, None, residual, "relu", 0.0, EPS, 0.0, None)
    assert torch.cuda.max_memory_allocated() - before <= size + x.numel() // 8 + (4 << 20)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.norm_act_backward(grad, x, None, None, None, mean, var, mask, "relu", 0.0, EPS, True)
    assert torch.cuda.max_memory_allocated() - before <= 2 * size + (4 << 20)


def test_nothing_waits_for_the_device(ops: SimpleNamespace) -> None:
    """No call synchronises with the host."""
    x, seed = torch.randn(8, 16, 12, 12, device="cuda"), seed_tensor(ops)

    def norm_act() -> None:
        _, _, mean, var, mask = ops.norm_act_forward(x, None, None, x, "relu", 0.0, EPS, 0.5, seed)
        ops.norm_act_backward(x, x, None, None, None, mean, var, mask, "relu", 0.0, EPS, True)

    _step(ops, x, [torch.zeros(4, 4, device="cuda")], seed)
    norm_act()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(ops, x, [torch.zeros(4, 4, device="cuda")], seed)
        norm_act()
        if ops.name == "native":
            index = torch.arange(3, device="cuda")
            ops.compact([x], [index], [index])
            ops.channel_select(x, index, torch.full((16,), -1, device="cuda"), 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
