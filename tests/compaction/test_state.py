"""What survives a compaction: identities, gradients, flags, hooks, layouts, attributes; and what the options do."""
from __future__ import annotations

import copy

import pytest
import torch
from nets import Chain, ResNet, inputs, kill, traced
from torch import Tensor, nn

import demp_kernels as dk
from demp_kernels.compaction import widths_to_dict
from demp_kernels.compaction.removal import Removal
from demp_kernels.compaction.saved import saved_keep


def test_parameters_stay_the_same_objects_with_all_their_flags() -> None:
    torch.manual_seed(0)
    model = Chain().to(memory_format=torch.channels_last)
    all_of_them = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": all_of_them[:6], "lr": 1e-2}, {"params": all_of_them[6:]}])
    model[4].weight.requires_grad_(False)
    graph = traced("chain")
    dead = kill(model, graph)
    model(inputs().contiguous(memory_format=torch.channels_last)).sum().backward()
    model[5].eval()
    parameters = dict(model.named_parameters())
    groups = copy.copy([id(p) for group in optimizer.param_groups for p in group["params"]])
    grads = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    modes = [m.training for m in model.modules()]
    optimizer.step()
    states = {name: copy.deepcopy(optimizer.state.get(p, {})) for name, p in parameters.items()}
    report = dk.compact(model, optimizer, dead=dead, graph=graph)

    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == groups
    assert [m.training for m in model.modules()] == modes
    assert not model[4].weight.requires_grad and model[0].weight.requires_grad
    assert model[4].weight.is_contiguous(memory_format=torch.channels_last) and not model[4].weight.is_contiguous()
    first, second = ~dead["2"], ~dead["6"]
    assert report.live_units["2"] == int(first.sum())
    torch.testing.assert_close(model[0].weight.grad, grads["0.weight"][first], rtol=0, atol=0)
    torch.testing.assert_close(model[1].bias.grad, grads["1.bias"][first], rtol=0, atol=0)
    moments = optimizer.state[model[9].weight]
    block = second.repeat_interleave(4)
    torch.testing.assert_close(moments["exp_avg"], states["9.weight"]["exp_avg"][~dead["11"]][:, block], rtol=0, atol=0)
    assert float(moments["step"]) == 1.0
    assert (model[0].out_channels, model[1].num_features, model[4].in_channels) == (int(first.sum()),) * 3
    assert model[9].in_features == int(block.sum()) and f"in_features={int(block.sum())}" in repr(model[9])
    assert model[1].num_batches_tracked.item() == 1


def test_bytes_freed_counts_everything() -> None:
    model = Chain()
    optimizer = torch.optim.AdamW(model.parameters())
    model(inputs()).sum().backward()
    optimizer.step()

    def held() -> int:
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
        return sum(t.nbytes for t in tensors + [v for state in optimizer.state.values() for v in state.values()])

    before = held()
    report = dk.compact(model, optimizer, inputs(), dead={"2": torch.arange(12) < 6})
    assert report.bytes_freed == before - held() > 0
    assert report.params_after == sum(p.numel() for p in model.parameters()) < report.params_before
    text = str(report)
    assert text.startswith("removed 6 units, 42 of 48 left; parameters ") and "\n  2: 6 of 12 (-6)" in text


def test_every_layer_keeps_a_unit() -> None:
    model = Chain()
    dead = {"2": torch.ones(12, dtype=torch.bool), "11": torch.ones(20, dtype=torch.bool)}
    report = dk.compact(model, None, inputs(), dead=dead, min_units=2)
    assert report.live_units == {"2": 2, "6": 16, "11": 2}
    assert report.kept["2"] == "2 dead units: for its width (round_to, min_units)"
    model(inputs()).sum().backward()


@pytest.mark.parametrize("round_to, expected", [(1, 7), (4, 8), (8, 8), (16, 12)])
def test_widths_are_rounded_up_with_dead_units(round_to: int, expected: int) -> None:
    model = Chain()
    report = dk.compact(model, None, inputs(), dead={"2": torch.arange(12) < 5}, round_to=round_to)
    assert report.live_units["2"] == expected and model[0].out_channels == expected


def test_automatic_rounding_is_the_simd_block(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (("AVX2", 8), ("AVX512", 16)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 2))
        report = dk.compact(model, None, torch.randn(2, 4), dead={"1": torch.arange(40) >= 5}, round_to="auto")
        assert report.live_units["1"] == expected


def test_a_projection_keeps_the_inputs_that_onednn_needs() -> None:
    model = ResNet()
    block = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 16)
    dead = {"blocks.1.act2": torch.arange(24) >= 3, "blocks.0.act2": torch.arange(24) >= 3}
    report = dk.compact(model, None, inputs(), dead=dead)
    assert report.live_units["blocks.1.act2"] == model.blocks[2].shortcut[0].in_channels == block
    assert report.live_units["blocks.0.act2"] == 3
    assert "oneDNN#6035" in report.kept["blocks.1.act2"]


def test_skips_become_selections() -> None:
    torch.manual_seed(0)
    model = ResNet().eval()
    graph = traced("basic")
    dead = kill(model, graph)
    before = model(inputs(2))
    dk.compact(model, None, dead=dead, graph=graph)
    live = {name: set(ids.tolist()) for name, ids in graph.unit_ids.items()}
    add = model.blocks[1].add
    skip, out = sorted(live["blocks.0.act2"]), sorted(live["blocks.1.act2"])
    assert skip != out
    assert add.index.tolist() == [skip.index(c) if c in skip else -1 for c in out]
    assert model.blocks[0].add.inverse.numel() == len(live["stem.2"])
    assert before.shape == model(inputs(2)).shape


def test_unprepared_torchvision_model_is_compacted_with_coupling() -> None:
    """One ReLU module for two calls, plain additions: a stage's channels go where they are dead in all of its blocks."""
    torch.manual_seed(0)
    model = pytest.importorskip("torchvision").models.resnet18(num_classes=4)
    x = torch.randn(2, 3, 64, 64)
    graph = dk.UnitGraph.trace(model, x)
    assert graph.units["layer1.0.relu@0"] == 64 and graph.units["layer2.1.relu@1"] == 128
    with torch.no_grad():
        for bn, gone in [("layer1.0.bn1", 20), ("layer2.0.bn1", 30), ("bn1", 9), ("layer1.0.bn2", 9), ("layer1.1.bn2", 7)]:
            module = model.get_submodule(bn)
            module.weight[:gone], module.bias[:gone] = 0, -1000
    model.eval()
    before = model(x)
    dead = {
        "layer1.0.relu@0": torch.arange(64) < 20, "layer2.0.relu@0": torch.arange(128) < 30,
        "relu": torch.arange(64) < 9, "layer1.0.relu@1": torch.arange(64) < 9, "layer1.1.relu@1": torch.arange(64) < 7,
    }
    report = dk.compact(model, None, dead=dead, graph=graph)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    assert report.live_units["layer1.0.relu@0"] == 44 and model.layer1[0].conv1.out_channels == 44
    assert report.live_units["relu"] == report.live_units["layer1.1.relu@1"] == 57
    assert report.kept["relu"] == "2 dead units: add_.Tensor in layer1.1 (resnet.py:102) joins them with values that are not zero"


def test_saved_widths_fit_a_new_model() -> None:
    torch.manual_seed(0)
    model = ResNet("bottleneck")
    graph = traced("bottleneck")
    optimizer = torch.optim.AdamW(model.parameters())
    for seed in range(2):
        dk.compact(model, optimizer, dead=kill(model, graph, 0.3, seed), graph=graph)
    saved = widths_to_dict(graph)
    twin, twin_graph = ResNet("bottleneck"), traced("bottleneck")
    removal = Removal(twin, twin_graph, saved_keep(twin_graph, saved), optimizers=[torch.optim.AdamW(twin.parameters())])
    assert removal.units == graph.units
    assert removal.carry_out() > 0 and twin_graph.units == graph.units
    twin.load_state_dict(model.state_dict())
    x = inputs()
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), rtol=0, atol=0)
    for a, b in zip(twin.blocks, model.blocks):
        assert (a.add.index is None) == (b.add.index is None)
        assert a.add.index is None or torch.equal(a.add.index, b.add.index)
    with pytest.raises(ValueError, match="saved widths must be of this model"):
        saved_keep(traced("chain"), saved)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(6, 10)
            self.b.weight = self.a.weight
            self.act_a, self.act_b, self.head = nn.ReLU(), nn.ReLU(), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act_a(self.a(x)) + self.act_b(self.b(x)))

    torch.manual_seed(0)
    model = Tied()
    mask = torch.arange(10) % 3 == 0
    with torch.no_grad():
        model.a.bias[mask] = model.b.bias[mask] = -1000
    x = torch.randn(4, 6)
    before = model(x)
    report = dk.compact(model, torch.optim.Adam(model.parameters()), x, dead={"act_a": mask, "act_b": mask})
    assert report.live_units == {"act_a": 6, "act_b": 6}
    assert model.a.weight is model.b.weight and model.a.weight.shape == (6, 6)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
