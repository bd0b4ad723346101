"""What a run has come to so far."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..compaction.report import Payoff
from ..compaction.state_checks import entry

__all__ = ["DemPEvent", "DemPReport", "check_history", "some_of"]


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
    are NaN count as live. decisions: what the policy "when_it_pays" has weighed.
    """

    step: int
    total_steps: int
    live_units: dict[str, int]
    total_units: dict[str, int]
    history: list[DemPEvent] = field(default_factory=list)
    not_finite: tuple[str, ...] = ()
    decisions: list[Payoff] = field(default_factory=list)

    @property
    def live(self) -> int:
        return sum(self.live_units.values())

    @property
    def total(self) -> int:
        return sum(self.total_units.values())

    def __str__(self) -> str:
        lines = [f"DemP after step {self.step} of {self.total_steps}: {self.live} of {self.total} units live"]
        lines += [f"  {name}: {live} of {self.total_units[name]}" for name, live in self.live_units.items()]
        lines += [f"  {decision}" for decision in self.decisions[-1:]]
        if self.not_finite:
            lines.append(f"NaN or infinity in {some_of(self.not_finite)}")
        return "\n".join(lines)


def check_history(history: list[Any], decisions: Any, done: int) -> None:
    """Raises ValueError unless events and decisions, from a file, are those of a run of `done` steps."""
    if not isinstance(decisions, list):
        raise ValueError(f"decisions must be a list, got {type(decisions).__name__}")
    for event in history:
        for key, kind in (("step", int), ("live_units", dict), ("parameters", int), ("seconds", float)):
            entry(event, key, kind, "an event of DemP's history")
    for decision in decisions:
        for key, kind in (("step", int), ("step_seconds", float), ("saved", float), ("steps_left", int), ("cost", float)):
            entry(decision, key, kind, "a decision of DemP")
    for event in [*history, *decisions]:
        if not 0 <= event["step"] <= done:
            raise ValueError(f"an event of DemP's history must be of a step between 0 and {done}, got {event['step']}")


def some_of(names: Sequence[str]) -> str:
    """The first three names, and how many there are beside them."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
