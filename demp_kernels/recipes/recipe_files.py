"""Named recipes: JSON files of settings in `files/`, for `--recipe`."""
from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .settings import TrainSettings

__all__ = ["read_recipe", "recipe_summaries"]

FOLDER = Path(__file__).parent / "files"


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe: its name among `recipe_summaries`, or the path of a JSON file of the same form, that is
    {"about": text, <field of TrainSettings>: value, ...}.

    Raises RecipeError, in one line, for an unknown name, a file that is not JSON, or settings that there are none of.
    """
    file = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(recipe_summaries())
        raise RecipeError(f"recipe must be a .json file or one of {known}, got {name!r}") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe cannot be read: {file}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe must be a JSON object of settings, got {type(values).__name__} in {file}")
    values.pop("about", None)
    types = {field.name: field.type for field in fields(TrainSettings)}
    for key, value in values.items():
        if key not in types:
            raise RecipeError(f"recipe has an unknown setting {key!r}: {file}")
        if not _fits(value, types[key]):
            raise RecipeError(f"recipe setting {key} must be {types[key]}, got {value!r}: {file}")
    if "lr_drops" in values:
        values["lr_drops"] = tuple(values["lr_drops"])
    for key in ("data_dir", "out"):
        if values.get(key) is not None:
            values[key] = Path(values[key])
    return values


def recipe_summaries() -> dict[str, str]:
    """Name -> what it is, of the recipes that come with the package."""
    files = sorted(FOLDER.glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8"))["about"] for file in files}


def _fits(value: Any, declared: str) -> bool:
    kinds = declared.split(" | ")
    if value is None:
        return "None" in kinds
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, int):
        return "int" in kinds or "float" in kinds
    if isinstance(value, float):
        return "float" in kinds
    if isinstance(value, str):
        return "str" in kinds or "Path" in kinds
    return declared == "tuple[int, ...]" and isinstance(value, list) and all(type(v) is int for v in value)
