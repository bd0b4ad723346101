"""`demp coverage`: an exact model, one that is compacted wrongly, one that is refused, files and flags."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from demp_kernels.bench import coverage
from demp_kernels.bench.coverage import CoverageRow, cover, read_coverage, write_coverage
from demp_kernels.cli import main


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(12, 8, 3), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_an_exact_model() -> None:
    row = cover("chain", chain, images())
    assert (row.units, row.removable, row.refused, row.prepared) == (20, 18, "", True)
    assert 0 < row.removed == row.dead and row.params_after < row.params_before
    assert row.eval_error < 1e-12 and row.train_error < 1e-12


def test_a_wrong_compaction_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = coverage.compact
    monkeypatch.setattr(
        coverage, "compact", lambda *args, dead, **options: right(*args, dead={k: ~m for k, m in dead.items()}, **options)
    )
    row = cover("chain", chain, images())
    assert row.refused or row.eval_error > 1e-3


def test_units_that_others_need_stay_with_the_reason() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.act, self.last = nn.Linear(3, 16), nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean((2, 3))
            return self.last(self.act(self.first(x)) * self.second(x).sigmoid().cumsum(1))

    row = cover("sum", Sum, images())
    assert row.removed < row.dead and row.kept and row.eval_error < 1e-12


def test_a_model_that_cannot_be_captured_is_a_row() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x.mean((2, 3)))
            return y if bool(y.sum() > 0) else -y

    row = cover("branch", Branch, images())
    assert "torch.export cannot capture" in row.refused and row.removed == 0


def test_rows_come_back_from_the_file(tmp_path: Path) -> None:
    rows = [
        CoverageRow("a", True, 20, 18, 9, 9, 1000, 400, 1e-15, 2e-15, 0.5, "other layers need them (2x)"),
        CoverageRow("b", False, seconds=1.0, refused="no | way"),
    ]
    write_coverage(tmp_path, rows, "torch X")
    assert read_coverage(tmp_path / "coverage.csv") == rows
    text = (tmp_path / "coverage.md").read_text()
    assert "| a | 20 | 18 | 9 | 9 | 1,000 -> 400 | 1e-15 | 2e-15 |" in text and "refused: no / way" in text


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "squeezenet1_1", "--out", str(tmp_path)]) == 0
    assert "squeezenet1_1: " in capsys.readouterr().out
    (row,) = read_coverage(tmp_path / "coverage.csv")
    assert row.removed > 1000 and row.eval_error < 1e-12 and row.train_error < 1e-12


def test_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "resnet-18"]) == 2
    assert "model must be one of torchvision's" in capsys.readouterr().err
