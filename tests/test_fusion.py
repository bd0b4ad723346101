"""DemPBatchNormAct2d and prepare(fuse=True): the same function, statistics and training as the separate modules."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import demp_kernels as dk

pytestmark = pytest.mark.usefixtures("tiny_or_op")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_module_is_batch_norm_and_relu(momentum: float | None, affine: bool, tracked: bool, channels_last: bool) -> None:
    plain = nn.BatchNorm2d(5, momentum=momentum, affine=affine, track_running_stats=tracked)
    fused = dk.DemPBatchNormAct2d(5, momentum=momentum, affine=affine, track_running_stats=tracked)
    if affine:
        nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    fused.load_state_dict(plain.state_dict())
    assert list(fused.state_dict()) == list(plain.state_dict())
    for _ in range(3):
        x = torch.randn(4, 5, 6, 7) * 3 + 1
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        grad, results = torch.randn_like(x), []
        for module in (lambda t: F.relu(plain(t)), fused):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(grad)
            results.append((y.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(dict(fused.state_dict()), dict(plain.state_dict()), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(fused.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    plain.load_state_dict(fused.state_dict())
    plain.eval(), fused.eval()
    assert torch.equal(fused(x), F.relu(plain(x)))
    assert fused.act.seen.item() == 3 * 4 * 6 * 7


def test_fused_and_unfused_networks_train_alike() -> None:
    torch.manual_seed(0)
    net = Block()
    x, y = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
    losses = []
    for fuse in (True, False):
        model = dk.prepare(copy.deepcopy(net), x, fuse=fuse)
        assert set(model.state_dict()) == set(net.state_dict())
        assert sum(isinstance(m, dk.DemPBatchNormAct2d) for m in model.modules()) == (3 if fuse else 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for _ in range(12):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)


def test_finalize_gives_batch_norm_back() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = dk.prepare(Block(), x)
    model(x)
    model.eval()
    plain = dk.finalize(model)
    assert {type(m) for m in plain.modules()} >= {nn.BatchNorm2d, nn.ReLU}
    assert not any(isinstance(m, (dk.DemPBatchNormAct2d, dk.DemPActivation, dk.SelectiveAdd)) for m in plain.modules())
    assert torch.equal(plain(x), model(x)) and set(plain.state_dict()) == set(model.state_dict())


def test_selection_of_the_residual() -> None:
    fused = dk.DemPBatchNormAct2d(3)
    fused.add.set_selection(torch.tensor([4, -1, 0]), 5)
    x, skip = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    chosen = torch.stack([skip[:, 4], torch.zeros_like(skip[:, 0]), skip[:, 0]], 1)
    expected = F.relu(F.batch_norm(x, None, None, torch.ones(3), torch.zeros(3), training=True) + chosen)
    torch.testing.assert_close(fused(x, skip), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(fused.act.active, (expected > 0).sum((0, 2, 3)))


def test_a_network_with_hooks_or_shared_norms_is_left_unfused() -> None:
    net = Block()
    net.bn1.register_forward_hook(lambda *_: None)
    model = dk.prepare(net, torch.randn(2, 3, 8, 8))
    assert type(model.bn1) is nn.BatchNorm2d and isinstance(model.bn0, dk.DemPBatchNormAct2d)


def test_fused_module_refuses() -> None:
    with pytest.raises(ValueError, match="activation must be one of"):
        dk.DemPBatchNormAct2d(3, activation="elu")
    with pytest.raises(ValueError, match="expected 4D"):
        dk.DemPBatchNormAct2d(3)(torch.randn(2, 3))
    with pytest.raises(ValueError, match="more than one value per channel"):
        dk.DemPBatchNormAct2d(3)(torch.randn(1, 3, 1, 1))


def test_a_fused_model_made_synchronous_afterwards_is_refused() -> None:
    """convert_sync_batchnorm puts a SyncBatchNorm in place of every BatchNorm, which would leave out the activations."""
    x = torch.randn(2, 3, 8, 8)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(dk.prepare(Block(), x))
    with pytest.raises(ValueError, match="bn0 was a DemPBatchNormAct2d and is a SyncBatchNorm .* convert_sync_batchnorm first"):
        dk.DemP(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10)
    kept = dk.prepare(nn.SyncBatchNorm.convert_sync_batchnorm(Block()), x)
    assert isinstance(kept.bn0, nn.SyncBatchNorm)
    assert sum(dk.UnitGraph.trace(kept, x).units.values()) == 24
