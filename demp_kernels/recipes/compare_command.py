"""Flags of `demp compare`."""
from __future__ import annotations

import argparse
from typing import Any

from .compare import METHODS, OURS, Comparison, compare
from .settings import PRESETS
from .train_command import add_flags, epilog, settings_from

__all__ = ["add_parser"]

DESCRIPTION = """\
Trains the same network with DemP, without pruning and with other structured pruning methods, for several seeds, and
compares accuracy, sparsity and time. Finished runs are kept in --out: started again after a stop, it goes on from there.
Without --sparsity the rivals prune to the parameter sparsity that each DemP run with the same seed reached."""

REPLACED = (
    "--peak-penalty", "--target-flops", "--target-sparsity", "--seed", "--no-baseline", "--tensorboard",
    "--save-every", "--resume", "--sync-batchnorm", "--preset",
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compare", description=DESCRIPTION, epilog=epilog(), formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    group = parser.add_argument_group("what is compared")
    group.add_argument("--methods", nargs="+", metavar="NAME", help=(
        f"of {', '.join(METHODS)} (default: {' '.join(OURS)}); demp-fast is DemP with --preset fast, tp-...: Torch-Pruning's"
    ))
    group.add_argument("--seeds", type=int, metavar="N", help="runs of each method, with seeds 0 to N-1 (default: 3)")
    group.add_argument(
        "--peak-penalty", type=float, nargs="+", metavar="X", help="a demp run for each (default: that of the recipe or the data set)"
    )
    group.add_argument(
        "--target-flops", type=float, nargs="+", metavar="X",
        help="a demp-fast run for each: share of the operations that it steers to (default: that of --preset fast)",
    )
    group.add_argument(
        "--target-sparsity", type=float, nargs="+", metavar="X",
        help="a demp-fast run for each: share of the parameters that it steers to be without",
    )
    group.add_argument(
        "--dense-lr", type=float, metavar="X",
        help="learning rate of the dense runs, whose best is not always that of networks that lose units (default: that of all)",
    )
    group.add_argument("--sparsity", type=float, nargs="+", metavar="X", help="parameter sparsities of the rivals")
    add_flags(parser, without=REPLACED)
    parser.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> None:
    given = vars(chosen)
    names = {
        "methods": "methods", "seeds": "seeds", "peak_penalty": "peak_penalties", "target_flops": "target_flops",
        "target_sparsity": "target_sparsities", "sparsity": "sparsities", "dense_lr": "dense_lr",
    }
    choices: dict[str, Any] = {
        name: tuple(given[flag]) if isinstance(given[flag], list) else given[flag]
        for flag, name in names.items() if flag in given
    }
    for flag in ("peak_penalty", "target_flops", "target_sparsity"):
        given.pop(flag, None)  # of runs by themselves, not of the settings of all
    choices["fast"] = {name: value for name, value in PRESETS["fast"].items() if name not in given}
    compare(settings_from(chosen), Comparison(**choices))
