"""A generated part of a hand-written file, between two marker lines."""
from __future__ import annotations

from pathlib import Path

from ..recipes.errors import RecipeError

__all__ = ["check_markers", "markers", "replace_between"]


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def check_markers(path: Path, name: str) -> str:
    """The text of a file that has each of the `markers` once, in order. Raises RecipeError for another, or for none."""
    begin, end = markers(name)
    if not path.is_file():
        raise RecipeError(f"readme: {path} must be a file, found none")
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise RecipeError(f"readme: {path} must have the lines {begin} and {end}, each once and in that order")
    return text


def replace_between(path: Path, name: str, content: str) -> bool:
    """Put `content` between the `markers` of a file. Returns whether it changed. Raises RecipeError as `check_markers` does."""
    text, (begin, end) = check_markers(path, name), markers(name)
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    changed = f"{before}{begin}\n{content}\n{end}{after}"
    path.write_text(changed, encoding="utf-8")
    return changed != text
