"""The controller: schedule, penalty, noise on live units only, when units are removed, and what a checkpoint brings back."""
from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import demp_kernels as dk
from demp_kernels.training.schedule import one_cycle


class Net(nn.Module):
    """conv-BN-ReLU, a residual block with an identity skip, a linear head: 6 + 6 + 6 units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        y = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(y)) + x)
        return self.head(x.mean((2, 3)))


def build(**options: Any) -> tuple[Any, torch.optim.Optimizer, dk.DemP]:
    torch.manual_seed(0)
    model = dk.prepare(Net(), torch.randn(2, 2, 5, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings: dict[str, Any] = {"total_steps": 20, "prune_every": 5, "seed": 7} | options
    return model, optimizer, dk.DemP(model, optimizer, **settings)


def silence(model: Any, norm: str, units: list[int]) -> None:
    """Make units dead for good: a strongly negative offset that the penalty and the optimiser will not undo."""
    with torch.no_grad():
        model.get_submodule(norm).weight[units] = 0
        model.get_submodule(norm).bias[units] = -50


def train(model: Any, optimizer: Any, demp: dk.DemP, steps: int, generator: torch.Generator) -> list[float]:
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 2, 5, 5, generator=generator)
        target = torch.randint(3, (8,), generator=generator)
        loss = F.cross_entropy(model(x), target) + demp.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        demp.step()
        losses.append(loss.item())
    return losses


def test_penalty_is_l1_on_scales_with_clean_subgradient() -> None:
    model, _, demp = build(peak_penalty=0.5)
    with torch.no_grad():
        model.norm1.weight.copy_(torch.tensor([-2.0, 0.0, 1.0, 3.0, -1.0, 0.5]))
    weight = one_cycle(0, int(0.87 * 20), 0.5)
    assert demp.penalty_weight == weight
    value = demp.penalty()
    assert value.item() == pytest.approx(weight * (6 + 7.5 + 6), rel=1e-6)
    value.backward()
    torch.testing.assert_close(model.norm1.weight.grad, weight * torch.tensor([-1.0, 0.0, 1.0, 1.0, -1.0, 1.0]))
    assert model.norm1.bias.grad is None and model.stem.weight.grad is None


@pytest.mark.parametrize(
    ("norm", "on", "expected"),
    [
        ("l2", "scales", lambda m: sum(0.5 * n.weight.square().sum() for n in (m.norm0, m.norm1, m.norm2))),
        ("positive", "offsets", lambda m: sum(n.bias.clamp(min=0).sum() for n in (m.norm0, m.norm1, m.norm2))),
        ("l1", "weights", lambda m: sum(p.abs().sum() for p in m.parameters() if p.dim() > 1)),
        ("l2", "all", lambda m: sum(0.5 * p.square().sum() for p in m.parameters())),
    ],
)
def test_other_penalties(norm: str, on: str, expected: Any) -> None:
    model, _, demp = build(peak_penalty=1.0, penalty_norm=norm, penalty_on=on, schedule="constant")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    torch.testing.assert_close(demp.penalty(), expected(model))


@pytest.mark.parametrize("norm", ["l1", "l2", "positive"])
@pytest.mark.parametrize("on", ["scales", "all"])
def test_penalised_gradients_are_those_of_the_penalty(norm: str, on: str) -> None:
    model, _, demp = build(peak_penalty=0.7, penalty_norm=norm, penalty_on=on, schedule="constant")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.norm1.weight[0] = 0
    demp.penalty().backward()
    expected = {name: 3 * p.grad for name, p in model.named_parameters() if p.grad is not None}
    first = next(iter(expected))
    model.zero_grad()
    model.get_parameter(first).grad = torch.ones_like(model.get_parameter(first))
    demp.penalise_gradients(scale=3.0)
    expected[first] += 1
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_schedule_advances_with_the_steps() -> None:
    model, optimizer, demp = build(peak_penalty=0.01)
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(20):
        seen.append((demp.penalty_weight, demp.noise_std))
        train(model, optimizer, demp, 1, generator)
    ramp = int(0.87 * 20)
    assert seen == [(one_cycle(t, ramp, 0.01), one_cycle(t, ramp, 5e-5)) for t in range(20)]


def test_noise_reaches_live_units_only_and_never_the_moments() -> None:
    model, optimizer, demp = build(peak_noise=0.1, peak_penalty=0.0, prune_every=100, schedule="constant")
    silence(model, "norm1", [1, 4])
    silence(model, "norm2", [2])
    with torch.no_grad():
        model.norm2.bias[2] = -500  # the skip adds to it
    model(torch.randn(16, 2, 5, 5)).sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    demp.step()
    change = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    dead, live = [1, 4], [0, 2, 3, 5]
    for name in ("conv1.weight", "norm1.weight", "norm1.bias"):
        assert not change[name][dead].any(), name
        assert change[name][live].abs().min() > 0, name
    for name in ("conv2.weight", "norm2.weight", "norm2.bias"):
        assert not change[name][2].any(), name
    everything = torch.cat([c[c != 0].flatten() for c in change.values()])
    assert 0.09 < everything.std() < 0.11 and everything.mean().abs() < 0.01
    assert not optimizer.state
    assert change["head.weight"].all() and change["stem.weight"].all()


def test_a_frozen_parameter_gets_no_noise() -> None:
    model, _, demp = build(peak_noise=0.1, schedule="constant")
    model.head.weight.requires_grad_(False)
    before = model.head.weight.clone()
    model(torch.randn(4, 2, 5, 5))
    demp.step()
    assert torch.equal(model.head.weight, before)


def test_dead_units_leave_at_the_set_steps_with_the_optimizer_state() -> None:
    model, optimizer, demp = build(peak_penalty=0.0, prune_after=6)
    generator = torch.Generator().manual_seed(2)
    names = list(demp.total_units)
    inner = next(n for n in names if demp.graph.gates["conv1.weight"] == n)
    silence(model, "norm1", [0, 3, 5])
    parameters = list(model.parameters())
    reports: list[Any] = []
    demp.on_compaction.append(reports.append)
    train(model, optimizer, demp, 9, generator)
    assert demp.live_units == demp.total_units and not reports
    train(model, optimizer, demp, 1, generator)
    assert demp.live_units[inner] == 3 and len(reports) == 1
    assert model.conv1.weight.shape == (3, 6, 3, 3) and model.conv2.weight.shape == (6, 3, 3, 3)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    for parameter in model.parameters():
        for value in optimizer.state[parameter].values():
            assert value.dim() == 0 or value.shape == parameter.shape
    silence(model, "norm1", [1])
    train(model, optimizer, demp, 10, generator)
    report = demp.report()
    assert report.live_units[inner] == 2 and [e.step for e in report.history] == [10, 15]
    assert report.live == sum(demp.live_units.values()) and "step 20 of 20" in str(report)


def test_removal_after_the_last_step() -> None:
    model, optimizer, demp = build(total_steps=7, prune_every=100, peak_penalty=0.0)
    silence(model, "norm0", [2])
    train(model, optimizer, demp, 7, torch.Generator().manual_seed(3))
    assert model.stem.weight.shape[0] == 5


@pytest.mark.parametrize(("options", "looks"), [
    ({}, [4, 10]), ({"prune_every": 5}, [5, 10]), ({"prune_every": 20}, [10]),
    ({"criterion": "scan", "scan_batches": [torch.randn(4, 2, 5, 5)]}, [4, 8, 10]),
])
def test_no_window_is_shorter_than_prune_every(options: dict[str, Any], looks: list[int]) -> None:
    model, optimizer, demp = build(**{"total_steps": 10, "prune_every": 4, "on_dead": "report"} | options)
    found = []
    for step in range(1, 11):
        model(torch.randn(4, 2, 5, 5)).sum().backward()
        if demp.step() is not None:
            found.append(step)
    assert found == looks


def test_a_layer_keeps_min_units() -> None:
    model, optimizer, demp = build(min_units=2, peak_penalty=0.0)
    silence(model, "norm1", [0, 1, 2, 3, 4, 5])
    train(model, optimizer, demp, 5, torch.Generator().manual_seed(3))
    assert model.conv1.weight.shape[0] == 2


def test_scan_removes_by_the_sum_over_batches() -> None:
    batches = [torch.randn(8, 2, 5, 5), torch.randn(8, 2, 5, 5)]
    calls = []

    def fresh() -> list[torch.Tensor]:
        calls.append(1)
        return batches

    model, optimizer, demp = build(criterion="scan", scan_batches=fresh, peak_penalty=0.0)
    silence(model, "norm1", [4])
    train(model, optimizer, demp, 5, torch.Generator().manual_seed(3))
    assert calls == [1] and model.conv1.weight.shape[0] == 5 and model.training


def test_training_goes_on_while_the_last_loss_is_still_referenced() -> None:
    model, optimizer, demp = build(peak_penalty=0.0, prune_every=1)
    silence(model, "norm1", [4])
    for _ in range(3):
        loss = F.cross_entropy(model(torch.randn(4, 2, 5, 5)), torch.tensor([0, 1, 2, 0])) + demp.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        demp.step()
    assert model.conv1.weight.shape[0] == 5


@pytest.mark.parametrize("stop", [3, 5, 12])
def test_a_checkpoint_continues_bit_for_bit(stop: int, tmp_path: Path) -> None:
    def start() -> tuple[Any, Any, dk.DemP]:
        model, optimizer, demp = build(peak_penalty=0.05)
        silence(model, "norm1", [1, 2])
        silence(model, "norm2", [3])
        with torch.no_grad():
            model.norm2.bias[3] = -500
        return model, optimizer, demp

    model, optimizer, demp = start()
    generator = torch.Generator().manual_seed(5)
    train(model, optimizer, demp, stop, generator)
    dk.save_checkpoint(tmp_path / "run.pt", model, optimizer, demp, extra={"data": generator.get_state()})
    expected = train(model, optimizer, demp, 20 - stop, generator)

    fresh = build(peak_penalty=0.05)
    extra = dk.load_checkpoint(tmp_path / "run.pt", *fresh)
    assert fresh[2].steps_done == stop
    resumed = torch.Generator()
    resumed.set_state(extra["data"])
    assert train(*fresh, 20 - stop, resumed) == expected
    assert fresh[2].live_units == demp.live_units
    for (name, a), b in zip(model.state_dict().items(), fresh[0].state_dict().values()):
        assert torch.equal(a, b), name
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_checkpoints_that_are_none(tmp_path: Path) -> None:
    model, optimizer, demp = build()
    with pytest.raises(FileNotFoundError):
        dk.load_checkpoint(tmp_path / "missing.pt", model)
    (tmp_path / "noise.pt").write_bytes(b"\x80\x02garbage")
    with pytest.raises(dk.CheckpointError, match="not a readable checkpoint"):
        dk.load_checkpoint(tmp_path / "noise.pt", model)
    torch.save({"model": 1}, tmp_path / "foreign.pt")
    with pytest.raises(dk.CheckpointError, match="is not a demp_kernels checkpoint"):
        dk.load_checkpoint(tmp_path / "foreign.pt", model)
    dk.save_checkpoint(tmp_path / "good.pt", model, optimizer, demp)
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(dk.CheckpointError, match="not a readable checkpoint"):
        dk.load_checkpoint(tmp_path / "cut.pt", model)
    with pytest.raises(dk.CheckpointError, match="does not fit"):
        dk.load_checkpoint(tmp_path / "good.pt", dk.prepare(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.randn(2, 2)))


def test_a_failed_save_keeps_the_last_good_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, demp = build()
    path = tmp_path / "run.pt"
    dk.save_checkpoint(path, model, optimizer, demp)
    good = path.read_bytes()

    def full(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        dk.save_checkpoint(path, model, optimizer, demp)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_on_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(38, "Function not implemented")

    flush = os.fsync
    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(os, "fsync", lambda file: unsupported() if stat.S_ISDIR(os.fstat(file).st_mode) else flush(file))
    model, optimizer, demp = build()
    dk.save_checkpoint(tmp_path / "run.pt", model, optimizer, demp, extra={"mine": 1})
    assert dk.load_checkpoint(tmp_path / "run.pt", *build()) == {"mine": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"total_steps": 0}, ValueError, "total_steps must be >= 1 and finite, got 0"),
        ({"total_steps": 2.5}, TypeError, "total_steps must be an integer >= 1, got 2.5"),
        ({"peak_penalty": -1}, ValueError, "peak_penalty must be >= 0.0 and finite, got -1"),
        ({"peak_penalty": float("nan")}, ValueError, "peak_penalty must be >= 0.0 and finite, got nan"),
        ({"peak_noise": "0.1"}, TypeError, "peak_noise must be a number >= 0.0, got '0.1'"),
        ({"peak_noise": float("inf")}, ValueError, "peak_noise must be >= 0.0 and finite, got inf"),
        ({"prune_every": 0}, ValueError, "prune_every must be >= 1"),
        ({"prune_after": -1}, ValueError, "prune_after must be >= 0"),
        ({"ramp_steps": 0}, ValueError, "ramp_steps must be >= 1"),
        ({"schedule": "cosine"}, ValueError, "schedule must be one of one_cycle, constant, .*got 'cosine'"),
        ({"criterion": "magic"}, ValueError, "criterion must be one of window, scan, got 'magic'"),
        ({"criterion": "scan"}, ValueError, "requires scan_batches, got None"),
        ({"penalty_norm": "l0"}, ValueError, "penalty_norm must be one of"),
        ({"penalty_on": "biases"}, ValueError, "penalty_on must be one of"),
        ({"round_to": 0}, ValueError, "round_to must be >= 1"),
        ({"min_units": True}, TypeError, "min_units must be an integer >= 1, got True"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build(**options)


def test_bad_models_and_optimizers() -> None:
    plain = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="must have DemP activations, got none in Sequential"):
        dk.DemP(plain, optimizer, total_steps=5)
    dk.swap_activations(plain)
    with pytest.raises(ValueError, match="example_inputs is required"):
        dk.DemP(plain, optimizer, total_steps=5)
    with pytest.raises(ValueError, match="use penalty_on='weights'"):
        dk.DemP(plain, optimizer, total_steps=5, example_inputs=torch.randn(1, 2))
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer or a list of them, got str"):
        dk.DemP(plain, "adam", total_steps=5, example_inputs=torch.randn(1, 2))  # type: ignore[arg-type]


def test_followers_get_the_widths_of_a_checkpoint(tmp_path: Path) -> None:
    def start() -> tuple[Any, Any, dk.DemP, Any]:
        model, optimizer, _ = build()
        average = torch.optim.swa_utils.AveragedModel(model)
        return model, optimizer, dk.DemP(model, optimizer, total_steps=20, prune_every=5, followers=average), average

    model, optimizer, demp, average = start()
    silence(model, "norm1", [1, 2])
    train(model, optimizer, demp, 5, torch.Generator().manual_seed(5))
    average.update_parameters(model)
    dk.save_checkpoint(tmp_path / "run.pt", model, optimizer, demp, extra={"average": average.state_dict()})
    *run, fresh = start()
    fresh.load_state_dict(dk.load_checkpoint(tmp_path / "run.pt", *run)["average"])
    assert fresh.module.conv1.weight.shape[0] == 4
    torch.testing.assert_close(dict(fresh.state_dict()), dict(average.state_dict()), rtol=0, atol=0)
