"""SubsampledConv2d: what nn.Conv2d computes, without its kernel; where compaction puts it, and what becomes of it."""
from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import demp_kernels as dk
from demp_kernels.strided import SubsampledConv2d, avoid_broken_kernel

X = torch.randn(3, 3, 9, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 10, 1, stride=2), nn.ReLU(), nn.Conv2d(10, 2, 3)
    )


def compacted(model: nn.Module, *followers: nn.Module) -> nn.Module:
    report = dk.compact(model, None, X, dead={"3": torch.arange(10) >= 7}, followers=followers)
    assert report.changed
    return model


@pytest.mark.parametrize("stride", [(2, 2), (2, 1), (1, 3), (4, 4)])
@pytest.mark.parametrize("shape", [(3, 4, 9, 8), (4, 6, 7), (2, 4, 1, 1), (0, 4, 6, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_strided_convolution(stride: tuple[int, int], shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 5, 1, stride, bias=bias, dtype=torch.float64)
    other = SubsampledConv2d(4, 5, 1, stride, bias=bias, dtype=torch.float64)
    other.load_state_dict(conv.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grads = []
    for module in (conv, other):
        y = module(x)
        grads.append(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))
    torch.testing.assert_close(other(x), conv(x))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_alike(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(4, 5, 1, 2, dtype=dtype)
    other = copy.deepcopy(conv)
    avoid_broken_kernel(other)
    assert type(other) is SubsampledConv2d
    x = torch.randn(2, 4, 6, 6).to(dtype)
    torch.testing.assert_close(other(x), conv(x))


class Own(nn.Conv2d):
    pass


@pytest.mark.parametrize("module, expected", [
    (nn.Conv2d(15, 3, 1, 2), SubsampledConv2d),
    (nn.Conv2d(1, 3, 1, (1, 2)), SubsampledConv2d),
    (nn.Conv2d(4, 3, 1, 2, padding="valid"), SubsampledConv2d),
    (nn.Conv2d(16, 3, 1, 2), nn.Conv2d),
    (nn.Conv2d(4, 3, 1), nn.Conv2d),
    (nn.Conv2d(4, 3, 3, 2), nn.Conv2d),
    (nn.Conv2d(4, 3, 1, 2, padding=1), nn.Conv2d),
    (nn.Conv2d(4, 4, 1, 2, groups=2), nn.Conv2d),
    (Own(4, 3, 1, 2), Own),
    (nn.Conv3d(4, 3, 1, 2), nn.Conv3d),
    (nn.ConvTranspose2d(4, 3, 1, 2), nn.ConvTranspose2d),
    (nn.Linear(4, 3), nn.Linear),
])
def test_only_what_would_run_into_the_kernel(module: nn.Module, expected: type[nn.Module]) -> None:
    avoid_broken_kernel(module)
    assert type(module) is expected


def test_compaction_puts_it_in_the_model_and_its_followers() -> None:
    model = net()
    follower, conv = copy.deepcopy(model), model[2]
    dense = model(X)
    compacted(model, follower)
    for one in (model, follower):
        assert type(one[2]) is SubsampledConv2d and one[2].weight.shape == (7, 12, 1, 1)
    assert model[2] is conv and dense.shape == model(X).shape
    # the counters' own removals, traced anew, with constants folded through it
    report = dk.compact(model, None, X, dead={"1": torch.arange(12) >= 9}, fold_batches=[X])
    assert model[2].in_channels == 9 and report.folded["2"].into == "2.bias"


def test_it_is_shrunk_to_copied_pickled_and_prepared() -> None:
    model = compacted(net())
    loaded = net()
    dk.shrink_to(loaded, model.state_dict(), X)
    ways = [loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), dk.prepare(model, X)]
    for other in ways:
        assert type(other.get_submodule("2")) is SubsampledConv2d and list(other.state_dict()) == list(model.state_dict())
        assert torch.equal(other(X), model(X))


FINISHED = """
import sys
sys.modules["demp_kernels"] = None  # importing it fails from here on
import torch
model, x, expected = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(model(x), expected)
model.train()(x).sum().backward()
assert model.get_submodule("2").weight.grad.abs().sum() > 0
"""


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_finalize_makes_a_plain_module_that_stays_clear_of_the_kernel(prepared: bool, tmp_path: Path) -> None:
    model = compacted(dk.prepare(net(), X) if prepared else net())
    plain = dk.finalize(model)
    assert list(plain.state_dict()) == list(model.state_dict()) and torch.equal(plain(X), model(X))
    assert not any(type(module).__module__.startswith("demp_kernels") for module in plain.modules())
    used = {node.target for node in torch.export.export(plain, (X,)).graph.nodes}
    assert torch.ops.aten.avg_pool2d.default in used
    assert torch.equal(torch.jit.script(copy.deepcopy(plain))(X), model(X))
    torch.save((plain, X, model(X).detach()), tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", FINISHED, str(tmp_path / "model.pt")], capture_output=True, text=True, timeout=120,
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_a_convolution_on_its_own_is_finalized() -> None:
    conv = SubsampledConv2d(4, 3, 1, 2)
    buffer = io.BytesIO()
    torch.save(dk.finalize(conv), buffer)
    assert b"demp_kernels" not in buffer.getvalue()
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(dk.finalize(conv)(x), conv(x))
