"""Units that are constant, or nearly so, when they are removed: what they gave is folded into the layers that read them."""
from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from fold_nets import GONE, IMAGES, MAPS, NETS, bits, dead_of, first, graph_of, head, made_constant, units_gone
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import demp_kernels as dk
from demp_kernels.compaction import CompactionError
from demp_kernels.compaction.batches import Batches
from demp_kernels.compaction.fold import Folding


@pytest.mark.parametrize("kind", NETS)
def test_constant_units_go_exactly(kind: str) -> None:
    torch.manual_seed(0)
    net = made_constant(NETS[kind]())
    graph = graph_of(net)
    dead, before = dead_of(graph), {}
    for training in (True, False):  # training mode on a copy: it moves the running statistics
        before[training] = copy.deepcopy(net).train(training)(IMAGES)
    report = dk.compact(net, None, graph=graph, dead=dead, fold_batches=[IMAGES[:4], (IMAGES[4:],)])
    assert sum(report.removed.values()) == int(GONE.sum()) * len(dead), report
    assert report.folded and max(report.estimated_change.values()) < 1e-12
    assert max(f.change_without for f in report.folded.values()) > 0.01
    for training, output in before.items():
        found = copy.deepcopy(net).train(training)(IMAGES)
        torch.testing.assert_close(found, output, rtol=1e-10, atol=1e-10)
    assert all(name in str(report) for name in report.folded)


def test_without_folding_the_function_changes() -> None:
    """The nets above are a test of folding only if removal alone is wrong."""
    torch.manual_seed(0)
    for kind, make in NETS.items():
        net = made_constant(make()).eval()
        graph, before = graph_of(net), net(IMAGES)
        dk.compact(net, None, graph=graph, dead=dead_of(graph))
        assert (net(IMAGES) - before).abs().max() > 1e-3, kind


# --- approximately -----------------------------------------------------------------------------------------------------

ROUGH: dict[str, Callable[[], nn.Sequential]] = {
    "no padding": lambda: nn.Sequential(*first(nn.SiLU()), nn.Conv2d(12, 7, 3), nn.ReLU(), *head(7)),
    **{kind: make for kind, (make, _) in MAPS.items() if kind not in ("two readers", "a pooled border")},
}


def seen_by(layer: nn.Module, net: nn.Module) -> Tensor:
    """What comes out of a layer, behind its BatchNorm if it has no bias of its own."""
    found: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: found.append(output))
    net.eval()(IMAGES)
    hook.remove()
    return found[0].detach()


@pytest.mark.parametrize("scale", [0.05, 0.5])
@pytest.mark.parametrize("kind", ROUGH)
def test_the_estimated_change_is_the_change(kind: str, scale: float) -> None:
    """Of units that vary, a little or so much that none can stand in for others."""
    torch.manual_seed(0)
    gone = units_gone(getattr(ROUGH[kind]()[3], "groups", 1))
    net = made_constant(ROUGH[kind](), gone=gone, scale=scale)
    graph = graph_of(net)
    before = seen_by(net[3], net)
    mean = None if net[3].bias is not None else net[4].running_mean.clone()
    report = dk.compact(net, None, graph=graph, dead={"2": gone}, fold_batches=[IMAGES])
    change = seen_by(net[3], net) - before
    if mean is not None:  # BatchNorm takes its mean off the output
        change -= (net[4].running_mean - mean).view(1, -1, 1, 1)
    folded = report.folded["3"]
    deviation = (before - before.mean((0, 2, 3), keepdim=True)).pow(2).sum()
    torch.testing.assert_close(torch.tensor(folded.change), (change.pow(2).sum() / deviation).sqrt().float())
    assert 0.001 < folded.change < folded.change_without


KEPT: dict[str, tuple[Callable[[], nn.Sequential], str]] = {
    "no bias": (lambda: nn.Sequential(*first(nn.SiLU()), nn.Conv2d(12, 7, 1, bias=False), nn.ReLU(), *head(7)), "3 has no bias"),
    "skip": (lambda: nn.Sequential(*first(nn.SiLU()), Skip(12), nn.Conv2d(12, 7, 1), nn.ReLU(), *head(7)), "more than layers"),
    "called twice": (lambda: nn.Sequential(*first(nn.SiLU()), Twice(12), *head(12)), "3.conv is called several times"),
    "bias used twice": (lambda: nn.Sequential(*first(nn.SiLU()), Tied(12), *head(5)), "shares its bias"),
    "function": (lambda: nn.Sequential(*first(nn.SiLU()), Functional(12), *head(5)), "no call of a layer of torch.nn"),
}


class Skip(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.add = nn.Conv2d(width, width, 1), dk.modules.SelectiveAdd()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.conv(x), x)


class Twice(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))


class Tied(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(width, 5, 1), nn.Conv2d(width, 5, 1)
        self.right.bias = self.left.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.left(x)) * F.relu(self.right(x.square()))


class Functional(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, width, 1, 1)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


@pytest.mark.parametrize("kind", KEPT)
def test_what_cannot_be_folded_stays(kind: str) -> None:
    torch.manual_seed(0)
    make, reason = KEPT[kind]
    net = made_constant(make()).eval()
    before, state = net(IMAGES), bits(net)
    report = dk.compact(net, None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES])
    assert not report.changed and not report.folded
    assert report.kept["2"].startswith("4 dead units: not zero") and reason in report.kept["2"]
    assert torch.equal(net(IMAGES), before) and all(map(torch.equal, bits(net), state))


def test_zero_units_go_through_what_cannot_take_constants() -> None:
    """Behind a skip and a layer without bias, of units of which only some are zero."""
    torch.manual_seed(0)
    net = made_constant(nn.Sequential(*first(nn.SiLU()), Skip(12), nn.Conv2d(12, 7, 1, bias=False), nn.ReLU(), *head(7))).eval()
    with torch.no_grad():
        net[1].bias[GONE] = torch.tensor([0.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    before = net(IMAGES)
    report = dk.compact(net, None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES])
    assert report.removed["2"] == 2 and report.kept["2"].startswith("2 dead units")
    torch.testing.assert_close(net(IMAGES), before, rtol=1e-12, atol=1e-12)


def test_max_change_keeps_the_inputs_of_a_layer() -> None:
    torch.manual_seed(0)
    net = made_constant(ROUGH["zero padding"](), scale=0.5).eval()
    before, state = net(IMAGES), bits(net)
    graph = graph_of(net)
    report = dk.compact(net, None, graph=graph, dead={"2": GONE}, fold_batches=[IMAGES], max_change=1e-6)
    assert not report.changed and "without them 3 would change by more than 1e-06" in report.kept["2"]
    assert torch.equal(net(IMAGES), before) and all(map(torch.equal, bits(net), state))
    report = dk.compact(net, None, graph=graph, dead={"2": GONE}, fold_batches=[IMAGES], max_change=10)
    assert report.removed["2"] >= 3 and 1e-6 < report.estimated_change["3"] < 10


def test_max_change_keeps_the_worst_inputs() -> None:
    """Units of growing scale: the layer loses as many as the limit allows, and the change stays below it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 24), nn.SiLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)).double().eval()
    with torch.no_grad():
        net[0].weight *= torch.logspace(-6, 0, 24, dtype=torch.float64)[:, None]
    x = torch.randn(64, 10, dtype=torch.float64)
    everything, left = {"1": torch.ones(24, dtype=torch.bool)}, []
    for limit in (1e-9, 1e-4, 1e-2, 0.3):
        twin = copy.deepcopy(net)
        before = net[2](net[1](net[0](x)))
        report = dk.compact(twin, None, x, dead=everything, fold_batches=[x], max_change=limit)
        left.append(report.live_units["1"])
        kept = everything["1"].nonzero().flatten()[-left[-1] :]
        assert torch.equal(twin[0].weight, net[0].weight[kept])  # the largest ones
        change = twin[2](twin[1](twin[0](x))) - before
        share = (change.pow(2).sum() / (before - before.mean(0)).pow(2).sum()).sqrt().item()
        assert share <= limit
        if report.changed:
            assert share == pytest.approx(report.estimated_change["2"], rel=1e-6) and share > 0.1 * limit
    assert left == sorted(left, reverse=True) and left[0] == 24 and 1 < left[3] < left[2] < left[1] < 24, left


# --- state -------------------------------------------------------------------------------------------------------------


def trained(activation: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    """A net that has learnt to tell the quadrant of the largest pixel while the penalty let units die, and its data."""
    torch.manual_seed(0)
    x = torch.randn(64, 1, 8, 8)
    y = x.view(64, 2, 4, 2, 4).amax((2, 4)).flatten(1).argmax(1)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), activation(), nn.Conv2d(16, 24, 3, bias=False),
        nn.BatchNorm2d(24), activation(), nn.Flatten(), nn.Linear(384, 32), nn.BatchNorm1d(32), activation(), nn.Linear(32, 4),
    )
    model = dk.prepare(net, x)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-2)
    demp = dk.DemP(model, optimizer, total_steps=60, peak_penalty=0.2, peak_noise=0, prune_every=10, on_dead="report")
    for _ in range(59):
        loss = F.cross_entropy(model(x), y) + demp.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        demp.step()
    return model.eval(), x


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.LeakyReLU], ids=["gelu", "silu", "leaky_relu"])
def test_folding_mends_most_of_the_change_of_a_trained_net(activation: Callable[[], nn.Module]) -> None:
    """Units that the counters call dead, and other data than what is folded on."""
    model, x = trained(activation)
    fresh = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    before, change = model(fresh).detach(), {}
    for way, batches in (("dropped", None), ("folded", [x])):
        twin = copy.deepcopy(model)
        report = dk.compact(twin, None, fold_batches=batches)
        change[way] = float((twin(fresh).detach() - before).pow(2).mean().sqrt())
    assert sum(report.removed.values()) > 5 and report.folded
    assert all(f.change < f.change_without for f in report.folded.values())
    assert change["folded"] < 0.2 * change["dropped"], change  # 0.06, 0.05, 0.06 when it was written


def test_followers_are_given_their_own_constants_and_moments_stay() -> None:
    torch.manual_seed(0)
    net = made_constant(NETS["conv with bias"]())
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    average = AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        net(IMAGES).square().mean().backward()
        net[1].weight.grad[GONE] = 0
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(net)
    bias = net[3].bias
    moments = {key: value.clone() for key, value in optimizer.state[bias].items()}
    before = {model: model.eval()(IMAGES) for model in (net, average)}
    report = dk.compact(net, optimizer, IMAGES, dead={"2": GONE}, followers=average, fold_batches=[IMAGES])
    assert report.removed == {"2": 4} and net[3].bias is bias
    for model, output in before.items():
        torch.testing.assert_close(model(IMAGES), output, rtol=1e-10, atol=1e-10)
    assert not torch.equal(average.module[3].bias, bias)
    for key, value in moments.items():
        assert torch.equal(optimizer.state[bias][key], value)


def test_a_refusal_changes_nothing() -> None:
    torch.manual_seed(0)
    net = made_constant(NETS["conv with bias"]()).train()
    optimizer = torch.optim.Adafactor(net.parameters())
    net(IMAGES).square().mean().backward()
    optimizer.step()
    state, modes, rng = bits(net), [m.training for m in net.modules()], torch.get_rng_state()
    with pytest.raises(CompactionError, match="Adafactor"):
        dk.compact(net, optimizer, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES])
    with pytest.raises(CompactionError, match="fold_batches must give finite values, 3 gave others"):
        dk.compact(net, None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES * float("nan")])
    assert all(map(torch.equal, bits(net), state)) and torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in net.modules()] == modes and not any(m._forward_hooks for m in net.modules())


def test_one_compaction_after_the_other() -> None:
    """On one graph, in a prepared model with fused norms: half of the units first, then the others but one."""
    torch.manual_seed(0)
    net = made_constant(nn.Sequential(*first(nn.SiLU()), nn.Conv2d(12, 7, 3), nn.BatchNorm2d(7), nn.SiLU(), *head(7)))
    model = dk.prepare(net, IMAGES).eval()
    graph, before = dk.UnitGraph.trace(model, IMAGES), model(IMAGES)
    for left in (10, 8):
        dead = torch.from_numpy(GONE.numpy()[graph.unit_ids["1.act"]])
        dead[dead.nonzero()[2:]] = False
        report = dk.compact(model, None, graph=graph, dead={"1.act": dead}, fold_batches=[IMAGES])
        assert graph.units["1.act"] == left and report.estimated_change["3"] < 1e-12
        torch.testing.assert_close(model(IMAGES), before, rtol=1e-10, atol=1e-10)
    finished = dk.finalize(model)
    torch.testing.assert_close(finished(IMAGES), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (3, TypeError, "fold_batches must be batches of inputs or a function that returns them, got int"),
        (IMAGES, TypeError, "fold_batches must be batches of inputs or a function that returns them, got Tensor"),
        (lambda: None, TypeError, "fold_batches must be batches of inputs or a function that returns them, got NoneType"),
        ([], ValueError, "fold_batches must have at least one batch, got none"),
    ],
)
def test_wrong_batches(value: object, error: type[Exception], text: str) -> None:
    net = NETS["conv with bias"]().double()
    with pytest.raises(error, match=f"^{text}"):
        dk.compact(net, None, IMAGES, dead={"2": GONE}, fold_batches=value)
    for wrong, kind in ((-1.0, ValueError), (float("nan"), ValueError), ("a", TypeError)):
        with pytest.raises(kind, match="^max_change must be"):
            dk.compact(net, None, IMAGES, dead={"2": GONE}, fold_batches=[IMAGES], max_change=wrong)


def test_the_controller_folds() -> None:
    """Dead units of GELU tails in a run: the loss jumps less at a removal that folds."""
    jumps = {}
    for way in ("dropped", "folded"):
        torch.manual_seed(0)
        x = torch.randn(64, 10)
        y = x[:, :3].argmax(1)
        net = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 3))
        with torch.no_grad():
            net[0].bias[:12] = -1.0
            net[0].weight[:12] *= 0.2
            net[2].weight[:, :12] *= 5
        model = dk.prepare(net, x)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        calls = []
        options = {"fold_batches": lambda: calls.append(1) or [x[:32]]} if way == "folded" else {}
        demp = dk.DemP(model, optimizer, total_steps=40, peak_penalty=0.0, peak_noise=0.0, prune_every=10, **options)
        for _ in range(10):
            loss = F.cross_entropy(model(x), y) + demp.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            before = model.eval()(x)
            model.train()
            report = demp.step()
        assert report is not None and report.removed["1"] == 12
        assert bool(report.folded) == (way == "folded") == bool(calls)
        jumps[way] = float((model.eval()(x) - before).pow(2).mean().sqrt().detach())
    assert jumps["folded"] < 0.3 * jumps["dropped"], jumps


def test_processes_fold_what_all_of_them_see() -> None:
    """Two processes, stood in for by threads, with a batch each: the same as one with both."""
    torch.manual_seed(0)
    net = made_constant(ROUGH["zero padding before BatchNorm"]()).eval()
    graph = graph_of(net)
    barrier, given = threading.Barrier(2), {}

    def add_up_as(rank: int) -> Callable[[list[Tensor]], None]:
        def add_up(tensors: list[Tensor]) -> None:
            given[rank] = [t.clone() for t in tensors]
            barrier.wait(60)
            for tensor, *parts in zip(tensors, given[0], given[1]):
                tensor.copy_(sum(parts))
            barrier.wait(60)

        return add_up

    def plan(batches: Batches) -> Folding:
        return Folding([copy.deepcopy(net)], graph, {"2": ~GONE}, batches, round_to=1, min_units=1, max_change=0.8)

    shares = [Batches([(IMAGES[:3],)], add_up_as(0)), Batches([(IMAGES[3:],)], add_up_as(1))]
    with ThreadPoolExecutor(2) as pool:
        first_rank, second_rank = pool.map(plan, shares)
    alone = plan(Batches([(IMAGES,)]))
    assert 0 < (~alone.keep.atoms).sum() and alone.kept  # some go, some stay
    for rank in (first_rank, second_rank):
        assert (rank.keep.atoms == alone.keep.atoms).all()
        assert rank.folded["3"].change == pytest.approx(alone.folded["3"].change, rel=1e-9)
        assert rank.folded["3"].change_without == pytest.approx(alone.folded["3"].change_without, rel=1e-9)
    assert first_rank.folded == second_rank.folded


def test_calls_of_several_widths_are_folded_each_by_itself() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 2), nn.GELU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.act(self.b(self.act(self.a(x)))))

    torch.manual_seed(0)
    net, x = Shared(), torch.randn(20, 6)
    with torch.no_grad():
        net.a.weight[:3], net.b.weight[:2] = 0, 0  # constants
    before = net(x)
    gone = {"act@0": torch.arange(8) < 3, "act@1": torch.arange(5) < 2}
    report = dk.compact(net, None, x, dead=gone, fold_batches=[x])
    assert report.removed == {"act@0": 3, "act@1": 2}
    torch.testing.assert_close(net(x), before)
