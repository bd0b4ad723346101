"""What the build left behind: which libraries it made and why not the others (written by setup.py)."""
from __future__ import annotations

import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
LIBRARIES = ("_C", "_C_cuda", "_host")


def read(package: Path = PACKAGE) -> dict[str, Any]:
    """The record as a dict; empty if the package was never built here."""
    try:
        record = json.loads((package / "_build_record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def library_file(name: str, package: Path = PACKAGE) -> Path | None:
    """The shared library `name` of this installation, or None. Only `_host` carries the Python version in its name."""
    suffixes = EXTENSION_SUFFIXES if name == "_host" else [".so"]
    return next((package / (name + suffix) for suffix in suffixes if (package / (name + suffix)).is_file()), None)


def missing_reason(name: str, package: Path = PACKAGE) -> str:
    """Why there is no file of the library `name`, in the build's own words."""
    record = read(package)
    if not record:
        return "the package was not built here; install it with pip"
    facts = record.get("libraries", {}).get(name, {})
    if facts.get("built"):
        return "it was built, but its file is gone; install the package again"
    return facts.get("reason") or "the build left no reason"
