"""Torch-Pruning in the comparison: the sparsity reached, the optimiser's parameters, a package that is missing."""
from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from demp_kernels.cli import main
from demp_kernels.recipes.errors import RecipeError
from demp_kernels.recipes.loop import Training, read_data
from demp_kernels.recipes.outside import OUTSIDE, TorchPruning, _adopt
from demp_kernels.recipes.settings import TrainSettings
from demp_kernels.strided import SubsampledConv2d

SMALL = [
    "compare", "--model", "resnet18", "--width", "8", "--train-size", "160", "--batch-size", "32", "--epochs", "4", "--image-size", "8",
    "--lr", "0.01", "--threads", "1", "--seeds", "1", "--sparsity", "0.5",
]


def test_both_reach_the_sparsity_and_go_on_training(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    assert main([*SMALL, "--methods", "dense", *OUTSIDE, "--out", str(tmp_path)]) == 0
    with (tmp_path / "runs.csv").open() as file:
        runs = {row["method"]: row for row in csv.DictReader(file)}
    assert set(runs) == {"dense", *OUTSIDE}
    for name in OUTSIDE:
        assert 0.5 <= float(runs[name]["sparsity"]) < 0.6
        # a quarter, or half of the run was dense
        assert 0.3 < int(runs[name]["train_flops"]) / int(runs["dense"]["train_flops"]) < 0.95
    assert "Torch-Pruning, magnitude" in (tmp_path / "table.md").read_text()


def test_what_it_cut_is_in_the_layout_of_the_run_and_clear_of_the_broken_kernel() -> None:
    """In channels_last a run went on for ever in oneDNN's kernel for strided 1x1 convolutions of few inputs."""
    pytest.importorskip("torch_pruning")
    settings = TrainSettings(width=8, image_size=8, train_size=160, batch_size=32, epochs=1, lr=0.01, threads=1).resolved()
    training = Training(settings, TorchPruning("tp-magnitude", 0.5), read_data(settings), [])
    before = sum(p.numel() for p in training.model.parameters())
    training.run()
    assert sum(p.numel() for p in training.model.parameters()) <= 0.5 * before
    convolutions = [m for m in training.model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    narrow = [m for m in convolutions if m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < 16]
    assert len(narrow) > 1 and all(isinstance(m, SubsampledConv2d) for m in narrow)


def test_the_optimiser_has_the_parameters_that_took_the_others_place() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = dict(model.named_parameters())
    model[0].weight = nn.Parameter(torch.zeros(2, 3))
    _adopt(optimizer, before, dict(model.named_parameters()))
    assert optimizer.param_groups[0]["params"][0] is model[0].weight and optimizer.param_groups[0]["lr"] == 0.5
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert before["0.weight"] not in optimizer.state and model[1].weight in optimizer.state


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(RecipeError, match="the method tp-magnitude needs torch-pruning.*: pip install torch-pruning$"):
        TorchPruning("tp-magnitude", 0.5)


def test_a_missing_package_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    assert main([*SMALL, "--methods", "dense", "tp-group-lasso", "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("demp compare: error: the method tp-group-lasso needs torch-pruning") and output.out == ""
    assert not (tmp_path / "out").exists()
