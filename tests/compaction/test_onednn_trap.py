"""A compacted ResNet in channels_last never reaches oneDNN's broken kernel (uxlfoundation/oneDNN#6035)."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
import torch.nn.functional as F
from nets import ResNet, inputs
import demp_kernels as dk

torch.manual_seed(0)
torch.set_num_threads(2)
model = ResNet()
graph = dk.UnitGraph.trace(model, inputs())
dead = {name: torch.arange(units) >= 3 for name, units in graph.units.items()}
report = dk.compact(model, None, dead=dead, graph=graph)
model.to(memory_format=torch.channels_last)
narrow = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1) and m.stride == (2, 2)]
assert narrow and report.live_units["stem.2"] == 3
seen = {}
for conv in narrow:
    conv.register_forward_hook(lambda m, i, o: seen.__setitem__(m, [i[0].detach()]))
    conv.register_full_backward_hook(lambda m, i, o: seen[m].append(o[0].detach()))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(200):
    x, y = torch.randn(16, 3, 16, 16).contiguous(memory_format=torch.channels_last), torch.randint(5, (16,))
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for conv, (given, grad) in seen.items():
        expected = torch.einsum("nohw,nihw->oi", grad.double(), given[:, :, ::2, ::2].double())
        torch.testing.assert_close(conv.weight.grad[:, :, 0, 0].double(), expected, rtol=1e-4, atol=1e-5)
    optimizer.step()
print("ok")
"""


def test_two_hundred_steps_of_a_very_narrow_network() -> None:
    """The kernel hangs, crashes or is wrong run by run: tried in a process of its own, its gradient worked out anew."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # spinning threads take minutes beside other work
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
