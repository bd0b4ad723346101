"""The test suite under every supported torch, with one binary, built against the oldest.

Each torch gets an environment of its own, made in a temporary folder and removed again: some 6 GB and up to a quarter of an
hour each. The environments differ in torch only; the compiled libraries are the same files in all of them.
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..recipes.errors import RecipeError
from .suite import SuiteFigures, checkout, run_tests

__all__ = ["VERSIONS", "VersionOutcome", "try_versions"]

VERSIONS = ("2.11.0", "2.13.0", "2.14.1")
"""Oldest first: it builds."""
PACKAGES = (
    "setuptools>=77.0.3,<82", "numpy", "scipy", "scikit-learn", "matplotlib", "rich", "hypothesis", "pytest>=8", "pytest-benchmark",
    "pytest-xdist", "tensorboard", "pybind11",
)
"""What the tests need beside torch; those of torchvision, Lightning and transformers skip themselves where these are missing."""
PARTS = (
    "tests/ops", "tests/compaction", "tests/graph", "tests/training", "tests/test_modules.py", "tests/test_training.py",
    "tests/test_rewrite.py", "tests/test_fusion.py", "tests/test_bad_input.py", "tests/test_steering.py",
)
SHORT_PARTS = ("tests/ops", "tests/test_modules.py")


@dataclass
class VersionOutcome:
    version: str
    figures: SuiteFigures


def try_versions(
    versions: Sequence[str] = VERSIONS, *, short: bool = False, say: Callable[[str], None] = lambda text: None
) -> list[VersionOutcome]:
    """Build against versions[0], then run the tests with that build under each.

    Raises RecipeError where an environment cannot be made, or the build fails.
    """
    outcomes: list[VersionOutcome] = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        _call(["git", "clone", "--quiet", str(checkout()), str(clone)], "clone")
        for version in versions:
            say(f"torch {version}: environment")
            python = _environment(Path(folder) / version, version)
            if not outcomes:
                say(f"torch {version}: build")
                _call([str(python), "setup.py", "build_ext", "--inplace"], "build", cwd=clone, DEMP_REQUIRE_EXT="1", DEMP_CUDA="0")
            say(f"torch {version}: tests")
            figures = run_tests(
                SHORT_PARTS if short else PARTS, python=str(python), root=clone, processes=2, environment={"PYTHONPATH": str(clone)},
            )
            outcomes.append(VersionOutcome(version, figures))
            say(f"torch {version}: {figures.passed} passed, {figures.failed} failed, {figures.skipped} skipped")
    return outcomes


def _environment(folder: Path, version: str) -> Path:
    """A virtual environment with this torch. Returns its Python."""
    _call([sys.executable, "-m", "venv", str(folder)], f"environment of torch {version}")
    python = folder / "bin" / "python"
    _call([str(python), "-m", "pip", "install", "--quiet", f"torch=={version}", *PACKAGES], f"installation of torch {version}")
    return python


def _call(command: Sequence[str], what: str, cwd: Path | None = None, **environment: str) -> None:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RecipeError(f"versions: {what} failed: {' '.join(done.stdout.split())[-600:]}")
