"""The command `demp`. A command is a module with `add_parser(commands)`, which sets `run` on its parser's defaults."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .bench import command as bench_command
from .build_info import build_info
from .recipes import train_command
from .recipes.errors import RecipeError
from .version import __version__

__all__ = ["main"]


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line: `demp train: error: ...`, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0, 2 for a request that cannot be met (one line says why), 130 after Ctrl-C."""
    chosen, unknown = _parser().parse_known_args(arguments)
    try:
        if unknown:
            raise RecipeError(f"unrecognized arguments: {' '.join(unknown)}")
        return chosen.run(chosen) or 0
    except RecipeError as error:
        print(f"demp {chosen.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> Parser:
    parser = Parser(prog="demp", description="PyTorch training that gets smaller and faster while it runs.")
    parser.add_argument("--version", action="version", version=f"demp_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True, parser_class=Parser)
    train_command.add_parser(commands)
    bench_command.add_parser(commands)
    info = commands.add_parser("info", help="which kernels were built and are usable here, and why not")
    info.set_defaults(run=lambda chosen: print(build_info()))
    return parser
