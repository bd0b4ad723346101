"""Training on a real device, through modules and autograd: what the tables of ops, which call kernels directly, do not show.

`pytest -m gpu`; everything here is skipped without a CUDA device.
"""
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import demp_kernels as dk

DEVICE = "cuda"
X = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 5


class Net(nn.Module):
    """Fused and unfused activations, a residual addition, more elements a layer than take the way of tiny tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.hidden, self.head = nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norm1(self.conv(x)) + x)
        return self.head(F.gelu(self.hidden(x.mean((2, 3)))))


def built(device: str = DEVICE) -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    """The same network plain and prepared, images and classes."""
    torch.manual_seed(0)
    plain = Net().to(device, memory_format=torch.channels_last)
    x = X.to(device).contiguous(memory_format=torch.channels_last)
    return plain, dk.prepare(copy.deepcopy(plain), x), x, Y.to(device)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_backward_from_autograd_s_own_threads() -> None:
    """Kernels that the engine launches give plain PyTorch's gradients; activation checkpointing counts once."""
    plain, model, x, y = built()
    F.cross_entropy(plain(x), y).backward()
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-3, atol=1e-4)
    first = model.get_submodule("norm.act")
    wanted = first.active.clone()
    first.reset_counts()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert torch.equal(first.active, wanted) and first.seen == x.numel() // 3


def test_autocast_with_a_scaler() -> None:
    plain, model, x, y = built()
    for net in (plain, model):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
        with torch.autocast(DEVICE, torch.float16):
            loss = F.cross_entropy(net(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(grad.isfinite().all() for grad in gradients(net).values())
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_over_a_removal(mode: str) -> None:
    """The counters of a compiled step, captured or not, go on from step to step, and units that died are removed."""
    _, model, x, y = built()
    with torch.no_grad():
        model.get_submodule("norm").bias[:4] = -50.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, mode=mode)
    demp = dk.DemP(compiled, optimizer, total_steps=8, prune_every=4, peak_penalty=0.0, peak_noise=0.0)
    for step in range(8):
        F.cross_entropy(compiled(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            assert model.get_submodule("norm.act").seen == 3 * x.numel() // 3
        demp.step()
    assert model.get_submodule("stem").weight.shape[0] == 12


def test_steps_without_a_look_do_not_wait_for_the_device() -> None:
    _, model, x, y = built()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    demp = dk.DemP(model, optimizer, total_steps=100, prune_every=50)

    def step() -> None:
        (F.cross_entropy(model(x), y) + demp.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        demp.step()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_counters_are_not_made_in_a_graph() -> None:
    """Replays would zero them."""
    module, x = dk.DemPReLU(), torch.randn(64, 16, 8, 8, device="cuda")
    dk.functional.relu(x)  # a capture is no moment to load kernels
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="DemPReLU must have counters of 16 units before a CUDA graph is captured, got none"), torch.cuda.graph(graph):
        module(x)
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(x)
    module.reset_counts()
    for _ in range(3):
        graph.replay()
    assert torch.equal(module.active, 3 * (x > 0).sum((0, 2, 3))) and module.seen == 3 * 64 * 64


def test_views_that_begin_anywhere() -> None:
    """Addresses that are not multiples of 16 bytes, in which kernels read elsewhere."""
    for dtype in (torch.float32, torch.bfloat16):
        for offset in (1, 2, 3):
            x = torch.randn(64 * 16 * 64 + offset, device=DEVICE).to(dtype)[offset:].view(64, 16, 8, 8)
            y, active = dk.functional.relu(x)
            assert torch.equal(y, torch.relu(x)) and torch.equal(active, (x > 0).sum((0, 2, 3)))
            y, active, *_ = dk.functional.norm_act(x)
            wanted = torch.relu(F.batch_norm(x.float(), None, None, training=True))
            torch.testing.assert_close(y.float(), wanted, rtol=1e-2, atol=1e-2)
            del y, active


def test_memory_that_runs_out_is_told_as_that() -> None:
    x = torch.zeros(1, device=DEVICE).expand(1 << 22, 1 << 22)
    with pytest.raises(torch.OutOfMemoryError):
        dk.functional.relu(x)
    free = torch.cuda.mem_get_info()[0]
    whole = torch.zeros(int(0.6 * free) // 4 // 64, 64, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        dk.functional.relu(whole)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_tensors_of_a_device_that_is_not_current() -> None:
    results: list[Any] = []
    for device in ("cuda:0", "cuda:1"):
        _, model, x, y = built(device)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        results.append([p.grad.cpu() for p in model.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
