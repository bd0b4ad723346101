"""What can be known without running: ruff, mypy, and that the stub of the C++ module is true."""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from demp_kernels import host

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_ruff() -> None:
    pytest.importorskip("ruff")
    run("ruff", "check", ".")


def test_mypy() -> None:
    pytest.importorskip("mypy")
    run("mypy", "demp_kernels")


@pytest.mark.skipif(host._host is None, reason="the host library was not built")
def test_stub_of_the_host_module() -> None:
    """The stub has the functions of the built module, with the arguments that pybind11 writes into their docstrings.

    `python -m mypy.stubtest demp_kernels._host` asks the same, and takes half a minute."""
    stub = ast.parse((ROOT / "demp_kernels" / "_host.pyi").read_text())
    written = {node.name: [arg.arg for arg in node.args.args] for node in stub.body if isinstance(node, ast.FunctionDef)}
    built = {name: getattr(host._host, name).__doc__ for name in dir(host._host) if not name.startswith("_")}
    assert written.keys() == built.keys()
    for name, arguments in written.items():
        signature = built[name].split(" -> ")[0]
        assert re.findall(r"(\w+): ", signature) == arguments, signature
