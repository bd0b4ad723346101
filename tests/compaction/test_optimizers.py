"""An optimiser's state follows its parameters: training continues on the compacted network as on the whole one, or the
compaction is refused with nothing changed. And hooks, scalers and memory."""
from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable

import pytest
import torch
from nets import Chain, inputs, kill, traced
from test_refusals import same, snapshot
from torch import Tensor, nn

import demp_kernels as dk
from demp_kernels.compaction import commit as commit_module
from demp_kernels.ops.compact import compact as compact_op


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675: the sign of an interpolated momentum."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_((0.9 * m + 0.1 * p.grad).sign_(), alpha=-group["lr"])
                m.lerp_(p.grad, 0.01)


class ScheduleFree(torch.optim.Optimizer):
    """Defazio et al., arXiv 2405.15682, the SGD form: the parameter is y, the state has z and the average x."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, dict(lr=lr, k=0))

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(z=p.clone(), x=p.clone())
                state["z"].sub_(p.grad, alpha=group["lr"])
                state["x"].lerp_(state["z"], 1 / group["k"])
                p.copy_(0.1 * state["z"] + 0.9 * state["x"])


O = torch.optim  # noqa: E741
FOLLOWING: dict[str, Callable[[list[nn.Parameter]], O.Optimizer]] = {
    "sgd": lambda p: O.SGD(p, 1e-2),
    "sgd_nesterov": lambda p: O.SGD(p, 1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: O.Adam(p, 1e-3),
    "adam_amsgrad_foreach": lambda p: O.Adam(p, 1e-3, amsgrad=True, foreach=True),
    "adamw": lambda p: O.AdamW(p, 1e-3),
    "adamw_fused": lambda p: O.AdamW(p, 1e-3, fused=True),
    "adamw_for_loop": lambda p: O.AdamW(p, 1e-3, foreach=False),
    "adamw_differentiable": lambda p: O.AdamW(p, torch.tensor(1e-3), foreach=False),
    "nadam": lambda p: O.NAdam(p, 1e-3),
    "radam": lambda p: O.RAdam(p, 1e-3),
    "adamax": lambda p: O.Adamax(p, 1e-3),
    "adadelta": lambda p: O.Adadelta(p, 1e-1),
    "adagrad": lambda p: O.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
    "rmsprop": lambda p: O.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "rprop": lambda p: O.Rprop(p, 1e-4),
    "asgd": lambda p: O.ASGD(p, 1e-2),
    "lion": lambda p: Lion(p, 1e-4),
    "schedule_free": lambda p: ScheduleFree(p, 1e-2),
    "groups": lambda p: O.AdamW([{"params": p[:3], "lr": 1e-3}, {"params": p[3:], "lr": 2e-3, "weight_decay": 0.0}]),
}
REFUSED: dict[str, Callable[[list[nn.Parameter]], O.Optimizer]] = {
    "adafactor": lambda p: O.Adafactor(p, 1e-3),
    "lbfgs": lambda p: O.LBFGS(p, 1e-3),
}


def net() -> tuple[nn.Module, dk.UnitGraph, dict[str, Tensor]]:
    """A network in double precision, some of whose units are dead for good."""
    torch.manual_seed(0)
    model = Chain().double()
    graph = traced("chain", torch.float64)
    return model, graph, kill(model, graph)


def train(model: nn.Module, optimizer: O.Optimizer, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        losses.append(float(closure().detach()))
        optimizer.step(closure) if isinstance(optimizer, O.LBFGS) else optimizer.step()
    return losses


@pytest.mark.parametrize("built", ["before", "after"])
@pytest.mark.parametrize("name", FOLLOWING)
def test_training_goes_on_as_without_a_compaction(name: str, built: str) -> None:
    model, graph, dead = net()
    optimizer = FOLLOWING[name](list(model.parameters()))
    if built == "before":
        train(model, optimizer, 3, 1)
    whole = copy.deepcopy((model, optimizer))
    objects = [id(p) for p in model.parameters()]
    report = dk.compact(model, optimizer if built == "before" else None, dead=dead, graph=graph)
    assert report.changed and [id(p) for p in model.parameters()] == objects
    if built == "after":
        optimizer = FOLLOWING[name](list(model.parameters()))
    for state in (optimizer.state[p] for p in model.parameters()):
        assert all(v.is_contiguous() for v in state.values() if isinstance(v, Tensor))
    torch.testing.assert_close(train(model, optimizer, 4, 2), train(*whole, 4, 2), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", REFUSED)
def test_state_that_cannot_follow_is_refused(name: str) -> None:
    model, graph, dead = net()
    optimizer = REFUSED[name](list(model.parameters()))
    train(model, optimizer, 1, 1)
    before, units = snapshot(model, optimizer), graph.units
    with pytest.raises(dk.CompactionError, match=type(optimizer).__name__):
        dk.compact(model, optimizer, dead=dead, graph=graph)
    assert same(before, snapshot(model, optimizer)) and graph.units == units


def test_muon_on_the_matrices() -> None:
    """Its update orthogonalises a matrix: removed rows and columns of zero momentum do not change it for the others."""
    model, graph, dead = net()
    muon = O.Muon([p for p in model.parameters() if p.dim() == 2], 1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rest = O.SGD([p for p in model.parameters() if p.dim() != 2], 1e-2)
    for optimizer in (muon, rest):
        train(model, optimizer, 1, 1)
    moments = {id(p): muon.state[p]["momentum_buffer"].clone() for p in muon.param_groups[0]["params"]}
    dk.compact(model, [muon, rest], dead=dead, graph=graph)
    for p in muon.param_groups[0]["params"]:
        buffer = muon.state[p]["momentum_buffer"]
        assert buffer.shape == p.shape != moments[id(p)].shape
    train(model, muon, 1, 2)


def test_gradients_in_the_middle_of_an_accumulation() -> None:
    model, graph, dead = net()
    whole = copy.deepcopy(model)
    x, y = inputs(dtype=torch.float64), inputs(dtype=torch.float64)
    results = []
    for m in (model, whole):
        optimizer = O.SGD(m.parameters(), 1e-2)
        m(x).square().mean().backward()
        if m is model:
            dk.compact(m, optimizer, dead=dead, graph=graph)
        m(y).square().mean().backward()
        optimizer.step()
        results.append(m.eval()(x))
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


def test_hooks_stay_and_fire_once() -> None:
    model, graph, dead = net()
    weight, calls = model[0].weight, []
    weight.register_hook(lambda g: calls.append(("tensor", g.shape)))
    weight.register_post_accumulate_grad_hook(lambda p: calls.append(("accumulated", p.shape)))
    model[0].register_forward_hook(lambda *_: calls.append(("forward", None)))
    model[0].register_full_backward_hook(lambda *_: calls.append(("backward", None)))
    model(inputs(dtype=torch.float64)).sum().backward()
    weight.grad = None
    dk.compact(model, None, dead=dead, graph=graph)
    calls.clear()
    model(inputs(dtype=torch.float64)).sum().backward()
    assert sorted(kind for kind, _ in calls) == ["accumulated", "backward", "forward", "tensor"]
    assert all(shape == weight.shape for _, shape in calls if shape is not None)


def test_a_grad_scaler_goes_on() -> None:
    model, graph, dead = net()
    model, graph = model.float(), traced("chain")
    optimizer, scaler = O.AdamW(model.parameters(), 1e-3), torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(3):
        scaler.scale(model(inputs()).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 1:
            dk.compact(model, optimizer, dead=dead, graph=graph)
    assert scaler.get_scale() == 64.0 and all(torch.isfinite(p).all() for p in model.parameters())


# --- memory ---


class Wide(nn.Sequential):
    """Tensors of 1 MiB and 4 MiB."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 4))


def wide() -> tuple[nn.Module, O.Optimizer, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model, x = Wide(), torch.randn(4, 256)
    optimizer = O.AdamW(model.parameters(), 1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    dead = {name: torch.rand(1024) < 0.5 for name in ("1", "3")}
    with torch.no_grad():
        model[0].bias[dead["1"]] = model[2].bias[dead["3"]] = -1000
    return model, optimizer, dead, x


def held(model: nn.Module, optimizer: O.Optimizer) -> int:
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t is not None]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_large_tensors_shrink_in_place_and_their_storages_too(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_module, "MOVE_BYTES", 1 << 19)
    model, optimizer, dead, x = wide()
    addresses = [p.data_ptr() for p in (model[2].weight, model[2].weight.grad)]
    before, out = held(model, optimizer), model(x).detach()
    wanted = {k: v[~dead["3"]][:, ~dead["1"]] for k, v in optimizer.state[model[2].weight].items() if v.dim()}
    report = dk.compact(model, optimizer, x, dead=dead)
    assert [p.data_ptr() for p in (model[2].weight, model[2].weight.grad)] == addresses
    assert report.bytes_freed == before - held(model, optimizer) > 8 << 20
    assert all(torch.equal(optimizer.state[model[2].weight][key], value) for key, value in wanted.items())
    torch.testing.assert_close(model(x), out, rtol=0, atol=1e-5)
    torch.save(model[2].weight, tmp_path / "weight.pt")
    assert (tmp_path / "weight.pt").stat().st_size < model[2].weight.nbytes + 4096
    clone = copy.deepcopy(model)
    optimizer.step()
    assert not torch.equal(clone[2].weight, model[2].weight)


def test_memory_that_somebody_looks_at_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_module, "MOVE_BYTES", 1 << 19)
    model, optimizer, dead, x = wide()
    view, saved = model[2].weight.detach(), model(x)
    before = view.clone()
    dk.compact(model, optimizer, x, dead=dead)
    assert torch.equal(view, before) and view.data_ptr() != model[2].weight.data_ptr()
    with pytest.raises(RuntimeError):  # of the old shapes: it must not be computed from moved memory
        saved.sum().backward()


def test_running_out_of_memory_before_the_first_change_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, dead, x = wide()
    graph, before = dk.UnitGraph.trace(model, x), snapshot(model, optimizer)
    keep_alive = model[0].bias.detach()  # gathered in advance

    def fail(*_: object) -> list[Tensor]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(commit_module, "compact_op", fail)
    with pytest.raises(torch.OutOfMemoryError):
        dk.compact(model, optimizer, dead=dead, graph=graph)
    assert same(before, snapshot(model, optimizer)) and graph.units == {"1": 1024, "3": 1024}
    assert keep_alive.numel() == 1024


def test_running_out_of_memory_later_is_got_over_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, dead, x = wide()
    graph, out = dk.UnitGraph.trace(model, x), model(x).detach()
    moments = optimizer.state[model[0].bias]["exp_avg"][~dead["1"]]

    def fail(*_: object) -> list[Tensor]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(commit_module, "compact_op", fail)
    before = held(model, optimizer)
    report = dk.compact(model, optimizer, dead=dead, graph=graph)
    assert report.bytes_freed == before - held(model, optimizer) > 0
    assert torch.equal(optimizer.state[model[0].bias]["exp_avg"], moments)
    torch.testing.assert_close(model(x), out, rtol=0, atol=1e-5)


def test_new_memory_is_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, dead, x = wide()
    largest, taken, gone = [], [], []
    old = [weakref.ref(v) for state in optimizer.state.values() for v in state.values() if v.dim()]

    def watched(sources: list[Tensor], *indices: object) -> list[Tensor]:
        gone.append(sum(moment() is None for moment in old))
        new = compact_op(sources, *indices)
        taken.append(sum(t.nbytes for t in new))
        largest.append(max(t.nbytes for t in new))
        return new

    monkeypatch.setattr(commit_module, "compact_op", watched)
    dk.compact(model, optimizer, x, dead=dead)
    assert len(taken) > 2 and max(taken) <= max(*largest, 1 << 20)
    assert gone[0] == 0 < gone[-1]  # old moments go before the last batch is gathered


def test_gradients_that_somebody_keeps_fit_their_parameters_afterwards() -> None:
    model, optimizer, dead, x = wide()
    logged = [p.grad.detach() for p in model.parameters()]
    before = [g.clone() for g in logged]
    dk.compact(model, optimizer, x, dead=dead)
    assert all(p.grad.shape == p.shape for p in model.parameters())
    assert all(torch.equal(g, b) for g, b in zip(logged, before))
    assert torch.equal(model[0].bias.grad, before[1][~dead["1"]])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("move_bytes", [1, 1 << 40])
def test_strides_do_not_depend_on_the_way_to_a_shape(layout: torch.memory_format, move_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of one input is in both layouts; convolutions take the one that its strides say, and round accordingly."""
    monkeypatch.setattr(commit_module, "MOVE_BYTES", move_bytes)
    x = torch.randn(2, 3, 6, 6)
    found = []
    for ways in (((3, 0), (1, 2), (1, 4)), ((1, 4),)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).to(memory_format=layout)
        optimizer, graph = O.AdamW(net.parameters()), dk.UnitGraph.trace(net, x)
        net(x).sum().backward()
        optimizer.step()
        for left, gone in ways:
            first, second = graph.units.values()
            dead = {"1": torch.arange(first) >= left, "3": torch.arange(second) < gone - (6 - second)}
            dk.compact(net, optimizer, dead=dead, graph=graph)
        found.append([(t.shape, t.stride()) for p in net.parameters() for t in (p, p.grad, *optimizer.state[p].values())])
    assert found[0] == found[1] and found[0][10][0] == (2, 1, 3, 3)
    strides = {torch.channels_last: (9, 1, 3, 1), torch.contiguous_format: (9, 9, 3, 1)}
    assert found[0][10][1] == strides[layout]


class Sharpened(O.Optimizer):
    """As published implementations of sharpness-aware minimisation are: the moments are in an optimiser inside."""

    def __init__(self, parameters: object, listed: bool) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = O.AdamW(self.param_groups, lr=1e-2)
        self.param_groups = self.base_optimizer.param_groups
        if listed:
            self.optimizers = [self.__dict__.pop("base_optimizer")]

    @property
    def inside(self) -> O.Optimizer:
        return self.optimizers[0] if hasattr(self, "optimizers") else self.base_optimizer

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.detach().clone()
        self.inside.step()


@pytest.mark.parametrize("listed", [False, True])
def test_state_in_an_optimiser_inside_follows(listed: bool) -> None:
    model, graph, dead = net()
    optimizer = Sharpened(model.parameters(), listed)
    train(model, optimizer, 2, 1)
    dk.compact(model, optimizer, dead=dead, graph=graph)
    for p in model.parameters():
        assert optimizer.state[p]["old_p"].shape == optimizer.inside.state[p]["exp_avg"].shape == p.shape
    train(model, optimizer, 2, 1)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize("views", [False, True])
def test_zero_redundancy_optimizer(views: bool) -> None:
    import torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, graph, dead = net()
        optimizer = ZeroRedundancyOptimizer(model.parameters(), O.AdamW, parameters_as_bucket_view=views, lr=1e-3)
        train(model, optimizer, 2, 1)
        before = snapshot(model)
        if views:
            with pytest.raises(dk.CompactionError, match="parameters_as_bucket_view=True"):
                dk.compact(model, optimizer, dead=dead, graph=graph)
            assert same(before, snapshot(model))
        else:
            dk.compact(model, optimizer, dead=dead, graph=graph)
            assert all(optimizer.optim.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
            train(model, optimizer, 2, 1)
    finally:
        dist.destroy_process_group()
