"""What a run has come to so far."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["DemPEvent", "DemPReport", "some_of"]


@dataclass(frozen=True)
class DemPEvent:
    """One removal: after which step, how many units each activation has left, how many parameters the model has."""

    step: int
    live_units: dict[str, int]
    parameters: int
    seconds: float


@dataclass(frozen=True)
class DemPReport:
    """What DemP has done so far. `str()` gives a few lines for a terminal.

    not_finite: parameters and buffers that held NaN or infinity when dead units were looked for last. Units whose activations
    are NaN count as live.
    """

    step: int
    total_steps: int
    live_units: dict[str, int]
    total_units: dict[str, int]
    history: list[DemPEvent] = field(default_factory=list)
    not_finite: tuple[str, ...] = ()

    @property
    def live(self) -> int:
        return sum(self.live_units.values())

    @property
    def total(self) -> int:
        return sum(self.total_units.values())

    def __str__(self) -> str:
        lines = [f"DemP after step {self.step} of {self.total_steps}: {self.live} of {self.total} units live"]
        lines += [f"  {name}: {live} of {self.total_units[name]}" for name, live in self.live_units.items()]
        if self.not_finite:
            lines.append(f"NaN or infinity in {some_of(self.not_finite)}")
        return "\n".join(lines)


def some_of(names: Sequence[str]) -> str:
    """The first three names, and how many there are beside them."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
