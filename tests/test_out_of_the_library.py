"""Finished networks leave the library: exported, traced, quantised, pickled, loaded where demp_kernels is not installed."""
from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import demp_kernels as dk
from demp_kernels.graph.capture import capture

X = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block with an identity skip, functional activations and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        y = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(y)) + x)
        return self.head(F.gelu(self.hidden(x.mean((2, 3)))))


def prepared() -> Any:
    torch.manual_seed(0)
    return dk.prepare(Net(), X)


def compacted() -> Any:
    """A prepared network whose addition selects: its skip has lost other channels than its sum."""
    model = prepared()
    graph = dk.UnitGraph.trace(model, X)
    stem, inner, out, _ = graph.units
    dead = {stem: torch.arange(8) < 2, inner: torch.arange(8) > 4, out: torch.arange(8) > 5}
    with torch.no_grad():  # dead in earnest, so that the removal is exact
        for norm, units in (("norm0", slice(0, 2)), ("norm1", slice(5, 8)), ("norm2", slice(6, 8))):
            model.get_submodule(norm).weight[units], model.get_submodule(norm).bias[units] = 0, -50
    dk.compact(model, dead=dead, graph=graph)
    assert model.norm2.add.index is not None
    for _ in range(2):
        model(X)
    return model.eval()


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return dk.finalize(compacted()).eval()


@pytest.fixture(scope="module")
def expected(plain: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return plain(X)


def test_finalised_is_the_same_function_of_plain_modules(expected: torch.Tensor, plain: nn.Module) -> None:
    assert torch.equal(expected, compacted()(X))
    for thing in [*plain.modules(), *(node.target for node in plain.graph.nodes if callable(node.target))]:
        assert not getattr(type(thing), "__module__", "").startswith("demp_kernels")
        assert not (getattr(thing, "__module__", None) or "").startswith("demp_kernels")


def export(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},)), buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


def script(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.jit.script(model)


def trace(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.jit.freeze(torch.jit.trace(model, X))


def compiled(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.compile(model, fullgraph=True)


def onnx(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    buffer = io.BytesIO()
    torch.onnx.export(model, (X,), dynamo=True, verbose=False).save(buffer)
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("way", [export, script, trace, compiled, onnx, copied, saved], ids=lambda f: f.__name__)
def test_a_finished_network_leaves_by(way: Any, plain: nn.Module, expected: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(way(copy.deepcopy(plain))(X), expected, rtol=1e-5, atol=1e-5)


def test_int8_by_torchao(plain: nn.Module, expected: torch.Tensor) -> None:
    quantization = pytest.importorskip("torchao.quantization", exc_type=Exception)
    model = copy.deepcopy(plain)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert "int8" in str(model.get_submodule("hidden").weight).lower()
    with torch.no_grad():
        error = (model(X) - expected).norm() / expected.norm()
    assert 0 < error < 0.02


WITHOUT = """
import sys
sys.modules["demp_kernels"] = None  # importing it fails from here on
import torch
model, x, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(x), expected)
model.train()(x).sum().backward()
assert all(p.grad is not None for p in model.parameters())
assert not any(name.startswith("demp_kernels") for name, module in sys.modules.items() if module is not None)
"""


def test_it_loads_where_demp_kernels_is_not_installed(plain: nn.Module, expected: torch.Tensor, tmp_path: Path) -> None:
    torch.save((plain, X, expected), tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path / "model.pt")], capture_output=True, text=True, timeout=120,
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


# --- copies and processes, while it still is in training ---


def set_up(model: Any) -> tuple[Any, torch.optim.Optimizer, dk.DemP]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, dk.DemP(model, optimizer, total_steps=6, prune_every=3, peak_penalty=0.01, seed=3)


def train(run: tuple[Any, torch.optim.Optimizer, dk.DemP]) -> torch.Tensor:
    model, optimizer, demp = run
    model.train()
    for _ in range(6):
        (F.cross_entropy(model(X), torch.tensor([0, 1, 2, 0])) + demp.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        demp.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("make", [prepared, compacted])
@pytest.mark.parametrize("way", [copied, saved])
def test_a_copy_trains_like_the_original_and_apart_from_it(make: Any, way: Any) -> None:
    model = make()
    other = way(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = train(set_up(other))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(train(set_up(model)), trained)


def test_two_threads_train_two_networks() -> None:
    alone = [train(set_up(make())) for make in (prepared, compacted)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            together = list(pool.map(train, [set_up(prepared()), set_up(compacted())]))
            assert all(map(torch.equal, together, alone))


def test_two_threads_analyse_two_networks() -> None:
    """One after the other, behind a lock; training beside an analysis is right to rounding."""
    alone = [train(set_up(make())) for make in (prepared, compacted)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda model: train(set_up(model)), [prepared(), compacted()]))
    for found, expected in zip(together, alone):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


class StepMeanwhile(nn.Module):
    """While its forward is exported, another thread goes half-way through a function like an optimiser's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.exporting, self.entered, self.leave = Event(), Event(), Event()

    def step(self) -> bool:
        return self.exporting.wait(60) and self.half_way()

    @torch.compiler.disable
    def half_way(self) -> bool:
        self.entered.set()
        return self.leave.wait(60)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.exporting.set()
        assert self.entered.wait(60)
        assert "half_way" not in str(torch.fx.traceback.get_current_meta()), "the other thread wrote into the export's notes"
        return self.net(x)


def test_a_step_that_an_analysis_overtakes() -> None:
    """While anything is exported, torch's functions that dynamo skips make notes in one dict of the process. Where two
    threads did at once, a step raised KeyError: 'custom'."""
    model = StepMeanwhile()
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(model.step)
        capture(model, (torch.randn(2, 4),))
        model.leave.set()
        assert step.result(60)


class Scored(Dataset):
    """Asks a network in the DataLoader's workers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return len(X)

    @torch.no_grad()
    def __getitem__(self, index: int) -> torch.Tensor:
        return self.model(X[index : index + 1])[0]


def test_networks_in_workers_that_are_spawned() -> None:
    """Sent by pickle to another process, which gives the same results; prepared, compacted and finished ones."""
    models = [prepared().eval(), compacted(), dk.finalize(compacted()).eval()]
    data = torch.utils.data.ConcatDataset([Scored(model) for model in models])
    loader = DataLoader(data, batch_size=len(X), num_workers=1, multiprocessing_context="spawn")
    with torch.no_grad():
        for model, found in zip(models, loader, strict=True):
            torch.testing.assert_close(found, model(X), rtol=1e-5, atol=1e-6)
