"""Figures made from rows: every op against a copy, the same over sizes and threads, the training step, compaction.

Each function draws into a file (SVG, or what the name ends with) and says whether it had rows to draw.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..recipes.errors import need
from ..recipes.plots import STYLE
from .peers import PEERS
from .rows import Group, Row, groups, latest
from .sheets import COMPACTION_NAMES, STEP_NAMES

__all__ = ["FIGURES", "draw_all"]

COLOURS = {
    "copy": "#1f2933", "copy_into": "#7b8494", "plain": "#8fa8c8", "eager": "#d9a441", "compile": "#b56a8f",
    "demp": "#0f7b6c", "demp_unfused": "#6bb5a8",
}
NAMES = {
    "copy": "copy, allocated", "copy_into": "copy, preallocated", "plain": "PyTorch, no count", "eager": "eager",
    "compile": "torch.compile", "demp": "this package", "demp_unfused": "this package, two ops",
}
BAR_VARIANTS = ("plain", "eager", "compile", "demp_unfused", "demp")
SIZE_PANELS = (("forward", False), ("backward", False), ("forward", True), ("backward", True))


def against_copy(rows: Sequence[Row], path: Path) -> bool:
    """For every case beyond the last cache: the share of a copy's bandwidth that each alternative reaches, so 100% is the
    roof for what only moves memory."""
    most = max(row.threads for row in rows)
    cases = [g for g in groups(r for r in rows if r.threads == most) if {"copy", "demp"} <= g.rows.keys() and _large(g)]
    if not cases:
        return False
    with _figure(path, 11, 1.2 + 0.62 * len(cases)) as figure:
        axes = figure.subplots()
        for row, group in enumerate(cases):
            present = [name for name in BAR_VARIANTS if name in group.rows]
            height = 0.84 / len(present)
            for place, name in enumerate(present):
                share = group.rows[name].gb_per_s / group.rows["copy"].gb_per_s
                y = row + (place - (len(present) - 1) / 2) * height
                axes.barh(y, 100 * share, height, color=COLOURS[name])
                text = f"{group.rows[name].gb_per_s:.1f} GB/s" if name == "demp" else ""
                axes.annotate(
                    text, (100 * share, y), (4, 0), textcoords="offset points", va="center", fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
                )
        axes.axvline(100, color=COLOURS["copy"], linewidth=1.4, zorder=1)
        axes.annotate("allocated copy", (100, -0.75), ha="center", va="bottom", fontsize=9, annotation_clip=False)
        axes.set_yticks(range(len(cases)), [_label(group) for group in cases], fontsize=9)
        axes.set_ylim(len(cases) - 0.4, -0.75)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("share of the copy's bandwidth, %")
        _legend(figure, [name for name in BAR_VARIANTS if any(name in g.rows for g in cases)])
    return True


def over_sizes(rows: Sequence[Row], path: Path) -> bool:
    """GB/s of relu with counts against the size of x, NCHW float32."""
    most = max(row.threads for row in rows)

    def cases(direction: str, noise: bool) -> list[Group]:
        found = [
            g for g in groups(r for r in rows if r.threads == most)
            if (g.case.op, g.case.function, g.case.layout, g.case.dtype) == ("activation", "relu", "nchw", "float32")
            and (g.case.direction, g.case.noise) == (direction, noise) and g.case.shape.split("x")[1:2] == ["64"]
        ]
        return sorted(found, key=_bytes)

    panels = [(direction, noise, cases(direction, noise)) for direction, noise in SIZE_PANELS]
    panels = [panel for panel in panels if len(panel[2]) > 1]
    if not panels:
        return False
    with _figure(path, 11, 3.9 * ((len(panels) + 1) // 2)) as figure:
        grid = figure.subplots((len(panels) + 1) // 2, min(len(panels), 2), squeeze=False).ravel()
        for axes, (direction, noise, found) in zip(grid, panels):
            for name in COLOURS:
                points = [(_bytes(g), g.rows[name].gb_per_s) for g in found if name in g.rows]
                if points:
                    axes.plot(*zip(*points), color=COLOURS[name], marker="o", markersize=3.5, linewidth=1.8)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.axvline(found[0].case.cache_bytes, color="#aab2bd", linestyle=":", linewidth=1.4)
            axes.set_title(f"relu + count{' + noise' if noise else ''}, {direction}", fontsize=11, loc="left")
            axes.xaxis.set_major_formatter(lambda value, _: _size(value))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlabel("bytes of x (dotted: last-level cache)")
            axes.set_ylabel("GB/s")
        for axes in grid[len(panels):]:
            axes.set_visible(False)
        shown = [name for name in COLOURS if any(name in g.rows for _, _, found in panels for g in found)]
        _legend(figure, shown)
    return True


def over_threads(rows: Sequence[Row], path: Path) -> bool:
    """Speedup over one thread of the float32 cases beyond the last cache that one run measured with several thread counts."""
    by_case: dict[tuple[str, str], list[Group]] = {}
    for group in groups(rows):
        if {"demp", "copy"} <= group.rows.keys() and group.case.dtype == "float32" and _large(group):
            by_case.setdefault((_label(group), group.case.date), []).append(group)
    several = [sorted(found, key=lambda g: g.case.threads) for found in by_case.values() if len(found) > 1]
    cases = [found for found in several if found[0].case.threads == 1]
    if not cases:
        return False
    with _figure(path, 11, 3.6 * ((len(cases) + 2) // 3)) as figure:
        grid = figure.subplots((len(cases) + 2) // 3, min(len(cases), 3), squeeze=False).ravel()
        for axes, found in zip(grid, cases):
            counts = [g.case.threads for g in found]
            axes.plot(counts, counts, color="#d9dee5", linewidth=1.4, linestyle="--")
            for name in COLOURS:
                if all(name in g.rows for g in found):
                    axes.plot(counts, [found[0].rows[name].median_ms / g.rows[name].median_ms for g in found], color=COLOURS[name], marker="o", markersize=4)
            axes.set_title(_label(found[0]), fontsize=9, loc="left")
            axes.set_xticks(counts)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("threads (dashed: ideal)")
            axes.set_ylabel("speedup over one thread")
        for axes in grid[len(cases):]:
            axes.set_visible(False)
        drawn = [name for name in COLOURS if any(all(name in g.rows for g in found) for found in cases)]
        _legend(figure, drawn)
    return True


def training_step(rows: Sequence[Row], path: Path) -> bool:
    """Milliseconds of a training step, and what of it is DemP's own work."""
    cases = [group for group in groups(rows) if group.case.op == "step"]
    if not cases:
        return False
    with _figure(path, 11, 0.8 + 2.6 * len(cases)) as figure:
        for axes, group in zip(figure.subplots(len(cases), 1, squeeze=False).ravel(), cases):
            names = [name for name in STEP_NAMES if name in group.rows]
            times = [group.rows[name].median_ms for name in names]
            low = [time - group.rows[name].p20_ms for name, time in zip(names, times)]
            high = [group.rows[name].p80_ms - time for name, time in zip(names, times)]
            colours = [COLOURS["demp" if name.startswith("demp") else "plain"] for name in names]
            axes.barh(range(len(names)), times, 0.7, color=colours, xerr=[low, high], ecolor="#52606d")
            own = group.time("own_work")
            for y, (name, time) in enumerate(zip(names, times)):
                text = f"{time:.0f} ms" + (f", {100 * own / time:.1f}% of it DemP's own work" if own and name == "demp_tuned" else "")
                axes.annotate(text, (group.rows[name].p80_ms, y), (6, 0), textcoords="offset points", va="center", fontsize=9)
                if own and name == "demp_tuned":
                    axes.barh(y, own, 0.7, color="#c8553d")
            axes.set_yticks(range(len(names)), [STEP_NAMES[name] for name in names], fontsize=9)
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.margins(x=0.3)
            axes.set_title(f"{group.case.function}, {group.case.shape}", fontsize=11, loc="left")
            axes.set_xlabel("milliseconds a step (red: penalty, counts, noise, decisions)")
    return True


def compaction(rows: Sequence[Row], path: Path) -> bool:
    """Time of removing half of the units, in multiples of a warm copy of what is kept."""
    cases = [group for group in groups(rows) if group.case.op == "compaction" and group.time("copy_into")]
    if not cases:
        return False
    with _figure(path, 11, 1.2 + 0.55 * len(cases)) as figure:
        axes = figure.subplots()
        for y, group in enumerate(cases):
            plan, commit = group.ratio("plan", "copy_into") or 0.0, group.ratio("commit", "copy_into") or 0.0
            axes.barh(y, plan, 0.6, color=COLOURS["demp_unfused"], label=COMPACTION_NAMES["plan"] if y == 0 else None)
            axes.barh(y, commit, 0.6, left=plan, color=COLOURS["demp"], label=COMPACTION_NAMES["commit"] if y == 0 else None)
            text = f"copy {group.time('copy_into'):.1f} ms"
            for peer in PEERS:
                if ratio := group.ratio(peer, "copy_into"):
                    text += f", {COMPACTION_NAMES[peer]} {ratio:.0f}x"
            axes.annotate(text, (plan + commit, y), (6, 0), textcoords="offset points", va="center", fontsize=9)
        axes.axvline(1, color=COLOURS["copy"], linewidth=1.4)
        axes.set_yticks(range(len(cases)), [group.case.function for group in cases])
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("times a warm copy of what is kept (line: 1)")
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return True


FIGURES: dict[str, Callable[[Sequence[Row], Path], bool]] = {
    "against_copy": against_copy, "over_sizes": over_sizes, "over_threads": over_threads, "step": training_step,
    "compaction": compaction,
}


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every figure that the newest rows of each case have something for. Returns the files."""
    rows = latest(rows)
    tuned = [row for row in rows if row.allocator != "default"] or rows
    drawn = []
    for name, draw in FIGURES.items():
        path = folder / f"{name}.svg"
        if tuned and draw(tuned, path):
            drawn.append(path)
    return drawn


# --- pieces ----------------------------------------------------------------------------------------------------------


def _large(group: Group) -> bool:
    return group.case.op in ("weight_noise", "compact", "channel_select") or _bytes(group) > group.case.cache_bytes


def _bytes(group: Group) -> int:
    return group.rows["copy"].bytes // 2


def _label(group: Group) -> str:
    case = group.case
    what = case.op if case.op in ("weight_noise", "compact", "channel_select") else ""
    noise = " + noise" if case.noise else ""
    direction = {"both": "fwd + bwd", "in_place": "in place"}.get(case.direction, case.direction)
    return " ".join(filter(None, [what, case.function + noise, direction, case.layout, case.dtype.replace("float", "f")])) + f"\n{case.shape}"


def _size(value: float) -> str:
    for unit, name in ((2**30, "G"), (2**20, "M"), (2**10, "K")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _legend(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[name], label=NAMES[name]) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(names), 7), frameon=False, fontsize=9)


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of that many inches, written to `path`; the same rows give the same file."""
    matplotlib = need("matplotlib", "the figures")
    need("matplotlib.figure", "the figures")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "demp_kernels", "svg.fonttype": "none"}):
        figure = matplotlib.figure.Figure(figsize=(width, height))
        yield figure
        figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
