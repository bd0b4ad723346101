"""The README's code runs, its two commands are where `.ci/run` looks for them, and the links of all pages lead somewhere."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]


def test_there_is_an_example() -> None:
    assert PYTHON


@pytest.mark.parametrize("code", PYTHON, ids=[f"block{i}" for i in range(len(PYTHON))])
def test_example_runs(code: str, tmp_path: Path) -> None:
    for library in ("lightning", "transformers"):
        if f"integrations.{library}" in code:
            pytest.importorskip(library)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny layers: threads would only wait for each other
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_two_commands_install_and_run() -> None:
    commands = [code.strip() for language, code in BLOCKS if language == "bash" and code.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert all(len(command.splitlines()) == 1 for command in commands)
    train, test = commands
    assert train.endswith('pip install -e ".[train]" && demp train')
    assert test.endswith('pip install -e ".[test]" && pytest -n 2 --dist loadfile')


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/compared.md"])
def test_files_and_headings_it_names_exist(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        name, _, heading = target.partition("#")
        if "://" in target:
            continue
        assert (path.parent / name).exists(), target
        if heading:
            text = (path.parent / name if name else path).read_text()
            headings = [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
            assert heading in headings, target
