"""`demp train`: the dense baseline and the DemP run, their table, their files."""
from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data import ImageData
from .errors import RecipeError, need
from .logs import CsvLog, TensorBoardLog, write_units
from .loop import RunResult, Stopped, Training, read_data, warm_up
from .machine import machine_facts, prepare_machine, versions
from .methods import Demon, Dense, Method
from .ranks import Ranks, current_ranks
from .resume import begin_run, begun_settings, check_same_run
from .settings import TrainSettings

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CHECKPOINTS", "train"]

CHECKPOINTS = {"dense": "checkpoint-dense.pt", "demp": "checkpoint.pt"}


def train(settings: TrainSettings, *, resume: bool = False) -> dict[str, Any]:
    """Train as `settings` say and write metrics.csv, units.csv, summary.json, report.html and checkpoints into `out`.

    resume: go on with the run that `out` holds, killed at whatever moment, from its checkpoints: with the same number of
        threads its weights end bit for bit as if it had never been stopped. Without one there, begin.

    Returns what summary.json holds. After Ctrl-C, or where a loss is not finite, the same files say what was known, `interrupted`
    is true, and KeyboardInterrupt or RecipeError goes on. Of several ranks (see `ranks.joined`) the first prints and writes; `out`
    must be a folder that all of them see; a loss that is not finite ends them all with nothing written. Raises RecipeError, in one
    line, for what cannot be trained, or resumed with other settings.
    """
    # found missing now rather than when hours of training are to be written down
    for module in ("rich", "matplotlib"):
        need(module, "demp train")
    from rich.console import Console

    from . import report
    from .progress import ProgressDisplay

    settings, ranks = settings.resolved(), current_ranks()
    begun = begun_settings(settings.out) if resume else None
    if begun is not None:
        check_same_run(settings, begun)
    prepare_machine(torch.device(settings.device), settings.threads)
    torch.manual_seed(settings.seed)
    data = read_data(settings)
    warm_up(settings, data)
    out = _folder(settings.out)
    console = Console(quiet=not ranks.first)
    console.print(_headline(settings, data, ranks), highlight=False, soft_wrap=True)
    checkpoints = {name: out / file for name, file in CHECKPOINTS.items()}
    with ranks.first_goes_first():
        if begun is None and ranks.first:
            begin_run(settings, list(checkpoints.values()), resume)

    logs = _logs(settings, out) if ranks.first else []
    facts = {"machine": machine_facts(torch.device(settings.device)), "versions": versions()}
    methods: list[Method] = [Dense(), Demon()] if settings.baseline else [Demon()]
    runs: list[RunResult] = []
    ended: KeyboardInterrupt | RecipeError | None = None
    try:
        with ProgressDisplay(console) as progress:
            setup_seconds = 0.0
            if settings.baseline and not checkpoints["demp"].is_file():
                # what it refuses is known before hours of the dense run
                setup_seconds = Training(settings, Demon(), read_data(settings), []).result.setup_seconds
                gc.collect()
            for method in methods:
                training = Training(settings, method, read_data(settings), [*logs, progress])
                if method.name == "demp":  # a process pays its imports the first time
                    training.result.setup_seconds = max(training.result.setup_seconds, setup_seconds)
                if checkpoints[method.name].is_file():
                    _note_other(console, ranks, *training.load(checkpoints[method.name]))
                runs.append(training.result)
                try:
                    training.run(checkpoints[method.name])
                except RecipeError as error:
                    # this rank alone may know; and where a checkpoint could not be written, files of an earlier stop stay whole
                    if ranks.count > 1 or isinstance(error.__cause__, OSError):
                        raise
                    ended = error
                    break
                del training
                gc.collect()  # a finished training is a cycle: its memory and its data's workers are not for the next one
    except KeyboardInterrupt as error:
        if ranks.count > 1 and not isinstance(error, Stopped):
            raise  # this rank alone knows
        ended = error
    finally:
        for each in logs:
            each.close()

    runs = [run for run in runs if run.rows]
    if ended is not None and not runs:
        raise ended
    stopped = isinstance(ended, KeyboardInterrupt)
    content = report.summary(runs, settings, data, facts, interrupted=ended is not None)
    if ranks.first:
        files = _write(out, runs, content)
        console.print(report.terminal_table(content))
        console.print(f"{'stopped; ' if stopped else ''}written to {out}: report.html, {', '.join(files)}", soft_wrap=True)
        if stopped:
            console.print(f"demp train --resume --out {settings.out} goes on with it", highlight=False, soft_wrap=True)
    ranks.any(False)  # torchrun ends all ranks when the first one has ended with an error, a stop included
    if ended is not None:
        raise ended
    return content


def _logs(settings: TrainSettings, out: Path) -> list[CsvLog | TensorBoardLog]:
    log = CsvLog(out / "metrics.csv")
    return [log, TensorBoardLog(out / "tensorboard")] if settings.tensorboard else [log]


def _write(out: Path, runs: list[RunResult], content: dict[str, Any]) -> list[str]:
    """Write what is known at the end. Returns the names of the files, those written on the way included."""
    from . import report

    files = ["metrics.csv", "summary.json"]
    for run in runs:
        if run.total:
            write_units(out / "units.csv", run)
            files.insert(1, "units.csv")
        files.append(CHECKPOINTS[run.name])
    report.write_summary(out / "summary.json", content)
    report.write_report(out / "report.html", runs, content, files)
    return files


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"out cannot be made: {out}: {error.strerror}") from error
    return out


def _note_other(console: Console, ranks: Ranks, threads: int, processes: int) -> None:
    before, now = _computing(threads, processes), _computing(torch.get_num_threads(), ranks.count)
    if before != now:
        console.print(f"note: made with {before}, goes on with {now}: sums round differently", highlight=False)


def _computing(threads: int, processes: int) -> str:
    return f"{processes} processes of {threads} threads" if processes > 1 else f"{threads} threads"


def _headline(settings: TrainSettings, data: ImageData, ranks: Ranks) -> str:
    width = f" of width {settings.width}" if settings.width else ""
    some = f" of {data.train_total:,}" if data.train.samples < data.train_total else ""
    return (
        f"{settings.model}{width} on {data.name}: {data.train.samples:,}{some} training and {data.test.samples:,} test "
        f"images, {settings.epochs} epochs of {len(data.train)} steps, {settings.device}, "
        f"{_computing(torch.get_num_threads(), ranks.count)}"
    )
