"""What a compaction did."""
from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CompactionReport", "Folded", "Payoff"]


@dataclass(frozen=True)
class Folded:
    """How a layer makes up for inputs that were not zero when they were removed.

    into: the bias or running mean that took what they gave on average. inputs: how many the layer lost.
    change: what is left, measured on `fold_batches`: the root mean square of the change of the layer's output, as a share
        of that output's standard deviation. change_without: the same if nothing had been folded.
    stand_ins: how many of the inputs that stay give what others gave, where a bias cannot: those that were lost would have
        given something else from position to position. 0: the bias does.
    """

    into: str
    inputs: int
    change: float
    change_without: float
    stand_ins: int = 0

    def __str__(self) -> str:
        others = f" and {self.stand_ins} of the others" if self.stand_ins else ""
        return (
            f"{self.inputs} inputs folded into {self.into}{others}, estimated change {self.change:.2g} "
            f"(without folding {self.change_without:.2g})"
        )


@dataclass(frozen=True)
class Payoff:
    """What a removal of dead units would save and cost, all in seconds; see `training.policy`.

    step: after which it was weighed. step_seconds: of a step as it is, 0 before one was measured; saved: of it, by smaller
    widths. steps_left: until the end of the run. cost: of the removal, and of the step behind it where that is slow.
    """

    step: int
    step_seconds: float
    saved: float
    steps_left: int
    cost: float

    @property
    def saving(self) -> float:
        return self.saved * self.steps_left

    @property
    def pays(self) -> bool:
        return self.saving > self.cost

    def __str__(self) -> str:
        return (
            f"removal after step {self.step} {'pays' if self.pays else 'does not pay'}: {self.saved * 1e3:.3g} of "
            f"{self.step_seconds * 1e3:.3g} ms a step saved in {self.steps_left} steps, {self.saving:.3g} s, for {self.cost:.3g} s"
        )


@dataclass(frozen=True)
class CompactionReport:
    """What a compaction did. `str()` gives a table for a terminal.

    live_units, total_units: activation name -> units now, and when the model was analysed first.
    removed: activation name -> units removed by this compaction (those that lost any).
    kept: activation name -> why dead units of it stayed.
    params_before, params_after: number of parameters.
    bytes_freed: of parameters, buffers, gradients and optimiser state together: given back to the allocator, large
        tensors' to the system. What somebody else still looks at (a view, a saved graph) goes when they let go.
    seconds: for everything; without the analysis if the graph was given. plan_seconds, commit_seconds: of it, what came
        before the first change, and the change itself.
    folded: layer -> how it makes up for removed inputs that were not zero; with `fold_batches` only.
    found, recycled: activation name -> dead units found, and given a new start, where DemP's `on_dead` is not "remove",
        or the removal did not pay.
    payoff: what DemP's policy "when_it_pays" has weighed; None with another one, and where there was nothing to weigh.
    """

    live_units: dict[str, int]
    total_units: dict[str, int]
    removed: dict[str, int]
    kept: dict[str, str]
    params_before: int
    params_after: int
    bytes_freed: int
    seconds: float
    plan_seconds: float = 0.0
    commit_seconds: float = 0.0
    found: dict[str, int] = field(default_factory=dict)
    recycled: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folded: dict[str, Folded] = field(default_factory=dict)
    payoff: Payoff | None = None

    @property
    def estimated_change(self) -> dict[str, float]:
        """Layer -> change of its output by the removal, as a share of its standard deviation; see `Folded`."""
        return {name: folded.change for name, folded in self.folded.items()}

    @property
    def changed(self) -> bool:
        """Whether anything was removed."""
        return self.params_after != self.params_before or bool(self.removed)

    def __str__(self) -> str:
        live, total = sum(self.live_units.values()), sum(self.total_units.values())
        if self.changed:
            head = (
                f"removed {sum(self.removed.values())} units, {live} of {total} left; parameters "
                f"{self.params_before:,} -> {self.params_after:,}; {self.bytes_freed / 2**20:.1f} MiB freed in "
                f"{self.seconds:.3f} s"
            )
        elif self.recycled:
            head = f"recycled {sum(self.recycled.values())} dead units of {sum(self.found.values())} found; {live} of {total} units left"
        elif self.found:
            head = f"found {sum(self.found.values())} dead units, left as they are; {live} of {total} units left"
        else:
            head = f"nothing to remove: {live} of {total} units left"
        lines = [head] if self.payoff is None else [head, f"  {self.payoff}"]
        lines += [
            f"  {name}: {self.live_units[name]} of {self.total_units[name]} (-{count})"
            for name, count in self.removed.items()
        ]
        lines += [f"  {name}: kept, {why}" for name, why in self.kept.items()]
        lines += [f"  {name}: {folded}" for name, folded in self.folded.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])
