"""`demp bench compaction`, as small as it gets."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from demp_kernels.bench import compaction, peers
from demp_kernels.bench.peers import PEERS, peers_of
from demp_kernels.bench.rows import Group
from demp_kernels.recipes.errors import RecipeError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.head = nn.Conv2d(16, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


def test_compaction_removes_half_of_the_units_of_everything() -> None:
    subject = compaction.Subject.of(Small(), torch.randn(2, 3, 8, 8))
    bytes_before = sum(t.nbytes for t in subject.tensors())
    plan, commit = subject.compact()
    assert plan > 0 and commit > 0
    assert sorted(subject.graph.units.values()) == [4, 8]
    assert sum(t.nbytes for t in subject.tensors()) < 0.6 * bytes_before
    assert len(subject.tensors()) == 3 * len(list(subject.model.parameters())) + len(list(subject.model.buffers()))


def test_compaction_rows(machine) -> None:
    pytest.importorskip("torchvision")
    group = Group(compaction.compaction_rows("resnet18", machine, rounds=1))
    assert {"copy_into", "plan", "commit", "demp"} <= set(group.rows)
    assert group.time("demp") == pytest.approx(group.time("plan") + group.time("commit"))
    assert group.case.function == "resnet18"


def test_unknown_model_is_refused() -> None:
    pytest.importorskip("torchvision")
    assert compaction.known(["resnet18"]) == ["resnet18"]
    with pytest.raises(RecipeError, match="got 'resnet17'"):
        compaction.known(["resnet18", "resnet17"])


@pytest.mark.parametrize("name", list(PEERS))
def test_a_peer_removes_half_of_the_channels(name: str) -> None:
    pytest.importorskip(name)
    torchvision = pytest.importorskip("torchvision")
    models = []

    def build() -> nn.Module:
        models.append(torchvision.models.resnet18(weights=None))
        return models[-1]

    seconds = peers_of(build, torch.randn(2, 3, 64, 64))[name]()
    assert seconds > 0
    assert [module.out_channels for module in models[-1].modules() if isinstance(module, nn.Conv2d)][:2] == [32, 32]


def test_a_peer_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Callable[[], float]:
        raise RuntimeError("cannot")

    monkeypatch.setattr(peers, "PEERS", {"one": fails, "other": lambda *_: lambda: 1.0})
    assert list(peers.peers_of(nn.Identity, torch.ones(1))) == ["other"]
