"""Which run a folder holds: its settings are written down before its first step, and a resumed run must have the same."""
from __future__ import annotations

import json
import os
from pathlib import Path

from .errors import RecipeError
from .recipe_files import read_recipe
from .settings import TrainSettings

__all__ = ["SETTINGS_FILE", "begin_run", "begun_settings", "check_same_run"]

SETTINGS_FILE = "settings.json"

FREE = ("data_dir", "out", "workers", "tensorboard", "evaluate_every", "save_every")
"""Settings that do not change what a run computes: a resumed run may have others."""


def begin_run(settings: TrainSettings, checkpoints: list[Path], resume: bool) -> None:
    """Make `settings.out` the folder of a new run: without checkpoints, with its settings, in the form of a recipe.

    resume: raise RecipeError rather than remove checkpoints whose settings are lost.
    """
    for path in checkpoints:
        if resume and path.exists():
            raise RecipeError(f"out has a checkpoint but no {SETTINGS_FILE}: {settings.out} cannot be resumed")
        path.unlink(missing_ok=True)
    about = {"about": "the settings of this run; demp train --resume goes on with it"}
    part = settings.out / f".{SETTINGS_FILE}.partial"
    part.write_text(json.dumps({**about, **settings.as_json()}, indent=2) + "\n")
    os.replace(part, settings.out / SETTINGS_FILE)


def begun_settings(out: Path) -> TrainSettings | None:
    """The settings of the run that `out` holds, or None if there is none. Raises RecipeError for a damaged file."""
    file = out / SETTINGS_FILE
    return TrainSettings(**read_recipe(str(file))) if file.is_file() else None


def check_same_run(settings: TrainSettings, begun: TrainSettings) -> None:
    """Raises RecipeError, naming the setting, if a run with `settings` is another one than the one that was begun."""
    before = begun.as_json()
    for name, value in settings.as_json().items():
        if name not in FREE and value != before[name]:
            flag = name.replace("_", "-")
            raise RecipeError(
                f"{flag} must be that of the run in {settings.out}, {before[name]}, to resume it, got {value}"
            )
