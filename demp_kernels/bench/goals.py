"""What is wanted of the op rows, and whether it was reached: each goal is computed from rows, never from memory."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

from .rows import Group, Row, groups

__all__ = ["CLOCK", "GOALS", "Goal", "Verdict", "judge"]

Choice = Callable[[Group], bool]
Measure = Callable[[Group], "float | None"]

CLOCK = 1.03
""""Not slower" allows 3%: what two identical programs differ by on a quiet machine."""


@dataclass(frozen=True)
class Goal:
    """`measure` of every case that `choice` takes must be at most `limit` (at least, with `at_least`).

    why: what stands in the way where it is not met, as found on two CPU cores; benchmarks/README.md has the numbers.
    """

    text: str
    limit: float
    choice: Choice
    measure: Measure
    why: str
    at_least: bool = False
    unit: str = "x"

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def limit_text(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {number(self.limit, self.unit)}"


@dataclass(frozen=True)
class Verdict:
    """A goal against rows. cases: how many quiet ones it applies to, reached: how many of them reach it; worst: the value
    that is furthest off, where: its case. noisy: cases left out because the machine was not quiet."""

    goal: Goal
    cases: int
    reached: int
    median: float | None
    worst: float | None
    where: str
    noisy: int

    @property
    def met(self) -> bool | None:
        """None if nothing that the goal speaks of was measured on a quiet machine."""
        return None if not self.cases else self.reached == self.cases

    @property
    def word(self) -> str:
        if self.met is None:
            return "machine not quiet" if self.noisy else "not measured"
        return "met" if self.met else "not met"


def number(value: float, unit: str) -> str:
    return f"{value:.2f}x" if unit == "x" else f"{100 * value:.1f}%"


def judge(rows: Iterable[Row]) -> list[Verdict]:
    """Every goal of `GOALS` against the rows."""
    cases = groups(rows)
    return [_verdict(goal, cases) for goal in GOALS]


def _verdict(goal: Goal, cases: list[Group]) -> Verdict:
    measured = [(value, group) for group in cases if goal.choice(group) and (value := goal.measure(group)) is not None]
    found = [(value, group) for value, group in measured if group.quiet]
    noisy = len(measured) - len(found)
    if not found:
        return Verdict(goal, 0, 0, None, None, "", noisy)
    found.sort(key=lambda pair: pair[0], reverse=not goal.at_least)
    worst, where = found[0]
    reached = sum(goal.reached(value) for value, _ in found)
    return Verdict(goal, len(found), reached, median(value for value, _ in found), worst, describe(where), noisy)


def describe(group: Group) -> str:
    """A case in a few words."""
    case = group.case
    noise = "+noise" if case.noise else ""
    text = f"{case.function}{noise} {case.direction}, {case.layout} {case.dtype} {case.shape}"
    return text + (", allocator not tuned" if case.allocator == "default" else "")


# --- which cases -----------------------------------------------------------------------------------------------------


def _activation(direction: str, *, noise: bool) -> Choice:
    def choice(group: Group) -> bool:
        case = group.case
        return (case.op, case.direction, case.noise, case.function) == ("activation", direction, noise, "relu")

    return choice


def _input_bytes(group: Group) -> int:
    return group.rows["copy"].bytes // 2 if "copy" in group.rows else 0


def _beyond_cache(choice: Choice) -> Choice:
    return lambda group: choice(group) and _input_bytes(group) > group.case.cache_bytes


def _norm_act(group: Group) -> bool:
    case = group.case
    return case.op == "norm_act" and case.direction == "both" and case.dtype == "float32" and not case.noise


def _op(name: str) -> Choice:
    return lambda group: group.case.op == name


def _ratio(variant: str, base: str) -> Measure:
    return lambda group: group.ratio(variant, base)


def _speedup(base: str, variant: str = "demp") -> Measure:
    return lambda group: group.ratio(base, variant)


def _per_byte(variant: str, base: str) -> Measure:
    return lambda group: group.ratio_per_byte(variant, base)


CALL = "data that fits the caches: a call's fixed costs (three outputs, the dispatcher, counters of each thread) outweigh it"

GOALS: tuple[Goal, ...] = (
    Goal("relu + count, forward: time of an allocated copy of the same bytes", 1.10,
         _activation("forward", noise=False), _ratio("demp", "copy"), CALL),
    Goal("relu + count, forward: time of torch.relu alone", CLOCK,
         _activation("forward", noise=False), _ratio("demp", "plain"), CALL),
    Goal("relu + count, backward: time of a copy, per byte", 1.10,
         _activation("backward", noise=False), _per_byte("demp", "copy"), CALL),
    Goal("relu + count, backward: time of torch.relu's backward", CLOCK,
         _activation("backward", noise=False), _ratio("demp", "plain"), CALL),
    Goal("relu + count + noise, forward, beyond the last cache: time of an allocated copy", 3.0,
         _beyond_cache(_activation("forward", noise=True)), _ratio("demp", "copy"),
         "a normal takes 0.3 ns of arithmetic an element, whatever its type, and a 16-bit element is copied in half the time"),
    Goal("relu + count + noise, backward: time of a copy, per byte", 1.10,
         _activation("backward", noise=True), _per_byte("demp", "copy"), CALL),
    Goal("BatchNorm + ReLU + count, forward and backward, float32: speedup over eager BatchNorm2d + ReLU", 3.0,
         _norm_act, _speedup("plain"),
         "channels_last: statistics are known behind the last row only, 8 passes over memory where NCHW takes 5; a residual "
         "adds two to both sides; small tensors: autograd's bookkeeping", at_least=True),
    Goal("BatchNorm + ReLU + count, forward and backward, float32: time of a copy of x", 6.0,
         _norm_act, _ratio("demp", "copy_into"), CALL),
    Goal("dispatch of relu + count on a tiny tensor: time of torch.relu", 1.5,
         _op("dispatch"), _ratio("demp", "plain"),
         "forwards alone: a second op through the dispatcher, and questions that a module asks in Python"),
    Goal("weight noise over all parameters: time of a copy of them", 3.0,
         _op("weight_noise"), _ratio("demp", "copy_into"),
         "parameters that fit the cache are copied faster than normals are drawn"),
    Goal("ResNet-18 step, nothing pruned, with fused AdamW and tuned allocator: speedup over plain PyTorch's defaults in the "
         "same layout", 1.3,
         _op("step"), _speedup("plain_channels_last", "demp_tuned"),
         "convolutions are some three quarters of the step, and the same on both sides", at_least=True),
    Goal("ResNet-18 step, nothing pruned, with fused AdamW and tuned allocator: speedup over plain PyTorch's defaults in NCHW",
         1.6, _op("step"), _speedup("plain_nchw", "demp_tuned"), "convolutions are the same on both sides", at_least=True),
    Goal("ResNet-18 step, nothing pruned: speedup over plain PyTorch with the same fused AdamW and tuned allocator", 1.0,
         _op("step"), _speedup("plain_fused_optimizer_tuned", "demp_tuned"),
         "counts and noise cost more than fused normalisations save", at_least=True),
    Goal("DemP's own work as a share of a dense step", 0.02,
         _op("step"), _ratio("own_work", "demp_tuned"),
         "narrow networks: counting and noise cost a fixed time a layer, the convolutions little", unit="%"),
    Goal("compaction, commit: time of a warm copy of what is kept", 2.0,
         _op("compaction"), _ratio("commit", "copy_into"),
         "a gather of every second row and column reads twice the cache lines, fresh memory is slower than warm, and every "
         "tensor costs some 20 us of Python and allocation"),
    Goal("compaction, plan: share of the commit", 0.10,
         _op("compaction"), _ratio("plan", "commit"),
         "it grows with the number of layers, the commit with their size", unit="%"),
    Goal("compaction: speedup over Torch-Pruning", 20.0,
         _op("compaction"), _speedup("torch_pruning", "demp"),
         "the optimiser's moments move too, three times the bytes that Torch-Pruning moves", at_least=True),
)
