"""The results of `demp compare`: a table in the terminal, table.csv, table.md, runs.csv, figures, comparison.html."""
from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .compare import COLUMNS, DEMP, Run, table_rows
from .comparison_plots import accuracy_against, live_units
from .flops import in_units
from .page import page
from .plots import TITLES, layers_over_time
from .settings import TrainSettings

__all__ = ["terminal_table", "write"]

RUN_COLUMNS = (
    "method", "level", "seed", "accuracy", "sparsity", "neuron_sparsity", "train_flops", "train_seconds", "inference_ms",
    "machine",
)
HEAD = [
    "method", "level", "runs", "accuracy, %", "params gone", "units gone", "training FLOPs", "seconds", "speed-up",
    "inference ms",
]
FIGURES = ("accuracy_against_sparsity.svg", "accuracy_against_seconds.svg", "live_units.svg")
SHORT = (0, 1, 3, 4, 7, 8)
"""Numbers of the columns that the terminal shows."""


def write(out: Path, settings: TrainSettings, runs: list[Run], facts: dict[str, Any]) -> None:
    """All files of the comparison into `out`, as far as it has come."""
    rows = table_rows(runs)
    _write_csv(out / "table.csv", COLUMNS, rows)
    _write_csv(out / "runs.csv", RUN_COLUMNS, [{name: getattr(run, name) for name in RUN_COLUMNS} for run in runs])
    first = _first_of_each(runs)
    (out / "table.md").write_text(_markdown(settings, runs))
    figures = [
        ("Accuracy against parameter sparsity", accuracy_against(rows, runs, "sparsity", "parameters gone, %")),
        ("Accuracy against training time", accuracy_against(rows, runs, "train_seconds", "training seconds")),
    ]
    if any(run.result.total for run in first):
        figures.append((f"Live units, seed {runs[0].seed}", live_units(first)))
    for name, (_, svg) in zip(FIGURES, figures):
        (out / name).write_text(svg)
    wide = [
        (f"Live units of every layer: {TITLES[run.method]}, {run.level}, seed {run.seed}", layers_over_time(run.result))
        for run in first if run.method in DEMP
    ]
    (out / "comparison.html").write_text(page(
        title=f"{settings.model} on {settings.data}: pruning methods compared",
        subtitle=_subtitle(settings, runs),
        notice="",
        cards=_cards(rows),
        titles=HEAD,
        rows=[_texts(row) for row in rows],
        emphasis="comparison",
        figures=figures,
        wide=wide,
        facts={**{k: v for k, v in settings.as_json().items() if k not in ("seed", "out", "peak_penalty")}, **facts},
        files=["table.csv", "table.md", "runs.csv", *FIGURES[:len(figures)], *(f"runs/{run.file}" for run in runs)],
    ))


def _subtitle(settings: TrainSettings, runs: list[Run]) -> str:
    machines = "; ".join(dict.fromkeys(run.machine or "An unknown machine" for run in runs))
    return f"{settings.epochs} epochs, batch {settings.batch_size}, means over seeds with one standard deviation. {machines}."


def _markdown(settings: TrainSettings, runs: list[Run]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "| --- | --- |" + " --: |" * (len(HEAD) - 2)]
    lines += ["| " + " | ".join(_texts(row)) + " |" for row in table_rows(runs)]
    return f"# {settings.model} on {settings.data}: pruning methods compared\n\n{_subtitle(settings, runs)}\n\n" + "\n".join(lines) + "\n"


def terminal_table(runs: list[Run]) -> Table:
    """The columns that fit into 80 characters."""
    table = Table(box=box.SIMPLE_HEAD)
    for number in SHORT:
        table.add_column(HEAD[number], justify="left" if number < 2 else "right", no_wrap=True)
    for row in table_rows(runs):
        texts = _texts(row, narrow=True)
        table.add_row(*(texts[number] for number in SHORT), style="bold" if row["method"] in DEMP else None)
    return table


def _first_of_each(runs: list[Run]) -> list[Run]:
    """Of each method the first run: same seed, and the first of several levels."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(run.method, run)
    return list(found.values())


def _cards(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What a reader takes away of DemP's most accurate level."""
    demp = max((row for row in rows if row["method"] in DEMP), key=lambda row: row["accuracy"], default=None)
    dense = next((row for row in rows if row["method"] == "dense"), None)
    if demp is None:
        return []
    cards = [(f"{demp['sparsity']:.0%}", f"of the parameters removed by DemP, {demp['level']}")]
    if dense is not None:
        if demp["speedup"] is not None:
            cards.insert(0, (f"{demp['speedup']:.2f}x", "training speed against dense"))
        cards.append((f"{100 * (demp['accuracy'] - dense['accuracy']):+.2f}", "points of accuracy against dense"))
    return cards


def _texts(row: dict[str, Any], narrow: bool = False) -> list[str]:
    spread = f" ± {100 * row['accuracy_std']:.2f}" if row["runs"] > 1 else ""
    seconds_spread = f" ± {row['train_seconds_std']:.1f}" if row["runs"] > 1 and not narrow else ""
    return [
        TITLES[row["method"]], row["level"], str(row["runs"]), f"{100 * row['accuracy']:.2f}{spread}",
        f"{row['sparsity']:.1%}", "" if row["neuron_sparsity"] is None else f"{row['neuron_sparsity']:.1%}", in_units(row["train_flops"]),
        f"{row['train_seconds']:.1f}{seconds_spread}", f"{row['speedup']:.2f}x" if row["speedup"] else "", f"{row['inference_ms']:.3g}",
    ]


def _write_csv(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
