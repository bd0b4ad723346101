"""Goals, tables, the table for a README, figures."""
from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from demp_kernels.bench import plots
from demp_kernels.bench.goals import GOALS, judge
from demp_kernels.bench.report import BEGIN, END, all_sheets, readme_table, rich_table, update_readme, write_tables
from demp_kernels.bench.rows import Row, read_rows
from demp_kernels.bench.sheets import headline, losses, reasons
from demp_kernels.recipes.errors import RecipeError


def verdict(rows: list[Row], words: str):
    (found,) = [verdict for verdict in judge(rows) if words in verdict.goal.text]
    return found


@pytest.fixture
def everything(make_rows) -> list[Row]:
    """Rows of every kind."""
    step = {"op": "step", "function": "resnet18-w16", "direction": "step", "shape": "128x1x28x28", "bytes": 0}
    halves = {"op": "compaction", "function": "resnet18", "direction": "half", "shape": "11689512"}
    norm = {"op": "norm_act", "function": "bn+relu", "direction": "both"}
    small = {"shape": "16x64x16x16", "bytes": 2**21}
    return [
        *make_rows(copy=2.0, copy_into=1.9, plain=2.0, eager=10.0, compile=4.0, demp=2.1),
        *make_rows(copy=3.9, copy_into=1.9, plain=2.0, eager=10.0, demp=4.0, threads=1),
        *make_rows(copy=0.1, copy_into=0.1, plain=0.1, eager=0.5, compile=0.2, demp=0.3, **small),
        *make_rows(noise=True, copy=2.0, copy_into=1.9, plain=2.0, eager=50.0, compile=190.0, demp=5.0),
        *make_rows(direction="backward", copy=2.0, plain=3.0, eager=3.1, demp=3.0, factor=1.5),
        *make_rows(copy=2.0, copy_into=2.0, plain=30.0, eager=40.0, compile=50.0, demp_unfused=20.0, demp=10.0, factor=4, **norm),
        *make_rows(op="weight_noise", copy=2.0, copy_into=2.0, eager=30.0, demp=5.0),
        *make_rows(
            plain_nchw=260.0, plain_channels_last=200.0, demp_unfused=190.0, demp=160.0, demp_tuned=150.0,
            plain_fused_optimizer_tuned=180.0, own_work=4.5, own_penalty=1.0, own_counts=1.0, own_noise=2.0, own_decision=0.5, **step,
        ),
        *make_rows(copy_into=10.0, plan=2.0, commit=15.0, demp=17.0, torch_pruning=170.0, **halves),
    ]


# --- goals -----------------------------------------------------------------------------------------------------------


def test_goals_are_judged_by_their_worst_case(everything) -> None:
    forward = verdict(everything, "forward: time of an allocated copy of the same bytes")
    assert (forward.cases, forward.reached, forward.word) == (3, 2, "not met")
    assert forward.worst == pytest.approx(3.0)
    assert forward.median == pytest.approx(1.05)
    assert "16x64x16x16" in forward.where
    assert verdict(everything, "beyond the last cache").worst == pytest.approx(2.5)
    assert verdict(everything, "count, backward: time of a copy, per byte").word == "met"
    assert verdict(everything, "speedup over eager BatchNorm2d").worst == pytest.approx(3.0)
    assert verdict(everything, "time of a copy of x").worst == pytest.approx(5.0)
    assert verdict(everything, "weight noise").word == "met"


def test_the_median_of_two_cases_lies_between_them(everything, make_rows) -> None:
    slower = make_rows(op="weight_noise", shape="1000", copy=2.0, copy_into=2.0, eager=30.0, demp=9.0)
    noise = verdict([*everything, *slower], "weight noise")
    assert (noise.cases, noise.median, noise.worst) == (2, pytest.approx(3.5), pytest.approx(4.5))


def test_goals_of_step_and_compaction(everything) -> None:
    assert verdict(everything, "in the same layout").worst == pytest.approx(200 / 150)
    assert verdict(everything, "in NCHW").worst == pytest.approx(260 / 150)
    assert verdict(everything, "with the same fused AdamW").worst == pytest.approx(180 / 150)
    assert verdict(everything, "own work").worst == pytest.approx(0.03)
    assert verdict(everything, "own work").word == "not met"
    assert verdict(everything, "commit: time").word == "met"
    assert verdict(everything, "plan: share").worst == pytest.approx(2 / 15)
    assert verdict(everything, "Torch-Pruning").worst == pytest.approx(10.0)


def test_goals_that_are_not_met_come_with_what_stands_in_the_way(everything, make_rows) -> None:
    found = reasons(everything)
    assert any(text.startswith("DemP's own work") and "narrow networks" in text for text in found)
    assert not any("weight noise over all" in text for text in found), "it is met"
    assert reasons(make_rows(copy=2.0, demp=2.0, others=0.5)) == [], "a busy machine decides nothing"


def test_nothing_measured_is_not_met_either() -> None:
    assert {found.word for found in judge([])} == {"not measured"}
    assert len(judge([])) == len(GOALS)


def test_a_busy_machine_decides_nothing(make_rows) -> None:
    busy = make_rows(copy=2.0, demp=2.0, others=0.5)
    found = verdict(busy, "forward: time of an allocated copy of the same bytes")
    assert (found.word, found.cases, found.noisy) == ("machine not quiet", 0, 1)
    mixed = verdict(busy + make_rows(layout="nc", copy=2.0, demp=2.0), "forward: time of an allocated copy of the same bytes")
    assert (mixed.word, mixed.cases, mixed.noisy) == ("met", 1, 1)


# --- tables ----------------------------------------------------------------------------------------------------------


def text_of(rows: list[Row], width: int = 200) -> str:
    out = StringIO()
    console = Console(file=out, width=width)
    for sheet in all_sheets(rows, wide=width >= 130):
        console.print(rich_table(sheet))
    return out.getvalue()


def test_tables_show_times_and_ratios(everything) -> None:
    text = text_of(everything)
    assert "relu forward nchw float32 512x64x32x32" in text
    assert "relu + noise forward" in text
    assert "4.76x" in text  # eager 10.0 / 2.1
    assert "0.33x" in text, "a losing case must stay in the table"
    assert "prepared, fused AdamW, allocator tuned" in text and "Torch-Pruning" in text
    assert "not met" in text


def test_narrow_terminals_keep_the_case(everything) -> None:
    text = text_of(everything, width=90)
    assert "relu forward nchw" in text and "p20-p80" not in text


def test_noisy_cases_are_marked(make_rows) -> None:
    assert "512x64x32x32 ~" in text_of(make_rows(copy=2.0, demp=2.0, others=0.5))


def test_losses_are_listed(everything) -> None:
    lost = losses(everything)
    assert any("16x64x16x16: 3.00x the time of plain" in text for text in lost)
    assert not any("+noise" in text and "plain" in text for text in lost), "noise is compared with noise"


def test_headline_names_machine_and_versions(everything) -> None:
    text = headline(everything)
    for part in ("a machine", "avx2", "1/2 threads", "tuned", "torch 2.14.1", "commit abc", "2026-01-02"):
        assert part in text


def test_all_tables_are_written(tmp_path, everything) -> None:
    write_tables(tmp_path / "tables.md", everything)
    text = (tmp_path / "tables.md").read_text()
    for part in ("### activation", "### norm_act", "### step, ms", "## Goals", "### slower than PyTorch", "16x64x16x16: 3.00x the time of plain"):
        assert part in text


# --- README ----------------------------------------------------------------------------------------------------------


def test_readme_is_rewritten_between_its_markers(tmp_path, everything) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n")
    assert update_readme(path, everything) is True
    text = path.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n") and text.endswith(f"{END}\n\nrest\n") and "old" not in text
    for part in ("| relu forward nchw float32 512x64x32x32 |", "**2.1**", "resnet18-w16", "3.0%", "not met", "17 (16.8-17.2)"):
        assert part in text
    assert update_readme(path, everything) is False


def test_readme_table_is_markdown(everything) -> None:
    lines = [line for line in readme_table(everything).splitlines() if line.startswith("|")]
    blocks: list[list[str]] = []
    for line in readme_table(everything).splitlines():
        if line.startswith("|"):
            if not blocks or not blocks[-1]:
                blocks.append([])
            blocks[-1].append(line)
        elif blocks and blocks[-1]:
            blocks.append([])
    assert lines
    for block in filter(None, blocks):
        assert len({line.count("|") for line in block}) == 1, block


@pytest.mark.parametrize("content", [None, "no markers", f"{END}\n{BEGIN}\n", f"{BEGIN}{BEGIN}{END}"])
def test_readme_without_markers_is_left_alone(tmp_path, everything, content: str | None) -> None:
    path = tmp_path / "README.md"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match="readme: "):
        update_readme(path, everything)
    assert content is None or path.read_text() == content


def test_readme_needs_rows() -> None:
    with pytest.raises(RecipeError, match="at least one row is required"):
        readme_table([])


# --- figures ---------------------------------------------------------------------------------------------------------


def test_every_figure_is_drawn(tmp_path: Path, everything) -> None:
    drawn = plots.draw_all(everything, tmp_path)
    assert sorted(file.stem for file in drawn) == sorted(plots.FIGURES)
    for file in drawn:
        text = file.read_text()
        assert text.startswith("<?xml") and len(text) > 2000
    assert "PyTorch, no count" in (tmp_path / "against_copy.svg").read_text()


def test_the_same_rows_give_the_same_file(tmp_path: Path, everything) -> None:
    first = {file.name: file.read_bytes() for file in plots.draw_all(everything, tmp_path / "a")}
    second = {file.name: file.read_bytes() for file in plots.draw_all(everything, tmp_path / "b")}
    assert first == second


def test_figures_without_rows_are_not_drawn(tmp_path: Path, make_rows) -> None:
    assert plots.draw_all([], tmp_path) == []
    assert [file.stem for file in plots.draw_all(make_rows(copy=2.0, demp=2.0), tmp_path)] == ["against_copy"]


def test_figures_are_of_the_newest_rows(tmp_path: Path, make_rows, machine) -> None:
    newer = replace(machine, date="2027-01-01T00:00:00Z")
    rows = make_rows(copy=2.0, demp=2.0) + make_rows(machine=newer, copy=2.0, demp=4.0)
    plots.draw_all(rows, tmp_path / "both")
    plots.draw_all(make_rows(machine=newer, copy=2.0, demp=4.0), tmp_path / "one")
    assert (tmp_path / "both/against_copy.svg").read_bytes() == (tmp_path / "one/against_copy.svg").read_bytes()


def test_the_readme_shows_the_committed_rows() -> None:
    root = Path(__file__).resolve().parent.parent.parent
    shown = (root / "benchmarks" / "README.md").read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    assert shown == readme_table(read_rows(root / "benchmarks" / "results" / "rows.csv"))
