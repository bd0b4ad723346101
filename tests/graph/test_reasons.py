"""A dead unit that stays is reported with the op that needs it and the line of the model's source that calls it."""
from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import demp_kernels as dk


class Body(nn.Module):
    """A convolution and an activation of eight units, and something done to them on the line marked `# here`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.after, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.after(x).mean((2, 3)))


class Coupled(Body):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.stem(x))
        y = y + self.other(x)  # here
        return self.finish(y)


class Shifted(Body):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.stem(x))
        y = self.norm(y)  # here
        return self.finish(2 * y)


class Sorted(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.stem(x))
        y = y.sort(1).values  # here
        return self.finish(y)


class Counted(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.stem(x))
        y = y / y.shape[1]  # here
        return self.finish(y)


class Written(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.stem(x))
        y = y.reshape(2, 8, -1)  # here
        return self.finish(y[..., None])


def place(kind: type) -> str:
    lines, first = inspect.getsourcelines(kind)
    (number,) = [first + i for i, line in enumerate(lines) if line.endswith("# here\n")]
    return f"(test_reasons.py:{number})"


REASONS: dict[type, str] = {
    Coupled: "4 dead units: add.Tensor in the model {} joins them with values that are not zero",
    Shifted: "4 dead units: batch_norm.default in norm {} makes something else of zero",
    Sorted: "4 dead units: sort.default in the model {} is not followed",
    Counted: "4 dead units: a number in div.Tensor in the model {} comes from how many they are",
    Written: "4 dead units: sizes are written down in reshape.default in the model {}",
}


@pytest.mark.parametrize("kind", REASONS)
def test_the_op_and_its_line_are_named(kind: type) -> None:
    x = torch.randn(2, 3, 8, 8)
    report = dk.compact(kind(), None, x, dead={"act": torch.arange(8) < 4})
    assert not report.changed and report.kept["act"] == REASONS[kind].format(place(kind))
    assert f"  act: kept, {report.kept['act']}" in str(report)


def test_prepared_models_know_the_lines_of_their_modules() -> None:
    model = dk.prepare(Shifted(), torch.randn(2, 3, 8, 8))
    report = dk.compact(model, None, dead={"act": torch.arange(8) < 4})
    assert report.kept["act"] == REASONS[Shifted].format(place(Shifted))


def kept(model: nn.Module, shape: tuple[int, ...], dead: dict[str, Tensor], **options: int) -> dict[str, str]:
    return dk.compact(model, None, torch.randn(shape), dead=dead, **options).kept


def test_widths_say_which() -> None:
    half = torch.arange(8) < 4
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1))
    assert kept(grouped, (2, 3, 4, 4), {"1": half}) == {"1": "4 dead units: the groups of 2.weight keep equal sizes"}
    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert kept(plain, (2, 3), {"1": half}, min_units=6) == {"1": "2 dead units: for its width (round_to, min_units)"}
    assert kept(plain, (2, 3), {"1": torch.ones(6, dtype=torch.bool)})["1"].startswith("1 dead units: linear.default in 0")


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.conv, self.second = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.second(self.conv(self.first(self.stem(x))))).mean((2, 3)))


def test_units_that_go_together_name_the_live_ones() -> None:
    why = kept(Reused(), (2, 3, 4, 4), {"first": torch.arange(8) < 4})
    assert why == {"first": "4 dead units: they go together with units of second that are not dead"}


class Several(Body):
    """Half of the units go one way, half another."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.stem(x))
        a, b = y.split([2, 6], 1)
        return self.finish(torch.cat([a, b.softmax(1)], 1))


ANYTHING: list[Callable[[], nn.Module]] = [Several, Coupled, Shifted, Reused]


@pytest.mark.parametrize("make", ANYTHING)
def test_what_stays_always_has_a_reason(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(2, 3, 8, 8)
    graph = dk.UnitGraph.trace(model, x)
    dead = {name: torch.arange(units) % 2 == 0 for name, units in graph.units.items()}
    counts = {name: int(mask.sum()) for name, mask in dead.items()}
    report = dk.compact(model, None, dead=dead, graph=graph)
    for name, count in counts.items():
        stay = count - report.removed.get(name, 0)
        assert (name in report.kept) == (stay > 0)
        assert not stay or report.kept[name].startswith(f"{stay} dead units: ")
