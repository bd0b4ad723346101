"""Figures of `demp compare`, as SVG text."""
from __future__ import annotations

from typing import Any

from .compare import DEMP, Run
from .plots import COLOURS, TITLES, drawing

__all__ = ["accuracy_against", "live_units"]


DODGE = 0.5
"""Points of sparsity that methods are drawn apart, since most have the same; the axis says so."""


def accuracy_against(rows: list[dict[str, Any]], runs: list[Run], what: str, label: str) -> str:
    """Test accuracy of each method against `what`, a column of the table: mean over the seeds, with bars of one standard
    deviation; methods with several levels as a line, every single run as a faint point."""
    with drawing(5.6, 5.0) as (figure, svg):
        axes = figure.subplots()
        methods = list(dict.fromkeys(row["method"] for row in rows))
        apart = what == "sparsity" and len(methods) > 2
        for number, method in enumerate(methods):
            aside = DODGE * (number - (len(methods) - 1) / 2) if apart and method != "dense" else 0.0
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: row[what])
            axes.errorbar(
                [_shown(row[what], what) + aside for row in own], [100 * row["accuracy"] for row in own],
                yerr=[100 * row["accuracy_std"] for row in own], color=COLOURS[method], label=TITLES[method], marker="o",
                markersize=6 if method in DEMP else 4.5, elinewidth=1.2, capsize=2, zorder=3 if method in DEMP else 2,
            )
            single = [run for run in runs if run.method == method]
            axes.scatter(
                [_shown(getattr(run, what), what) + aside for run in single], [100 * run.accuracy for run in single], s=14,
                color=COLOURS[method], alpha=0.5, linewidths=0,
            )
        axes.set_xlabel(f"{label} (methods drawn {DODGE:g} apart)" if apart else label)
        axes.set_ylabel("test accuracy, %")
        figure.legend(loc="outside lower center", fontsize=9, ncols=2)
    return svg()


def live_units(runs: list[Run]) -> str:
    """Live units of one run of each method against the step."""
    with drawing(5.6, 3.8) as (figure, svg):
        axes = figure.subplots()
        for run in runs:
            if run.result.total:
                steps = [step for step, _ in run.result.units] + [run.result.steps]
                live = [sum(units.values()) for _, units in run.result.units]
                axes.step(steps, [*live, live[-1]], where="post", color=COLOURS[run.method], label=TITLES[run.method])
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel("live units")
        axes.legend(fontsize=9, ncols=2)
    return svg()


def _shown(value: float, what: str) -> float:
    return 100 * value if what == "sparsity" else value
