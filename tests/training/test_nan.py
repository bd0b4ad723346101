"""NaN and infinity in a training run: such units count as live, under both criteria, and the report and a warning name them."""
from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import demp_kernels as dk
from demp_kernels.training.liveness import not_finite

BAD = [math.nan, math.inf]


def build(**options: object) -> tuple[nn.Module, torch.optim.Optimizer, dk.DemP]:
    torch.manual_seed(0)
    model = dk.prepare(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return model, optimizer, dk.DemP(model, optimizer, total_steps=8, prune_every=2, peak_penalty=0.0, peak_noise=0.0, **options)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("criterion", ["window", "scan"])
@pytest.mark.parametrize("fuse", [True, False])
def test_such_units_are_alive_and_named(criterion: str, value: float, fuse: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        net[1].weight.fill_(0.0)
        net[1].bias.fill_(-1.0)  # all dead, but for the two
        net[1].bias[2] = value
        net[1].bias[4] = 1.0
    model = dk.prepare(net, torch.randn(8, 4), fuse=fuse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(8, 4)
    demp = dk.DemP(
        model, optimizer, total_steps=8, prune_every=2, peak_penalty=0.0, peak_noise=0.0, criterion=criterion, scan_batches=[x]
    )
    model(x)
    demp.step()
    model(x)
    with pytest.warns(RuntimeWarning, match=r"NaN or infinity in 1\.bias after step 2: units that it reaches count as live"):
        report = demp.step()
    assert report is not None and sum(report.removed.values()) == 4 and demp.report().live == 2
    assert demp.report().not_finite == ("1.bias",)
    assert str(demp.report()).endswith("NaN or infinity in 1.bias")


def test_the_warning_comes_once_and_the_report_says_how_it_is_now() -> None:
    model, _, demp = build()
    x = torch.randn(8, 4)
    with torch.no_grad():
        model.get_submodule("0").weight[1, 2] = math.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            model(x)
            demp.step()
    assert [w.category for w in caught] == [RuntimeWarning]
    # the batch statistics carry it into a buffer
    assert demp.report().not_finite[0] == "0.weight" and "1.running_mean" in demp.report().not_finite
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.nan_to_num_()
    for _ in range(2):
        model(x)
        demp.step()
    assert demp.report().not_finite == () and "NaN" not in str(demp.report())


def test_many_names_are_counted() -> None:
    model, _, demp = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    demp.step()
    with pytest.warns(RuntimeWarning, match="NaN or infinity in 0.weight, 0.bias, 1.weight and 3 more"):
        demp.step()


def test_types_are_looked_at_each_for_itself() -> None:
    """The largest of float64 is finite, though no float32 is; what has no dense values is left out."""
    model = nn.Module()
    for name, tensor in {
        "w": torch.full((3,), 1e300, dtype=torch.float64), "h": torch.tensor([65504.0], dtype=torch.float16),
        "broken": torch.tensor([0.0, -math.inf], dtype=torch.bfloat16), "empty": torch.empty(0), "count": torch.tensor(7),
        "sparse": torch.eye(3).to_sparse(), "later": torch.empty(2, device="meta"), "plain": torch.ones(2),
    }.items():
        model.register_buffer(name, tensor)
    assert not_finite(model) == ("broken",)


def test_a_part_in_evaluation_mode_is_named_once() -> None:
    model, _, demp = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    norm_alone = model.get_submodule("2")
    norm_alone.eval()
    x = torch.randn(8, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            model(x)
            demp.step()
    assert [str(one.message) for one in caught] == ["2: in evaluation mode at step 2, in which nothing is counted and no unit dies"]
    assert caught[0].filename == __file__ and demp.live_units == demp.total_units
