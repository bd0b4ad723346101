"""Constants that a bias cannot make up for: units that stand in for others at the borders of zero padding."""
from __future__ import annotations

import copy

import pytest
import torch
from fold_nets import GONE, IMAGES, MAPS, bits, dead_of, first, graph_of, head, made_constant, padded, units_gone
from torch import nn

import demp_kernels as dk
from demp_kernels.compaction.batches import Batches
from demp_kernels.compaction.fold import Folding


@pytest.mark.parametrize("kind", MAPS)
def test_another_constant_at_every_position_goes_exactly(kind: str) -> None:
    torch.manual_seed(0)
    make, stand_ins = MAPS[kind]
    gone = units_gone(stand_ins)
    net = made_constant(make(), gone=gone)
    graph, before = graph_of(net), {}
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for training in (True, False):
        before[training] = copy.deepcopy(net).train(training)(IMAGES)
    report = dk.compact(net, optimizer, graph=graph, dead={"2": gone}, fold_batches=[IMAGES[:4], IMAGES[4:]])
    assert report.removed == {"2": int(gone.sum()) - stand_ins}, report
    assert report.kept["2"].startswith(f"{stand_ins} dead unit{'s' if stand_ins > 1 else ''}: not zero, and ")
    assert f"needs {stand_ins} in place of others: no bias" in report.kept["2"]
    assert all(f.stand_ins == stand_ins and f.change < 1e-12 and f.change_without > 0.01 for f in report.folded.values())
    assert f"and {stand_ins} of the others" in str(report)
    for training, output in before.items():
        found = copy.deepcopy(net).train(training)(IMAGES)
        torch.testing.assert_close(found, output, rtol=1e-10, atol=1e-10)
    net.train()(IMAGES).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", MAPS)
def test_a_bias_alone_would_not_do(kind: str) -> None:
    """The nets above are a test of stand-ins only if a bias is no solution."""
    torch.manual_seed(0)
    make, stand_ins = MAPS[kind]
    net = made_constant(make(), gone=units_gone(stand_ins)).eval()
    graph, before = graph_of(net), net(IMAGES)
    for reader in graph.readers:
        reader.weight = None
    folding = Folding(
        [net], graph, {"2": units_gone(stand_ins)}, Batches([(IMAGES,)]), round_to=1, min_units=1, max_change=float("inf")
    )
    assert folding.keep.atoms.all(), "all stay: they are constant, and a bias is not exact"
    assert "would need a bias of its own at every position" in folding.kept["2"] and torch.equal(net(IMAGES), before)


def test_followers_have_stand_ins_with_constants_of_their_own() -> None:
    torch.manual_seed(0)
    net, copies = made_constant(MAPS["zero padding"][0]()).eval(), []
    for shift in (0.5, -0.3):
        copies.append(copy.deepcopy(net))
        with torch.no_grad():
            copies[-1][1].bias[GONE] += shift
            copies[-1][3].weight.mul_(1 + shift)
    before = [one(IMAGES) for one in (net, *copies)]
    report = dk.compact(net, None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES], followers=copies)
    assert report.removed == {"2": 3}
    for one, output in zip((net, *copies), before):
        torch.testing.assert_close(one(IMAGES), output, rtol=1e-10, atol=1e-10)


def test_a_stand_in_costs_nothing_where_units_stay_for_a_width() -> None:
    torch.manual_seed(0)
    net = made_constant(MAPS["zero padding"][0]()).eval()
    before = net(IMAGES)
    report = dk.compact(net, None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES], round_to=3)
    assert report.live_units["2"] == 9 and report.removed == {"2": 3}  # 8 live ones
    torch.testing.assert_close(net(IMAGES), before, rtol=1e-10, atol=1e-10)


def test_weights_that_something_else_reads_take_nothing_over() -> None:
    """Two layers share a weight: no stand-in, so the constants stay."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *first(nn.SiLU()), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), *head(12)
    )
    net[5].weight = net[3].weight
    net = made_constant(net).eval()
    before, state = net(IMAGES), bits(net)
    report = dk.compact(net, None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES])
    assert "2" not in report.removed and torch.equal(net(IMAGES), before) and all(map(torch.equal, bits(net), state))


def test_a_map_that_differs_from_unit_to_unit_stays() -> None:
    """Behind a padded depthwise convolution every channel has borders of its own: no unit can stand in for another."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *first(nn.SiLU()), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.SiLU(), nn.Conv2d(12, 7, 1), nn.ReLU(), *head(7)
    )
    net = made_constant(net).eval()
    graph, before, state = graph_of(net), net(IMAGES), bits(net)
    report = dk.compact(net, None, graph=graph, dead=dead_of(graph), fold_batches=[IMAGES])
    assert not report.changed and "5 would need a bias of its own at every position" in report.kept["4"]
    assert torch.equal(net(IMAGES), before) and all(map(torch.equal, bits(net), state))


@pytest.mark.parametrize("kernel, width", [(7, 128), (3, 512)])
def test_rounding_in_single_precision_is_no_map(kernel: int, width: int) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU(),
        nn.Conv2d(width, 16, kernel, padding=kernel // 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    ).eval()
    gone = torch.rand(width) < 0.9
    with torch.no_grad():
        net[1].weight[gone], net[1].bias[gone] = 0.0, torch.randn(int(gone.sum()))
        net[1].weight[~gone] *= 0.5
    x = torch.randn(2, 3, 16, 16)
    before = net(x)
    report = dk.compact(net, None, x, dead={"2": gone}, fold_batches=[x])
    assert report.removed == {"2": int(gone.sum()) - 1}
    torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision_is_folded(how: str) -> None:
    torch.manual_seed(0)
    net = padded().to(torch.bfloat16 if how == "bfloat16" else torch.float32)
    x = IMAGES.to(next(net.parameters()).dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        before = net(x)
        assert dk.compact(net, None, x, dead={"2": GONE}, fold_batches=[x]).removed == {"2": 3}
        torch.testing.assert_close(net(x), before, rtol=0.1, atol=0.1)


def test_batches_of_several_sizes() -> None:
    torch.manual_seed(0)
    net, large = padded(), torch.randn(3, 3, 11, 12, dtype=torch.float64)
    before = net(IMAGES), net(large)
    report = dk.compact(net, None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES, large])
    assert report.removed == {"2": 3} and report.estimated_change["3"] < 1e-12
    for x, output in zip((IMAGES, large), before):
        torch.testing.assert_close(net(x), output, rtol=1e-10, atol=1e-10)


def test_constants_go_exactly_beside_a_unit_that_varies() -> None:
    torch.manual_seed(0)
    net = padded()
    varies = int(GONE.nonzero()[0])
    with torch.no_grad():
        net[1].weight[varies], net[1].bias[varies] = 2.0, 0.0
    without, every = copy.deepcopy(net), copy.deepcopy(net)
    alone = dk.compact(without, None, IMAGES, dead={"2": torch.arange(12) == varies}, fold_batches=[IMAGES])
    report = dk.compact(every, None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES])
    assert report.removed == {"2": 3} and report.folded["3"].stand_ins == 1
    assert report.estimated_change["3"] == pytest.approx(alone.estimated_change["3"], rel=1e-9) and alone.estimated_change["3"] > 0.1
    torch.testing.assert_close(every(IMAGES), without(IMAGES), rtol=1e-9, atol=1e-9)


def test_of_one_sample_only_what_is_the_same_everywhere_is_constant() -> None:
    torch.manual_seed(0)
    assert dk.compact(padded(scale=0.01), None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES[:1]]).removed == {"2": 4}
    torch.manual_seed(0)
    report = dk.compact(padded(), None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES[:1]])
    assert report.removed == {"2": 3} and report.estimated_change["3"] < 1e-12


def test_a_wide_border_in_front_of_the_layer() -> None:
    torch.manual_seed(0)
    net = padded(nn.ZeroPad2d(6), nn.Conv2d(12, 7, 3))
    before = net(IMAGES)
    assert dk.compact(net, None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES]).removed == {"2": 3}
    torch.testing.assert_close(net(IMAGES), before, rtol=1e-10, atol=1e-10)


def test_what_would_change_without_folding_is_the_models_own() -> None:
    torch.manual_seed(0)
    net = padded()
    follower = copy.deepcopy(net)
    with torch.no_grad():
        follower[1].bias += 20
    own = dk.compact(copy.deepcopy(net), None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES])
    both = dk.compact(net, None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES], followers=follower)
    assert both.folded["3"].change_without == pytest.approx(own.folded["3"].change_without, rel=1e-12)
