"""Flags of `demp train`."""
from __future__ import annotations

import argparse
from collections.abc import Container
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..training.penalty import PENALTY_TARGETS
from ..training.policy import POLICIES
from .data import DATA
from .models import MODELS
from .ranks import joined
from .recipe_files import read_recipe, recipe_summaries
from .resume import begun_settings
from .settings import AMP, CRITERIA, DEFAULTS, LR_SCHEDULES, OPTIMIZERS, PRESETS, WARM_UP, TrainSettings, resolve_device
from .train import train

__all__ = ["add_flags", "add_parser", "epilog", "settings_from"]

DESCRIPTION = """\
Trains a dense network and the same one with DemP, whose dying units are removed on the way, under the same seed and
budget. Prints a table; writes metrics.csv, units.csv, summary.json, report.html and checkpoints into --out.

    torchrun --nproc-per-node N -m demp_kernels train ...

trains on N processes, each with its share of every batch: a GPU each, or on the CPU --threads each."""

# (group, flags); a flag without "type" or "action" is a text. What is not given keeps TrainSettings' default.
FLAGS: list[tuple[str, dict[str, dict[str, Any]]]] = [
    ("network and data", {
        "--recipe": {"metavar": "NAME", "help": "start from a named recipe (listed below) or a JSON file of settings"},
        "--model": {"metavar": "NAME", "help":
            f"{', '.join(MODELS)}, or a classification model of torchvision (default: resnet18)"},
        "--width": {"type": int, "help": "channels of the first stage (vit: of a token, mlp: of a hidden layer)"},
        "--data": {"metavar": "NAME", "help": f"{', '.join(DATA)} (default: digits)"},
        "--data-dir": {"type": Path, "help":
            "folder of the data, needed for folder; without it cifar10 is downloaded, and fashion-mnist where Debian's package of it is not installed"},
        "--image-size": {"type": int, "help": "resize images to NxN (default: as they are; digits: 16; folder: 224)"},
        "--train-size": {"type": int, "help": "use N training images, or all where there are fewer"},
        "--workers": {"type": int, "help": "processes that decode images, for --data folder (default: 2)"},
    }),
    ("training", {
        "--epochs": {"type": int, "help": "passes over the training images"},
        "--batch-size": {"type": int, "help": "images a step, those of all processes"},
        "--accumulate": {"type": int, "help":
            "go through a process's share of a batch in N parts, for less memory (default: 1); a batch norm then sees a part"},
        "--sync-batchnorm": {"action": "store_true", "help":
            "on several GPUs batch norms see the parts of all processes together, not each its own: with it, or in a network "
            "without batch norm (vit), the losses are those of one process but for rounding"},
        "--optimizer": {"choices": OPTIMIZERS, "help": "adamw (default), or sgd with momentum"},
        "--lr": {"type": float, "help": "peak of the learning rate"},
        "--momentum": {"type": float, "help": "of sgd (default: 0.9)"},
        "--weight-decay": {"type": float, "help": "decoupled (default: 5e-4)"},
        "--label-smoothing": {"type": float, "help": "share of the label given to all classes (default: 0)"},
        "--lr-schedule": {"choices": LR_SCHEDULES, "help": "one-cycle (default), steps, constant"},
        "--lr-drops": {"type": int, "nargs": "+", "metavar": "EPOCH", "help": "epochs at which steps drops the rate"},
        "--lr-factor": {"type": float, "help": "what a drop multiplies the rate by (default: 0.1)"},
        "--warm-up": {"type": float, "help": f"share of the run in which the rate rises (default: {WARM_UP:g})"},
        "--seed": {"type": int, "help": "of initial weights, batches and noise (default: 0)"},
    }),
    ("DemP", {
        "--preset": {"choices": tuple(PRESETS), "help":
            "fast: --target-flops 0.2 --steer-until 0.3 instead of the paper's penalty, so that most of the run is small; "
            "cost 0.7 points of accuracy on the digits"},
        "--peak-penalty": {"type": float, "help": "peak weight of the L1 penalty: more removes more units"},
        "--penalty-on": {"choices": PENALTY_TARGETS, "help":
            "what is penalised (default: scales, or weights in a network without normalisation)"},
        "--target-flops": {"type": float, "help":
            "closed loop: push units towards death until this share of the operations is left; the peak penalty is then 0 where neither flag nor recipe gives one"},
        "--target-sparsity": {"type": float, "help": "likewise, until this share of the parameters is gone"},
        "--steer-start": {"type": float, "help": "share of the run at which the way to the target begins (default: 0.05)"},
        "--steer-until": {"type": float, "help": "share of the run by which the target is to be met (default: 0.3)"},
        "--push-rate": {"type": float, "help": "what a pushed scale or offset moves in a step (default: 0.02)"},
        "--peak-noise": {"type": float, "help": "peak standard deviation of the weight noise (default: 5e-5)"},
        "--ramp": {"type": float, "help": "share of the run that the one cycle of penalty and noise takes (default: 0.87)"},
        "--prune-every": {"type": int, "help": "look for dead units every N steps (default: once an epoch, with a target four times)"},
        "--criterion": {"choices": CRITERIA, "help":
            "a unit is dead that was never active in the training steps since the last look (window, the default) or "
            "in 1,536 training images (scan)"},
        "--policy": {"choices": POLICIES, "help":
            "remove what is dead at every look (always, the default), or where the time that it is estimated to save in the steps "
            "left exceeds what it takes, and after the last step (when_it_pays); times are measured, so a run then need not "
            "repeat itself bit for bit"},
        "--round-to": {"type": int, "help": "keep dead units so that widths are multiples of N (default: 8, see below)"},
        "--no-baseline": {"dest": "baseline", "action": "store_false", "help": "skip the dense run"},
    }),
    ("machine", {
        "--device": {"metavar": "NAME", "help": "auto (default), cpu, cuda, cuda:N"},
        "--threads": {"type": int, "help": "CPU threads (default: torch's choice)"},
        "--amp": {"nargs": "?", "const": "bf16", "choices": AMP, "help":
            "mixed precision; bf16 when no value is given"},
        "--channels-last": {"action": argparse.BooleanOptionalAction, "help":
            "memory layout (default: for convolutional networks)"},
        "--compile": {"action": "store_true", "help": "torch.compile both networks"},
    }),
    ("output", {
        "--out": {"type": Path, "help": "folder for the results (default: demp-run)"},
        "--tensorboard": {"action": "store_true", "help": "log into DIR/tensorboard as well"},
        "--evaluate-every": {"type": int, "help": "epochs from one evaluation to the next (default: 1); the last is evaluated"},
        "--save-every": {"type": int, "help": "write a checkpoint every N steps (default: once an epoch)"},
        "--resume": {"action": "store_true", "help":
            "go on where the run in --out stopped, with its settings; without it the files there are overwritten"},
    }),
]
METAVARS = {int: "N", float: "X", Path: "DIR"}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train", description=DESCRIPTION, epilog=epilog(), formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add_flags(parser)
    parser.set_defaults(run=_run)


def add_flags(parser: argparse.ArgumentParser, without: Container[str] = ()) -> None:
    """Give `parser` the flags of a training run, except for those in `without`."""
    for title, flags in FLAGS:
        group = parser.add_argument_group(title)
        for flag, options in flags.items():
            if flag not in without:
                metavar = METAVARS.get(options.get("type"))
                group.add_argument(flag, **{**({"metavar": metavar} if metavar else {}), **options})


def _run(chosen: argparse.Namespace) -> None:
    given = given_settings(chosen)
    resume = "resume" in chosen
    begun = begun_settings(given.get("out", TrainSettings().out)) if resume else None
    settings = TrainSettings(**given) if begun is None else replace(begun, **given)
    with joined(resolve_device(settings.device)):
        train(settings, resume=resume)


def settings_from(chosen: argparse.Namespace) -> TrainSettings:
    """The recipe's settings, with those of the flags over them."""
    return TrainSettings(**given_settings(chosen))


def given_settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """What the recipe, the preset over it and the flags over both say, and nothing by default."""
    names = {field.name for field in fields(TrainSettings)}
    flags = {name: value for name, value in vars(chosen).items() if name in names}
    if "lr_drops" in flags:
        flags["lr_drops"] = tuple(flags["lr_drops"])
    recipe = read_recipe(chosen.recipe) if "recipe" in chosen else {}
    return {**recipe, **(PRESETS[chosen.preset] if "preset" in chosen else {}), **flags}


def epilog() -> str:
    """What the help of the flags refers to: recipes, defaults, rounding."""
    lines = ["defaults by data set:"]
    for data, values in DEFAULTS.items():
        lines.append(f"  {data}: " + ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items()))
    recipes = [f"  {name}: {about}" for name, about in recipe_summaries().items()]
    return "\n".join([
        "recipes:", *recipes, "", *lines, "  (the widths are those of resnet18, vgg16 starts with 64, mlp with 512, vit with 128; networks but resnet18,",
        "  vgg16 and mlp start at --lr 0.001; with a target --peak-penalty is 0 where neither flag nor recipe gives one)",
        "", "Tensor cores work in blocks of channels: there a multiple of 8 is faster than a few units less. --round-to 1 removes",
        "every dead unit.",
    ])
