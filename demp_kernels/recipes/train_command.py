"""Flags of `demp train`."""
from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..training.penalty import PENALTY_TARGETS
from .data import DATA
from .models import MODELS
from .settings import AMP, CRITERIA, DEFAULTS, TrainSettings
from .train import train

__all__ = ["add_parser"]

DESCRIPTION = """\
Trains a dense network and the same one with DemP, whose dying units are removed on the way, under the same seed and
budget. Prints a table; writes metrics.csv, units.csv, summary.json, report.html and checkpoints into --out."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train", help="train with DemP, beside a dense baseline", description=DESCRIPTION, epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )
    what = parser.add_argument_group("network and data")
    what.add_argument("--model", metavar="NAME", help=f"{', '.join(MODELS)}, or a classification model of torchvision (default: resnet18)")
    what.add_argument("--width", type=int, metavar="N", help="channels of the first stage (vit: of the tokens, mlp: of a hidden layer)")
    what.add_argument("--data", metavar="NAME", help=f"{', '.join(DATA)} (default: digits)")
    what.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the data; fashion-mnist and cifar10 are downloaded without it")
    what.add_argument("--image-size", type=int, metavar="N", help="resize images to NxN (default: as they are; folder: 224)")
    what.add_argument("--train-size", type=int, metavar="N", help="use N training images")
    what.add_argument("--workers", type=int, metavar="N", help="processes that decode images, for --data folder (default: 2)")

    how = parser.add_argument_group("training")
    how.add_argument("--epochs", type=int, metavar="N")
    how.add_argument("--batch-size", type=int, metavar="N")
    how.add_argument("--lr", type=float, metavar="X", help="peak of the one-cycle learning rate (AdamW)")
    how.add_argument("--weight-decay", type=float, metavar="X", help="decoupled (default: 5e-4)")
    how.add_argument("--seed", type=int, metavar="N", help="of initial weights, batches and noise (default: 0)")

    demp = parser.add_argument_group("DemP")
    demp.add_argument("--peak-penalty", type=float, metavar="X", help="peak weight of the L1 penalty on the normalisation scales: more removes more")
    demp.add_argument("--penalty-on", choices=PENALTY_TARGETS, help="what is penalised (default: scales, or weights in a network without normalisation)")
    demp.add_argument("--peak-noise", type=float, metavar="X", help="peak standard deviation of the weight noise (default: 5e-5)")
    demp.add_argument("--prune-every", type=int, metavar="STEPS", help="look for dead units this often (default: once an epoch)")
    demp.add_argument("--criterion", choices=CRITERIA, help="dead is: never active in the training steps since the last look (window, the default), or in a scan of 1,536 training images (scan)")
    demp.add_argument("--round-to", type=int, metavar="N", help="keep dead units so that widths are multiples of N")
    demp.add_argument("--no-baseline", dest="baseline", action="store_false", help="skip the dense run")

    where = parser.add_argument_group("machine")
    where.add_argument("--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:N")
    where.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    where.add_argument("--amp", nargs="?", const="bf16", choices=AMP, help="mixed precision (bf16 when no value is given)")
    where.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="memory layout (default: for convolutional networks)")
    where.add_argument("--compile", action="store_true", help="torch.compile both networks")

    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: demp-run)")
    output.add_argument("--tensorboard", action="store_true", help="log to DIR/tensorboard as well")
    parser.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> None:
    names = {field.name for field in fields(TrainSettings)}
    train(TrainSettings(**{name: value for name, value in vars(chosen).items() if name in names}))


def _epilog() -> str:
    lines = ["defaults by data set:"]
    for data, values in DEFAULTS.items():
        lines.append(f"  {data}: " + ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items()))
    return "\n".join([*lines, "  (the widths are those of resnet18; networks without batch norm start at --lr 0.001)"])
