"""Table, summary and page from runs that are made up."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demp_kernels.recipes import report
from demp_kernels.recipes.loop import RunResult, read_data
from demp_kernels.recipes.machine import machine_facts, versions
from demp_kernels.recipes.settings import TrainSettings


def made_up(name: str, *, steps: int = 40, faster: float = 1.0, live: int | None = None) -> RunResult:
    rows = [
        {
            "run": name, "step": step, "epoch": 1 + step // 20, "seconds": step * 0.1 / faster,
            "seconds_per_step": 0.1 / faster, "loss": 1 / step, "accuracy": step / 50 if step % 20 == 0 else None,
            "lr": 0.01, "penalty_weight": 0.03, "noise_std": 0.0, "live_units": live, "params": 10, "flops": 20,
        }
        for step in range(5, steps + 1, 5)
    ]
    layers = {} if live is None else {"stem": live, "head <b>": 3}
    return RunResult(
        name, accuracy=0.8, train_seconds=4 / faster, seconds_per_step_first=0.1, seconds_per_step_last=0.1 / faster,
        steps=steps, total_steps=40, params=1000 if live is None else 250, flops=8_000_000, live=layers,
        total=dict.fromkeys(layers, 8), rows=rows, units=[(0, dict.fromkeys(layers, 8)), (steps, layers)],
    )


def content(runs: list[RunResult]) -> dict:
    settings = TrainSettings().resolved()
    facts = {"machine": machine_facts(torch.device("cpu")), "versions": versions()}
    interrupted = not all(run.finished for run in runs)
    return report.summary(runs, settings, read_data(settings), facts, interrupted=interrupted)


def test_table_compares_the_runs() -> None:
    titles, rows = report.headline_rows(content([made_up("dense"), made_up("demp", faster=1.6, live=5)]))
    assert titles == ["", "dense", "DemP", "change"]
    assert rows == [
        ["accuracy", "80.00%", "80.00%", "+0.00 points"],
        ["units live / total", "16 / 16", "8 / 16", "-50%"],
        ["parameters", "1,000", "250", "-75%"],
        ["FLOPs a sample", "8 M", "8 M", "0%"],
        ["a step at the start", "100 ms", "100 ms", "1.00x faster"],
        ["a step at the end", "100 ms", "62.5 ms", "1.60x faster"],
        ["training time", "4.0 s", "2.5 s", "1.60x faster"],
    ]


def test_one_run_has_nothing_to_compare_with() -> None:
    titles, rows = report.headline_rows(content([made_up("demp", live=5)]))
    assert titles == ["", "DemP"] and all(len(row) == 2 for row in rows)


@pytest.mark.parametrize("steps", [0, 5, 25])
def test_a_stopped_run_claims_no_speedup(steps: int, tmp_path: Path) -> None:
    stopped = made_up("demp", steps=steps, faster=9.0, live=5)
    if steps == 0:
        stopped.accuracy = stopped.seconds_per_step_first = stopped.seconds_per_step_last = None
    summary = content([made_up("dense"), stopped])
    assert summary["speedup"] is None and summary["interrupted"] is True
    assert report.headline_rows(summary)[1][-1][-1] == ""
    report.write_report(tmp_path / "report.html", [made_up("dense"), stopped], summary, [])
    assert "Stopped before the end" in (tmp_path / "report.html").read_text()


def test_names_are_escaped(tmp_path: Path) -> None:
    runs = [made_up("demp", live=5)]
    report.write_report(tmp_path / "report.html", runs, content(runs), ["a&b.csv"])
    page = (tmp_path / "report.html").read_text()
    assert 'href="a&amp;b.csv"' in page and "<b>" not in page.replace('<div class="card"><b>', "")
