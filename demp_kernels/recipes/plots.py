"""Figures of the report, as SVG text. matplotlib is imported when one is drawn."""
from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import need
from .loop import RunResult

__all__ = [
    "COLOURS", "TITLES", "accuracy_against_time", "drawing", "layers_over_time", "step_time", "task_loss", "units_and_penalty",
]

TITLES = {
    "dense": "dense", "demp": "DemP", "demp-fast": "DemP, budget", "snap": "SNAP", "cropit": "CroP-it", "early-snap": "EarlySNAP",
    "early-crop": "EarlyCroP", "l1": "L1 norm", "random": "random",
    "tp-magnitude": "Torch-Pruning, magnitude", "tp-group-lasso": "Torch-Pruning, group lasso",
}
COLOURS = {
    "dense": "#7b8494", "demp": "#0f7b6c", "demp-fast": "#5bb39f", "snap": "#c8553d", "cropit": "#3f6fb5", "early-snap": "#e0a43a",
    "early-crop": "#8d5fb0", "l1": "#b23a6f", "random": "#b8a07e", "tp-magnitude": "#4a9db5", "tp-group-lasso": "#5b7553",
}
ACCENT = "#c8553d"
INK, FAINT = "#1f2933", "#d9dee5"

STYLE = {
    "font.family": "sans-serif", "font.size": 11, "svg.fonttype": "none", "text.color": INK,
    "axes.edgecolor": "#aab2bd", "axes.labelcolor": "#52606d", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#eceff3", "xtick.color": "#52606d",
    "ytick.color": "#52606d", "lines.linewidth": 2, "legend.frameon": False, "figure.constrained_layout.use": True,
}


def accuracy_against_time(runs: list[RunResult]) -> str:
    """Test accuracy (percent) of each run against its own training seconds."""
    with drawing(5.6, 3.4) as (figure, svg):
        axes = figure.subplots()
        for run in runs:
            rows = [row for row in run.rows if row["accuracy"] is not None]
            seconds = [row["seconds"] for row in rows]
            accuracy = [100 * row["accuracy"] for row in rows]
            axes.plot(seconds, accuracy, marker="o", markersize=3.5, **_line(run))
        best = [100 * row["accuracy"] for run in runs for row in run.rows if row["accuracy"] is not None]
        if best and max(best) > 60:
            # the first epochs would squeeze the part that matters
            axes.set_ylim(bottom=max(min(best), max(best) - 40), top=min(100.5, max(best) + 3))
        axes.set_xlim(left=0)
        axes.set_xlabel("training seconds (evaluation not counted)")
        axes.set_ylabel("test accuracy, %")
        axes.legend(loc="lower right")
    return svg()


def step_time(runs: list[RunResult]) -> str:
    """Milliseconds a step of each run against the step."""
    with drawing(5.6, 3.4) as (figure, svg):
        axes = figure.subplots()
        for run in runs:
            steps = [row["step"] for row in run.rows]
            milliseconds = [1e3 * row["seconds_per_step"] for row in run.rows]
            axes.plot(steps, milliseconds, **_line(run))
        times = sorted(1e3 * row["seconds_per_step"] for run in runs for row in run.rows)
        if times:
            # one step on a busy machine must not flatten the rest
            axes.set_ylim(0, 1.25 * times[int(0.97 * (len(times) - 1))])
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel("milliseconds a step")
        axes.legend(loc="lower left")
    return svg()


def task_loss(runs: list[RunResult]) -> str:
    """Training loss of each run, without the penalty, against the step."""
    with drawing(5.6, 3.4) as (figure, svg):
        axes = figure.subplots()
        for run in runs:
            axes.plot([row["step"] for row in run.rows], [row["loss"] for row in run.rows], **_line(run))
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, penalty left out")
        axes.legend(loc="lower left")
    return svg()


def units_and_penalty(run: RunResult) -> str:
    """All live units against the step, with the penalty's weight behind them."""
    with drawing(5.6, 3.4) as (figure, svg):
        axes = figure.subplots()
        back = axes.twinx()
        steps = [row["step"] for row in run.rows]
        weight = [row["penalty_weight"] for row in run.rows]
        back.fill_between(steps, weight, color=ACCENT, alpha=0.13, linewidth=0)
        back.set_ylim(bottom=0)
        back.set_axis_off()
        if weight:
            top = max(weight)
            back.annotate(
                f"penalty weight, up to {top:.3g}", (steps[weight.index(top)], 0), (8, 8), textcoords="offset points",
                color=ACCENT, fontsize=10,
            )
        times, live = _steps_of(run, lambda units: sum(units.values()))
        axes.step(times, live, where="post", color=COLOURS["demp"])
        axes.set_zorder(back.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.set_ylim(0, 1.05 * sum(run.total.values()))
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel("live units")
    return svg()


def layers_over_time(run: RunResult) -> str:
    """Share of live units of every layer: over time as colour, at the end as a number."""
    layers = list(run.total)
    with drawing(11.6, 0.9 + 0.27 * len(layers)) as (figure, svg):
        axes = figure.subplots()
        edges, _ = _steps_of(run, len)
        shares = [[live[layer] / run.total[layer] for _, live in run.units] for layer in layers]
        mesh = axes.pcolormesh(edges, range(len(layers) + 1), shares, cmap="YlGnBu", vmin=0, vmax=1)
        axes.invert_yaxis()
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_yticks([row + 0.5 for row in range(len(layers))], layers, fontsize=9)
        axes.set_xlabel("step")
        for row, layer in enumerate(layers):
            text = f"{run.live[layer]} of {run.total[layer]}"
            axes.annotate(
                text, (1, row + 0.5), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", fontsize=9,
            )
        bar = figure.colorbar(mesh, ax=axes, pad=0.09, fraction=0.025, format=lambda share, _: f"{share:.0%}")
        bar.outline.set_visible(False)
        bar.set_label("live units")
    return svg()


def _steps_of(run: RunResult, value: Callable[[dict[str, int]], Any]) -> tuple[list[int], list[Any]]:
    """Step function of `run.units`: where each value begins, and last of all where the run is now."""
    steps = [step for step, _ in run.units]
    values = [value(live) for _, live in run.units]
    # the removal after the last step leaves no time to draw it in: give it a sliver
    return [*steps, max(run.steps, steps[-1] + max(run.total_steps // 100, 1))], [*values, values[-1]]


def _line(run: RunResult) -> dict[str, Any]:
    return {"color": COLOURS.get(run.name, ACCENT), "label": TITLES.get(run.name, run.name)}


@contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A figure of that many inches and a function that gives its SVG once it is drawn."""
    matplotlib = need("matplotlib", "the report")
    need("matplotlib.figure", "the report")
    drawn = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(width, height))
        yield figure, drawn.getvalue
        figure.savefig(drawn, format="svg", transparent=True)
