"""Parts of the test suite, run in a process of their own, and what they say they did."""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from ..recipes.errors import RecipeError, need

__all__ = ["SuiteFigures", "checkout", "run_tests"]


@dataclass
class SuiteFigures:
    """passed, failed, skipped: tests. tried: sums of the numbers that tests record with pytest's `record_property`. output: the
    end of what pytest wrote."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    tried: Counter[str] = field(default_factory=Counter)
    output: str = ""

    @property
    def right(self) -> bool:
        return self.passed > 0 and self.failed == 0


def checkout() -> Path:
    """The root of the repository that this package is in. Raises RecipeError where there is none: tests are not installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "tests").is_dir():
        raise RecipeError(f"selfcheck runs the tests of a checkout: {root / 'tests'} must be a folder, found none")
    return root


def run_tests(
    paths: Sequence[str], *, environment: Mapping[str, str] | None = None, python: str = sys.executable, processes: int = 1,
    root: Path | None = None,
) -> SuiteFigures:
    """Run the tests in `paths`, of the checkout.

    Args:
        environment: variables beside those of this process. python: interpreter to run them with. processes: at a time.
        root: another checkout.

    Raises RecipeError where pytest is missing, or ended without having run tests to the end (a file that is not there).
    """
    if python == sys.executable:
        need("pytest", "demp selfcheck", "test")
    root = checkout() if root is None else root
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "junit.xml"
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={file}", *paths]
        command += ["-n", str(processes), "--dist", "loadfile"] if processes > 1 else []
        done = subprocess.run(
            command, cwd=root, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        output = done.stdout[-3000:]
        if done.returncode not in (0, 1) or not file.is_file():
            raise RecipeError(f"pytest {' '.join(paths)} ended with code {done.returncode}: {' '.join(output.split())[-500:]}")
        figures = _figures(file)
    figures.output = output
    return figures


def _figures(file: Path) -> SuiteFigures:
    figures = SuiteFigures()
    for case in ElementTree.parse(file).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            figures.failed += 1
        elif "skipped" in outcomes:
            figures.skipped += 1
        else:
            figures.passed += 1
        for entry in case.iter("property"):
            value = entry.get("value", "")
            if value.isdecimal():
                figures.tried[entry.get("name", "")] += int(value)
    return figures
