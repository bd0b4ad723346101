"""The command `demp`. A command is a module with `add_parser(commands)`, which sets `run` on its parser's defaults."""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from .build_info import build_info
from .kernel_table import format_table, kernel_table
from .recipes.errors import RecipeError
from .version import __version__

__all__ = ["main"]

COMMANDS = {
    "train": (".recipes.train_command", "train with DemP, beside a dense baseline"),
    "compare": (".recipes.compare_command", "compare DemP with other structured pruning methods"),
    "coverage": (".bench.coverage_command", "which models can be compacted, and how exactly"),
    "bench": (".bench.command", "measure the kernels beside PyTorch and a copy"),
    "selfcheck": (".selfcheck.command", "how reliable it is here: kills, wrong calls, random networks, memory"),
}
"""Name -> (module, what it does). A module is imported when its command is called: its dependencies are optional."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line: `demp train: error: ...`, exit code 2. Flags are written out: where they may be
    shortened, `compare --seed 3` would be taken for `--seeds 3`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0; 2 for a request that cannot be met, or a file that cannot be read or
    written, in one line; 130 after Ctrl-C, 141 where the reader of the output went away."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    try:
        chosen, unknown = _parser(name).parse_known_args(arguments)
        if unknown:
            raise RecipeError(f"unrecognized arguments: {' '.join(unknown)}")
        if name in COMMANDS and name != "train" and (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise RecipeError(f"runs in one process (demp train in several), got WORLD_SIZE={processes}")
        code = chosen.run(chosen) or 0
        sys.stdout.flush()
        return code
    except RecipeError as error:
        print(f"demp {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader (head, less) has gone; what Python still holds must not fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        print(f"demp {name}: error: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2


def _parser(chosen: str) -> Parser:
    parser = Parser(prog="demp", description="PyTorch training that gets smaller and faster while it runs.")
    parser.add_argument("--version", action="version", version=f"demp_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True, parser_class=Parser)
    for name, (module, summary) in COMMANDS.items():
        if name == chosen:
            _command(name, module).add_parser(commands)
        else:
            commands.add_parser(name, help=summary)
    info = commands.add_parser("info", help="which kernels were built and are usable here, and why not")
    info.add_argument("--kernels", action="store_true", help="facts of the compiled CUDA kernels (needs cuobjdump)")
    info.set_defaults(run=_info)
    return parser


def _info(chosen: argparse.Namespace) -> None:
    if not chosen.kernels:
        print(build_info())
        return
    try:
        print(format_table(kernel_table()))
    except FileNotFoundError as missing:
        raise RecipeError(f"--kernels: {missing}") from missing


def _command(name: str, module: str) -> Any:
    try:
        return import_module(module, __package__)
    except ModuleNotFoundError as error:
        extra = {"bench": "bench", "selfcheck": "test"}.get(name, "train")
        raise RecipeError(f"needs {error.name}, which is not installed: pip install 'demp-kernels[{extra}]'") from error
