"""The checks of `demp selfcheck`: what each does in its full and in its short form, and what it says of itself."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .fuzz import fuzz_checkpoints
from .kills import survive_kills
from .sanitizers import SANITIZERS, run_sanitizer
from .soak import soak
from .suite import SuiteFigures, run_tests
from .versions import try_versions

__all__ = ["CHECKS", "Check", "Outcome", "Size"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How much is done. short: seconds instead of minutes a check. minutes: of the soak."""

    short: bool = False
    minutes: float = 120.0


@dataclass(frozen=True)
class Outcome:
    """details: what went wrong, for the terminal."""

    passed: bool
    figures: str
    details: str = ""


@dataclass(frozen=True)
class Check:
    """what: a sentence for the table. default: whether it runs when no check is named. run: may raise RecipeError where it
    cannot be carried out."""

    what: str
    run: Callable[[Size, Say], Outcome]
    default: bool = True


def _kills(size: Size, say: Say) -> Outcome:
    figures = survive_kills(2 if size.short else 50, say=say)
    return Outcome(figures.survived == figures.kills > 0, str(figures).splitlines()[0], "\n".join(figures.failures))


def _wrong_calls(size: Size, say: Say) -> Outcome:
    say("tests of wrong calls")
    library, command = run_tests(["tests/test_bad_input.py"]), run_tests(["tests/test_bad_commands.py"])
    text = f"{library.passed} wrong calls of the library and {command.passed} of the command refused"
    return _of_tests([library, command], text)


def _files(size: Size, say: Say) -> Outcome:
    say("tests of damaged and hostile files")
    written = run_tests(["tests/training/test_hostile_checkpoints.py"])
    changed = fuzz_checkpoints(400 if size.short else 20_000, say=say)
    text = f"{written.passed} tests of damaged and hostile files; {str(changed).splitlines()[0]}"
    outcome = _of_tests([written], text)
    return Outcome(outcome.passed and not changed.failures, outcome.figures, "\n".join([outcome.details, *changed.failures]).strip())


def _networks(size: Size, say: Say) -> Outcome:
    count = 25 if size.short else 2000
    say(f"{count} random networks")
    figures = run_tests(["tests/compaction/test_random_networks.py"], environment={"DEMP_RANDOM_NETWORKS": str(count)})
    return _of_tests([figures], f"{figures.tried['networks tried']} networks")


def _inputs(size: Size, say: Say) -> Outcome:
    count = 40 if size.short else 2000
    say(f"{count} random inputs of every op")
    figures = run_tests(["tests/ops/test_random_inputs.py"], environment={"DEMP_RANDOM_INPUTS": str(count)})
    return _of_tests([figures], f"{figures.tried['inputs tried']} inputs of {figures.passed} ops")


def _sanitizers(size: Size, say: Say) -> Outcome:
    part: dict[str, Any] = dict(kernels=["weight_noise"], tests=["tests/ops/test_weight_noise.py"], levels=["portable"]) if size.short else {}
    found = [run_sanitizer(sanitizer, say=say, **part) for sanitizer in SANITIZERS]
    right = all(one.found == one.planted > 0 and one.passed > 0 and not one.reports and not one.failures for one in found)
    lines = [str(one).splitlines() for one in found]
    return Outcome(right, "; ".join(line[0] for line in lines), "\n".join(text for line in lines for text in line[1:]))


def _soak(size: Size, say: Say) -> Outcome:
    figures = soak(60 * size.minutes, say=say)
    return Outcome(figures.passed, str(figures))


def _versions(size: Size, say: Say) -> Outcome:
    outcomes = try_versions(short=size.short, say=say)
    text = "; ".join(f"torch {one.version}: {one.figures.passed} passed, {one.figures.failed} failed" for one in outcomes)
    return Outcome(all(one.figures.right for one in outcomes), text, "\n".join(one.figures.output for one in outcomes if not one.figures.right))


def _of_tests(parts: list[SuiteFigures], text: str) -> Outcome:
    failed = sum(part.failed for part in parts)
    return Outcome(
        all(part.right for part in parts), text + (f", {failed} tests failed" if failed else ""),
        "\n".join(part.output for part in parts if not part.right),
    )


CHECKS: dict[str, Check] = {
    "kills": Check("`demp train` killed at random moments, resumed, compared bit for bit with the run nobody disturbed", _kills),
    "wrong-calls": Check("every wrong call gets an error with argument, requirement and what it got, and changes nothing", _wrong_calls),
    "files": Check("checkpoints that are cut, changed, foreign, hostile, or changed at random: refused, or read as written", _files),
    "inputs": Check("random values, layouts, sizes, types and seeds through every op, against the reference in float64", _inputs),
    "networks": Check("random networks, random dead units: outputs and training go on as before, three removals in a row", _networks),
    "sanitizers": Check("the CPU kernels' tests under AddressSanitizer, UBSan and ThreadSanitizer, each of which has to find what is planted", _sanitizers),
    "soak": Check("train, compact, save, load, again and again: files read back bit for bit, memory flat", _soak),
    "versions": Check("the library's tests under torch 2.11, 2.13 and 2.14, on one binary built against the oldest", _versions, default=False),
}
