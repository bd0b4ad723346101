"""The results of `demp train`: a table in the terminal, summary.json, report.html."""
from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from . import plots
from .data import ImageData
from .flops import in_units
from .loop import RunResult
from .page import page
from .progress import duration
from .settings import TrainSettings

__all__ = ["headline_rows", "summary", "terminal_table", "write_report", "write_summary"]


def summary(
    runs: list[RunResult], settings: TrainSettings, data: ImageData, facts: dict[str, Any], *, interrupted: bool
) -> dict[str, Any]:
    """What summary.json holds.

    accuracy is a share of 1; train_seconds leave evaluation out and include DemP's preparation and removals;
    seconds_per_step_* are medians over the first and the last epoch (or tenth of the run, if that is shorter);
    speedup is dense train_seconds / demp train_seconds; decisions are those of --policy when_it_pays. A run that was not
    made is null.
    """
    by_name = {run.name: run for run in runs}
    dense, demp = by_name.get("dense"), by_name.get("demp")
    live, total = (sum(demp.live.values()), sum(demp.total.values())) if demp else (None, None)
    both = dense is not None and demp is not None and dense.finished and demp.finished
    return {
        "dense": _run_summary(dense),
        "demp": _run_summary(demp),
        "live_units": live,
        "total_units": total,
        "speedup": dense.train_seconds / demp.train_seconds if both else None,
        "layers": {name: {"live": demp.live[name], "total": demp.total[name]} for name in demp.total} if demp else {},
        "interrupted": interrupted,
        "data": {
            "name": data.name, "train_images": data.train.samples, "train_images_there": data.train_total,
            "test_images": data.test.samples, "classes": data.classes, "image_size": data.image_size,
            "channels": data.channels,
        },
        "settings": settings.as_json(),
        **facts,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _run_summary(run: RunResult | None) -> dict[str, Any] | None:
    if run is None:
        return None
    names = (
        "accuracy", "train_seconds", "seconds_per_step_first", "seconds_per_step_last", "params", "flops",
        "setup_seconds", "steps", "total_steps", "decisions",
    )
    return {name: getattr(run, name) for name in names}


def write_summary(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def headline_rows(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(column titles, rows) of the table that a person reads first: one column a run, the last one compares them."""
    runs = {name: content[name] for name in ("dense", "demp") if content[name]}
    units = {"dense": None, "demp": content["live_units"]}
    rows = [
        ["accuracy", *(_percent(run["accuracy"]) for run in runs.values())],
        ["units live / total", *(_units(units[name], content["total_units"]) for name in runs)],
        ["parameters", *(f"{run['params']:,}" for run in runs.values())],
        ["FLOPs a sample", *(in_units(run["flops"]) for run in runs.values())],
        ["a step at the start", *(_time(run["seconds_per_step_first"]) for run in runs.values())],
        ["a step at the end", *(_time(run["seconds_per_step_last"]) for run in runs.values())],
        ["training time", *(f"{run['train_seconds']:.1f} s" for run in runs.values())],
    ]
    titles = ["", *(plots.TITLES[name] for name in runs)]
    if len(runs) < 2:
        return titles, rows
    dense, demp = runs["dense"], runs["demp"]
    rows[0].append(_points(dense["accuracy"], demp["accuracy"]))
    rows[1].append(_less(content["total_units"], content["live_units"]))
    rows[2].append(_less(dense["params"], demp["params"]))
    rows[3].append(_less(dense["flops"], demp["flops"]))
    rows[4].append(_faster(dense["seconds_per_step_first"], demp["seconds_per_step_first"]))
    rows[5].append(_faster(dense["seconds_per_step_last"], demp["seconds_per_step_last"]))
    rows[6].append(_faster(dense["train_seconds"], demp["train_seconds"]) if content["speedup"] else "")
    return [*titles, "change"], rows


def terminal_table(content: dict[str, Any]) -> Table:
    """The headline table for a rich console."""
    titles, rows = headline_rows(content)
    table = Table(title_justify="left", box=box.SIMPLE_HEAD)
    for number, title in enumerate(titles):
        style = "bold" if title == plots.TITLES["demp"] else None
        table.add_column(title, justify="right" if number else "left", no_wrap=True, style=style)
    for row in rows:
        table.add_row(*row)
    return table


def write_report(path: Path, runs: list[RunResult], content: dict[str, Any], files: list[str]) -> None:
    """report.html: one page that needs nothing but itself; `files` beside it are linked."""
    titles, rows = headline_rows(content)
    demp = next((run for run in runs if run.total), None)
    figures = [
        ("Accuracy against time", plots.accuracy_against_time(runs)),
        ("Time of a step", plots.step_time(runs)),
        ("Loss", plots.task_loss(runs)),
    ]
    wide = []
    if demp is not None and demp.rows:
        figures.append(("Live units, and the penalty behind them", plots.units_and_penalty(demp)))
        wide.append(("Live units of every layer", plots.layers_over_time(demp)))
    settings, data = content["settings"], content["data"]
    path.write_text(page(
        title=f"{settings['model']} on {data['name']}",
        subtitle=_subtitle(content),
        notice="Stopped before the end: what was known then." if content["interrupted"] else "",
        cards=_cards(content),
        titles=titles,
        rows=rows,
        emphasis="demp",
        figures=figures,
        wide=wide,
        facts={**settings, **content["machine"], **content["versions"]},
        files=files,
    ))


def _cards(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The few numbers that a reader takes away: (number, what it is)."""
    cards = []
    dense, demp = content["dense"], content["demp"]
    if content["speedup"]:
        cards.append((f"{content['speedup']:.2f}x", "training speed, whole run"))
    if demp:
        if dense and demp["seconds_per_step_last"] and dense["seconds_per_step_last"]:
            ratio = dense["seconds_per_step_last"] / demp["seconds_per_step_last"]
            cards.append((f"{ratio:.2f}x", "speed of the last steps"))
        cards.append((f"{1 - content['live_units'] / content['total_units']:.0%}", "of the units removed"))
        if dense and demp["accuracy"] is not None and dense["accuracy"] is not None:
            cards.append((_points(dense["accuracy"], demp["accuracy"]).split()[0], "points of accuracy against dense"))
        elif demp["accuracy"] is not None:
            cards.append((_percent(demp["accuracy"]), "test accuracy"))
    return cards


def _subtitle(content: dict[str, Any]) -> str:
    settings, data, machine = content["settings"], content["data"], content["machine"]
    width = f"width {settings['width']}, " if settings["width"] else ""
    processes = f"{machine['processes']} processes of " if machine["processes"] > 1 else ""
    return (
        f"{width}{data['train_images']:,} training and {data['test_images']:,} test images, "
        f"{settings['epochs']} epochs, batch {settings['batch_size']}, seed {settings['seed']}. "
        f"{machine.get('gpu') or machine['processor']}, {processes}{machine['threads']} threads, "
        f"torch {content['versions']['torch']}. {content['date'][:10]}."
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _points(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{100 * (after - before):+.2f} points"


def _units(live: int | None, total: int | None) -> str:
    if total is None:
        return ""
    return f"{total if live is None else live:,} / {total:,}"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _less(before: int, after: int) -> str:
    return "0%" if before == after else f"{after / before - 1:+.0%}"


def _faster(before: float | None, after: float | None) -> str:
    if not before or not after:
        return ""
    return f"{before / after:.2f}x faster" if before >= after else f"{after / before:.2f}x slower"
