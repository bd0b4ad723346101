"""A compacted network in channels_last never reaches oneDNN's broken kernel (uxlfoundation/oneDNN#6035)."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import copy
import sys
import torch
import torch.nn.functional as F
from torch import nn
from nets import ResNet, inputs
import demp_kernels as dk

def narrow(inputs, outputs, groups):
    return nn.Sequential(
        nn.Conv2d(3, inputs, 3, padding=1, bias=False), nn.BatchNorm2d(inputs), dk.DemPGELU(),
        nn.Conv2d(inputs, outputs, 1, stride=2, groups=groups, bias=False), nn.BatchNorm2d(outputs), dk.DemPGELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs, 5),
    )

case, size = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
torch.set_num_threads(2)
model = narrow(4, 10, 1) if case == "start" else narrow(16, 32, 4) if case == "grouped" else ResNet()
for path, module in list(model.named_modules()):
    if isinstance(module, dk.DemPReLU):  # has a kink: rounding on the other side of it is no rounding of the gradient
        model.set_submodule(path, dk.DemPGELU())
graph = dk.UnitGraph.trace(model, inputs())
if case == "device":
    graph.floors = [floor for floor in graph.floors if floor.count == 1]  # as for a model on another device
dead = {name: torch.arange(units) >= 3 for name, units in graph.units.items()}
if case == "start":
    dead = {"5": torch.arange(10) >= 8}
elif case == "grouped":
    dead = {"2": torch.arange(16) % 4 == 3, "5": torch.arange(32) % 8 >= 6}
assert dk.compact(model, None, dead=dead, graph=graph).changed
strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride == (2, 2)]
assert strided[0].weight.shape[1] in {"floor": (8, 16), "device": (3,), "start": (4,), "grouped": (3,)}[case]

plain = copy.deepcopy(model)  # torch.nn's convolutions in NCHW; a 1x1 kernel's strides say so only if it was allocated so
for module in plain.modules():
    if isinstance(module, nn.Conv2d):
        module.__class__ = nn.Conv2d
        module.weight.data = torch.empty(module.weight.shape).copy_(module.weight.data)
model.to(memory_format=torch.channels_last)
seen = {}
for conv in strided:
    conv.register_forward_hook(lambda m, i, o: seen.__setitem__(m, [i[0].detach()]))
    conv.register_full_backward_hook(lambda m, i, o: seen[m].append(o[0].detach()))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(200):
    x, y = torch.randn(16, 3, size, size).contiguous(memory_format=torch.channels_last), torch.randint(5, (16,))
    with torch.no_grad():
        for one, other in zip(plain.parameters(), model.parameters()):
            one.copy_(other)
    for network, images in ((model, x), (plain, x.contiguous())):
        network.zero_grad()
        F.cross_entropy(network(images), y).backward()
    expected, found = (torch.cat([p.grad.flatten() for p in network.parameters()]) for network in (plain, model))
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-3, (step, error)
    for conv, (given, grad) in seen.items():
        n, groups = len(given), conv.groups
        grads, pixels = (t.double().reshape(n, groups, -1, *t.shape[2:]) for t in (grad, given[:, :, ::2, ::2]))
        expected = torch.einsum("ngohw,ngihw->goi", grads, pixels).flatten(0, 1)
        torch.testing.assert_close(conv.weight.grad[:, :, 0, 0].double(), expected, rtol=1e-4, atol=1e-5)
    optimizer.step()
print("ok")
"""


@pytest.mark.parametrize("case, instructions, size", [
    ("floor", "ALL", 32), ("device", "AVX2", 32), ("start", "AVX2", 32), ("start", "ALL", 128), ("grouped", "AVX2", 32),
    ("grouped", "ALL", 32),
])
def test_two_hundred_steps_of_a_very_narrow_network(case: str, instructions: str, size: int) -> None:
    """The kernel hangs, crashes or is wrong run by run: tried in a process of its own, all gradients of every step compared
    with NCHW, and that of the convolution worked out anew as well. AVX2's version fails with smaller images than AVX-512's.

    floor: compaction keeps the inputs that the kernel needs. device: it did not when the model was analysed. start: there
    were fewer from the start. grouped: takes another kernel."""
    # spinning threads take minutes beside other work
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, case, str(size)], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
