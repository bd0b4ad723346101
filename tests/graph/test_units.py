"""What the analysis says about small networks: units, gates, what goes with what, what is kept and why."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demp_kernels as dk
from demp_kernels import DemPReLU, SelectiveAdd, UnitGraph
from demp_kernels.compaction import compact
from demp_kernels.graph import AnalysisError
from demp_kernels.graph.atoms import Atoms, connected

X = torch.empty(2, 3, 8, 8, device="meta")


def removed(graph: UnitGraph, dead: dict[str, list[int]], **options: int) -> dict[tuple[str, int], list[int]]:
    """(parameter, dimension) -> entries that go when these units are dead."""
    masks = {n: torch.zeros(graph.units[n], dtype=torch.bool).index_fill_(0, torch.tensor(i), True) for n, i in dead.items()}
    keep = graph.keep_masks(graph.keep(masks, **options))
    return {key: (~mask).nonzero().flatten().tolist() for key, mask in keep.items() if not mask.all()}


class Net(nn.Module):
    """Layers by name, and a forward given as a function."""

    def __init__(self, forward: object, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def test_what_went_before_is_not_missed() -> None:
    """Nothing to remove is nothing to plan, weigh or gather, at the first look and behind a removal."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = UnitGraph.trace(model, torch.empty(2, 4, device="meta"))
    assert graph.is_whole(graph.keep({}))
    compact(model, dead={"1": torch.arange(6) < 2}, graph=graph)
    assert graph.is_whole(graph.keep({})) and not graph.is_whole(graph.keep({"1": torch.arange(4) < 1}))


def test_chain_takes_blocks_of_the_flattened_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, 2)
    )
    graph = UnitGraph.trace(model, X)
    assert graph.units == {"2": 4} and graph.unit_ids["2"].tolist() == [0, 1, 2, 3]
    assert removed(graph, {"2": [1, 3]}) == {
        **{(f"0.{p}", 0): [1, 3] for p in ("weight", "bias")},
        **{(f"1.{p}", 0): [1, 3] for p in ("weight", "bias", "running_mean", "running_var")},
        ("5.weight", 1): [4, 5, 6, 7, 12, 13, 14, 15],
    }
    assert graph.gates == dict.fromkeys(("0.weight", "0.bias", "1.weight", "1.bias"), "2")


class PlainAdd(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class SharedStem(nn.Module):
    """act(b(act(a(h))) + h), h = act(stem(x))"""

    def __init__(self, add: nn.Module) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.a, self.inner, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
        self.add, self.post, self.head = add, nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.stem(x))
        return self.head(self.post(self.add(self.b(self.inner(self.a(h))), h)).mean((2, 3)))


def test_plain_addition_couples() -> None:
    graph = UnitGraph.trace(SharedStem(PlainAdd()), X)
    assert removed(graph, {"first": [0, 1]}) == {}
    assert removed(graph, {"post": [1, 2]}) == {}
    both = removed(graph, {"first": [0, 1], "post": [1, 2]})
    assert both[("stem.weight", 0)] == both[("b.weight", 0)] == both[("head.weight", 1)] == both[("a.weight", 1)] == [1]
    assert graph.gates["stem.weight"] == "first" and graph.gates["b.weight"] == "post"


def test_selective_addition_does_not() -> None:
    graph = UnitGraph.trace(SharedStem(SelectiveAdd()), X)
    assert removed(graph, {"first": [0, 1]}) == {("stem.weight", 0): [0, 1], ("stem.bias", 0): [0, 1], ("a.weight", 1): [0, 1]}
    assert removed(graph, {"post": [1, 2]}) == {("b.weight", 0): [1, 2], ("b.bias", 0): [1, 2], ("head.weight", 1): [1, 2]}


def test_projection_goes_with_the_sum_and_is_gated_by_it() -> None:
    model = Net(
        lambda m, x: m.head(m.post(m.add(m.a(x), m.bn(m.proj(x)))).mean((2, 3))),
        a=nn.Conv2d(3, 4, 1), proj=nn.Conv2d(3, 4, 1, bias=False), bn=nn.BatchNorm2d(4), add=SelectiveAdd(), post=DemPReLU(),
        head=nn.Linear(4, 2),
    )
    graph = UnitGraph.trace(model, X)
    gone = removed(graph, {"post": [2]})
    assert gone[("proj.weight", 0)] == gone[("bn.running_var", 0)] == gone[("a.weight", 0)] == [2]
    assert graph.gates["proj.weight"] == graph.gates["bn.bias"] == "post"


def test_squeeze_and_excite_gate_goes_with_its_channel() -> None:
    model = Net(
        lambda m, x: m.head((m.act(m.conv(x)) * m.fc(m.act(m.conv(x)).mean((2, 3), keepdim=True)).sigmoid()).mean((2, 3))),
        conv=nn.Conv2d(3, 4, 1), act=nn.ReLU(), fc=nn.Conv2d(4, 4, 1), head=nn.Linear(4, 2),
    )
    gone = removed(UnitGraph.trace(model, X), {"act@0": [1], "act@1": [1]})
    assert gone[("fc.weight", 0)] == gone[("fc.weight", 1)] == gone[("head.weight", 1)] == [1]


def test_depthwise_goes_with_its_input() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 2, 1), nn.ReLU(),
        nn.Conv2d(2, 2, 1),
    )
    graph = UnitGraph.trace(model, X)
    assert removed(graph, {"1": [1]}) == {}  # BatchNorm makes a constant of it
    gone = removed(graph, {"4": [2, 3]})
    assert gone[("0.weight", 0)] == [1] and gone[("2.weight", 0)] == gone[("5.weight", 1)] == [2, 3]
    assert removed(graph, {"4": [2]}) == {}  # the other output of its input lives


def test_grouped_convolution_stays_balanced() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph = UnitGraph.trace(model, X)
    assert removed(graph, {"1": [0, 1, 5]})[("0.weight", 0)] == [1, 5]
    assert ("2.weight", 0) not in removed(graph, {"3": [0]})
    assert removed(graph, {"3": [0, 3]})[("2.weight", 0)] == [0, 3]
    # a group of which nothing is needed goes as a whole
    assert removed(graph, {"1": [0, 1, 2, 3], "3": [0, 1]})[("0.weight", 0)] == [0, 1, 2, 3]


def test_round_to_and_min_units_keep_dead_units() -> None:
    model = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2))
    graph = UnitGraph.trace(model, torch.empty(2, 3, device="meta"))
    assert removed(graph, {"1": list(range(10))})[("0.weight", 0)] == list(range(1, 10))
    assert removed(graph, {"1": list(range(10))}, min_units=3)[("0.weight", 0)] == list(range(3, 10))
    assert removed(graph, {"1": [0, 4, 5, 9]}, round_to=4)[("0.weight", 0)] == [5, 9]


PINNED = {
    "layer norm": (
        Net(lambda m, x: m.out(m.norm(m.act(m.fc(x)))), fc=nn.Linear(8, 6), act=nn.ReLU(), norm=nn.LayerNorm(6), out=nn.Linear(6, 2)),
        "layer_norm.default in norm",
    ),
    "output": (Net(lambda m, x: m.act(m.fc(x)), fc=nn.Linear(8, 6), act=nn.ReLU()), "relu.default in act"),
    "softmax": (
        Net(lambda m, x: m.out(m.act(m.fc(x)).softmax(-1)), fc=nn.Linear(8, 6), act=nn.ReLU(), out=nn.Linear(6, 2)), "softmax.int in the model",
    ),
    "mean over units": (Net(lambda m, x: m.act(m.fc(x)).mean(-1), fc=nn.Linear(8, 6), act=nn.ReLU()), "mean.dim in the model"),
    "slice": (
        Net(lambda m, x: m.out(m.act(m.fc(x))[..., :4]), fc=nn.Linear(8, 6), act=nn.ReLU(), out=nn.Linear(4, 2)), "slice.Tensor in the model",
    ),
    "constant": (
        Net(lambda m, x: m.out(m.act(m.fc(x)) + torch.arange(6.0)), fc=nn.Linear(8, 6), act=nn.ReLU(), out=nn.Linear(6, 2)), "a tensor that cannot be cut",
    ),
}


@pytest.mark.parametrize("case", PINNED)
def test_what_cannot_be_followed_is_kept_and_said(case: str) -> None:
    model, why = PINNED[case]
    x = torch.randn(2, 3, 8, 8)
    graph = UnitGraph.trace(model, x)
    assert removed(graph, {"act": [0, 1]}) == {}
    report = dk.compact(model, None, x, dead={"act": torch.arange(6) < 2})
    assert not report.changed and report.kept["act"].startswith("2 dead units: ") and why in report.kept["act"]
    if why.startswith(("softmax", "mean", "slice")):
        assert "(test_units.py:" in report.kept["act"]  # the line of the model's source


def test_training_only_heads_are_followed() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.head, self.aux = nn.Conv2d(3, 6, 1), DemPReLU(), nn.Linear(6, 2), nn.Linear(6, 2)
            self.never = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = self.act(self.conv(x)).mean((2, 3))
            return (self.head(y), self.aux(y)) if self.training else self.head(y)

    model = Auxiliary()
    graph = UnitGraph.trace(model, X)
    assert graph.units == {"act": 6} and graph.untraced == ["never.weight", "never.bias"]
    gone = removed(graph, {"act": [3]})
    assert gone[("aux.weight", 1)] == gone[("head.weight", 1)] == gone[("conv.weight", 0)] == [3]
    report = dk.compact(model, None, torch.randn(2, 3, 4, 4), dead={"act": torch.arange(6) == 3})
    assert "never.weight: never used by the forward" in report.notes
    assert [tuple(y.shape) for y in model(torch.randn(2, 3, 4, 4))] == [(2, 2), (2, 2)]


def test_functional_activations_are_named_as_prepare_names_them() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.gelu(self.b(F.relu(self.a(x)))) + F.relu(x[..., :6]).sum())

    graph = UnitGraph.trace(nn.Sequential(Functional()), torch.empty(2, 8, device="meta"))
    assert list(graph.units) == ["0.relu", "0.gelu"]


def test_parameter_used_as_a_plain_value_is_cut_where_it_has_an_axis() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.out = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
            self.scale, self.place = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(1, 4, 8, 8))
            self.register_buffer("table", torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.act(self.conv(x) * self.scale + self.place) * self.table)

    gone = removed(UnitGraph.trace(Scaled(), X), {"act": [2]})
    assert gone[("scale", 0)] == gone[("place", 1)] == gone[("table", 0)] == gone[("conv.weight", 0)] == [2]


def test_tracing_leaves_the_model_alone() -> None:
    model = pytest.importorskip("torchvision").models.resnet18()
    model.bn1.eval()
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    graph = UnitGraph.trace(model, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in model.modules()] == modes and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert sum(graph.units.values()) == 64 * 5 + 128 * 4 + 256 * 4 + 512 * 4
    assert set(graph.gates.values()) <= set(graph.units) and len(graph.gates) == 60


def test_retracing_a_compacted_model_understands_its_selections() -> None:
    torch.manual_seed(0)
    model = SharedStem(SelectiveAdd())
    x = torch.randn(2, 3, 8, 8)
    dk.compact(model, None, x, dead={"first": torch.tensor([True, False, False, False]), "post": torch.tensor([False, False, True, False])})
    assert model.add.index.tolist() == [-1, 0, 2]
    graph = UnitGraph.trace(model, x)
    assert graph.units == {"first": 3, "inner": 4, "post": 3}
    before = model(x)
    with torch.no_grad():
        model.b.bias[1] = -1000
    before = model(x)
    dk.compact(model, None, x, dead={"post": torch.tensor([False, True, False])}, graph=graph)
    assert model.add.index.tolist() == [-1, 2]
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)


def test_a_model_that_cannot_be_captured_is_an_analysis_error() -> None:
    model = Net(lambda m, x: m.act(x) if x.sum() > 0 else x, act=nn.ReLU())
    with pytest.raises(AnalysisError, match="torch.export cannot capture Net"):
        UnitGraph.trace(model, X)
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        UnitGraph.trace("model", X)


def test_connected_components_against_a_plain_union_find() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        pairs = torch.randint(50, (2, 40), generator=generator).numpy()
        parent = list(range(50))

        def find(i: int, parent: list[int] = parent) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for a, b in pairs.T:
            low, high = sorted((find(int(a)), find(int(b))))
            parent[high] = low
        assert connected(50, *pairs).tolist() == [find(i) for i in range(50)]


def test_atoms_tell_why_they_are_pinned() -> None:
    atoms = Atoms()
    a, b = atoms.fresh(3), atoms.fresh(3)
    atoms.tie(a[:2], b[1:])
    atoms.pin(b[2:], "because")
    roots, reasons = atoms.resolve()
    assert roots[a[0]] == roots[b[1]] and reasons == {int(roots[a[1]]): "because"}


def test_what_a_forward_keeps_in_the_model_is_as_before() -> None:
    class Cached(nn.Module):
        def __init__(self, shared: dict[str, float], features: list[torch.Tensor]) -> None:
            super().__init__()
            self.fc, self.act, self.out = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)
            self.shared, self.features, self.nested, self.last = shared, features, {"calls": [0]}, None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "mask"):
                self.mask = torch.ones(x.shape[1])
            self.nested["calls"][0] += 1
            self.last = self.act(self.fc(x * self.mask))
            self.features.append(self.last)
            return self.out(self.last) * self.shared["scale"]

    shared, features = {"scale": 2.0}, []
    model = nn.Sequential(Cached(shared, features))
    UnitGraph.trace(model, torch.randn(2, 4))
    cached = model[0]
    assert cached.shared is shared and cached.features is features and features == []
    assert not hasattr(cached, "mask") and cached.last is None and cached.nested == {"calls": [0]}
    shared["scale"] = 3.0
    assert type(model(torch.randn(2, 4))) is torch.Tensor and len(features) == 1
