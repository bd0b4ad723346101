"""`demp compare`: matched sparsities, resuming, files, refusals."""
from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from image_files import write_idx

from demp_kernels.cli import main
from demp_kernels.recipes import compare as module
from demp_kernels.recipes import compare_command, comparison_plots, comparison_report
from demp_kernels.recipes.compare import Comparison, Run, table_rows
from demp_kernels.recipes.errors import RecipeError
from demp_kernels.recipes.loop import RunResult
from demp_kernels.recipes.settings import TrainSettings

SMALL = [
    "compare", "--model", "mlp", "--width", "24", "--train-size", "320", "--batch-size", "32", "--epochs", "12",
    "--lr", "0.05", "--peak-penalty", "0.5", "--round-to", "1", "--threads", "1", "--seeds", "2",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison")
    assert main([*SMALL, "--methods", "dense", "demp", "snap", "l1", "--out", str(out)]) == 0
    return out


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def test_rivals_match_the_sparsity_of_demp_seed_by_seed(finished: Path) -> None:
    runs = {(row["method"], row["seed"]): row for row in rows_of(finished / "runs.csv")}
    assert len(runs) == 8
    for seed in ("0", "1"):
        reached = float(runs["demp", seed]["sparsity"])
        assert 0.02 < reached < 1
        for rival in ("snap", "l1"):
            # at least as sparse, by less than two units of the widest layer
            assert reached <= float(runs[rival, seed]["sparsity"]) < reached + 0.08
        assert float(runs["dense", seed]["sparsity"]) == 0
        assert int(runs["snap", seed]["train_flops"]) < int(runs["dense", seed]["train_flops"])


def test_a_budget_is_a_method_of_its_own_whose_sparsity_rivals_match(tmp_path: Path) -> None:
    levels = ("flops 0.6", "flops 0.3", "sparsity 0.5")
    arguments = ["--methods", "dense", "demp-fast", "l1", "--seeds", "1"]
    budgets = ["--target-flops", "0.6", "0.3", "--target-sparsity", "0.5"]
    assert main([*SMALL, *arguments, *budgets, "--out", str(tmp_path)]) == 0
    runs = {(row["method"], row["level"]): row for row in rows_of(tmp_path / "runs.csv")}
    assert set(runs) == {("dense", "")} | {pair for level in levels for pair in (("demp-fast", level), ("l1", f"as {level}"))}
    dense = int(runs["dense", ""]["train_flops"])
    for level in levels:
        reached = float(runs["demp-fast", level]["sparsity"])
        assert reached <= float(runs["l1", f"as {level}"]["sparsity"]) < reached + 0.08
    few, many = (int(runs["demp-fast", level]["train_flops"]) for level in ("flops 0.3", "flops 0.6"))
    assert few < many < dense
    assert float(runs["demp-fast", "sparsity 0.5"]["sparsity"]) == pytest.approx(0.5, abs=0.1)
    assert "DemP, budget" in (tmp_path / "accuracy_against_sparsity.svg").read_text()


def test_the_preset_of_a_budget_goes_under_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(compare_command, "compare", lambda settings, comparison: asked.append((settings.resolved(), comparison)))
    arguments = ["--recipe", "resnet18-cifar10-adamw", "--methods", "demp", "demp-fast", "--prune-every", "7", "--steer-until", "0.2"]
    arguments += ["--steer-start", "0.1", "--push-rate", "0.04"]
    arguments += ["--peak-penalty", "0.01", "0.02"]  # of runs of the method demp
    assert main(["compare", *arguments]) == 0
    (settings, comparison), = asked
    *_, (_, level, changes) = module._demp_runs(settings, comparison)
    fast = dataclasses.replace(settings, **changes)
    assert (fast.prune_every, fast.steer_start, fast.steer_until, fast.push_rate) == (7, 0.1, 0.2, 0.04)
    assert (fast.criterion, fast.round_to, fast.peak_penalty, level) == ("window", 8, 0.0, "flops 0.2")
    assert (settings.criterion, settings.round_to) == ("scan", 1)


def test_table_holds_means_over_the_seeds(finished: Path) -> None:
    runs = rows_of(finished / "runs.csv")
    table = {row["method"]: row for row in rows_of(finished / "table.csv")}
    for method, row in table.items():
        own = [run for run in runs if run["method"] == method]
        assert int(row["runs"]) == len(own) == 2
        accuracy = [float(run["accuracy"]) for run in own]
        assert float(row["accuracy"]) == pytest.approx(sum(accuracy) / 2)
        assert float(row["accuracy_std"]) == pytest.approx(abs(accuracy[0] - accuracy[1]) / 2**0.5)
        seconds = [float(run["train_seconds"]) for run in own]
        assert float(row["train_seconds_std"]) == pytest.approx(abs(seconds[0] - seconds[1]) / 2**0.5)
    assert float(table["dense"]["speedup"]) == 1


def test_page_needs_nothing_but_itself(finished: Path) -> None:
    page = (finished / "comparison.html").read_text()
    assert "http" not in page and "<script" not in page and "$" not in page
    assert all(name in page for name in ("SNAP", "L1 norm", "DemP", "dense", "runs.csv"))


def test_started_again_it_makes_only_the_missing_runs(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = finished / "runs" / "l1-as-penalty-0.5-seed-1.json"
    before = json.loads(missing.read_text())
    missing.unlink()
    made = []
    original = module._run
    monkeypatch.setattr(module, "_run", lambda method, *rest: made.append(method.name) or original(method, *rest))
    assert main([*SMALL, "--methods", "dense", "demp", "snap", "l1", "--out", str(finished)]) == 0
    assert made == ["l1"]
    assert capsys.readouterr().out.count("there already") == 7
    again = json.loads(missing.read_text())
    assert again["accuracy"] == before["accuracy"] and again["sparsity"] == before["sparsity"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "demp", "magnitude"], "methods must be of dense, demp, demp-fast, snap,.*'magnitude'"),
        (["--methods", "demp", "demp"], "methods must be different"),
        (["--methods", "snap"], "sparsity is required"),
        (["--sparsity", "1.2"], "sparsity must be between 0 and 1, got 1.2"),
        (["--target-flops", "0"], "target-flops must be between 0 and 1, got 0"),
        (["--target-sparsity", "1"], "target-sparsity must be between 0 and 1, got 1"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--peak-penalty", "-1"], "peak-penalty must be above 0, got -1"),
        (["--peak-penalty", "0.1", "0.1"], "peak-penalty must be different in six digits, got 0.1 0.1"),
        (["--sparsity", "0.9", "0.90000001"], "sparsity must be different in six digits, got 0.9 0.90000001"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("demp compare: error: ") and printed.count("\n") == 1
    assert re.search(message, printed)
    assert not (tmp_path / "out").exists()


def test_another_comparison_in_out_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--epochs", "13", "--out", str(finished)]) == 2
    assert "out has a comparison with epochs 12, got 13" in capsys.readouterr().err


def test_flags_over_the_preset_make_another_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.json").write_text('{"criterion": "scan"}')  # of all but the demp-fast runs, whose preset has another
    start = [*SMALL, "--epochs", "1", "--seeds", "1", "--recipe", str(tmp_path / "mine.json"), "--out", str(tmp_path / "out"), "--methods"]
    assert main([*start, "dense"]) == 0
    assert main([*start, "dense", "--criterion", "scan"]) == 0
    start.append("demp-fast")
    assert main(start) == 0
    assert main([*start, "--criterion", "scan"]) == 2
    assert "out has a comparison with fast {'criterion': 'window'" in capsys.readouterr().err
    assert main(start) == 0


def test_the_settings_of_a_comparison_are_written_once(tmp_path: Path) -> None:
    """Not again at every start, when a kill in the middle would leave half of them."""
    start = [*SMALL, "--epochs", "1", "--seeds", "1", "--methods", "dense", "--out", str(tmp_path)]
    assert main(start) == 0
    before = (tmp_path / "comparison.json").stat().st_mtime_ns
    assert main(start) == 0
    assert (tmp_path / "comparison.json").stat().st_mtime_ns == before
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_that_fails_costs_the_others_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = module._run

    def failing(method: Any, level: str, *rest: Any) -> Run:
        if method.name == "snap" or level == "flops 0.6":
            raise RecipeError(f"the loss of {method.name} is nan at step 3: try a lower lr")
        return run(method, level, *rest)

    monkeypatch.setattr(module, "_run", failing)
    start = [*SMALL, "--epochs", "2", "--seeds", "1", "--methods", "dense", "demp-fast", "snap", "l1"]
    start += ["--target-flops", "0.6", "0.3", "--out", str(tmp_path)]
    assert main(start) == 2
    printed = capsys.readouterr()
    assert "2 of 7 runs failed, the first of them demp-fast flops 0.6, seed 0: the loss of demp-fast is nan" in printed.err
    assert "failed: the loss of snap is nan" in printed.out
    made = {(row["method"], row["level"]) for row in rows_of(tmp_path / "runs.csv")}
    assert made == {("dense", ""), ("demp-fast", "flops 0.3"), ("l1", "as flops 0.3")}
    monkeypatch.undo()
    assert main(start) == 0 and len(rows_of(tmp_path / "runs.csv")) == 7


def test_a_setting_of_a_later_version_had_its_default(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "older")
    file = tmp_path / "older" / "comparison.json"
    older = json.loads(file.read_text())
    del older["steer_start"]
    file.write_text(json.dumps(older))
    again = [*SMALL, "--methods", "dense", "demp", "snap", "l1", "--out", str(tmp_path / "older")]
    assert main([*again, "--steer-start", "0.1"]) == 2
    assert "out has a comparison with steer_start 0.05, got 0.1" in capsys.readouterr().err
    assert main(again) == 0 and capsys.readouterr().out.count("there already") == 8


def test_a_damaged_run_is_named(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (finished / "comparison.json", finished / "runs" / "dense-seed-0.json"):
        target = tmp_path / file.relative_to(finished)
        target.parent.mkdir(exist_ok=True)
        target.write_text(file.read_text())
    (tmp_path / "runs" / "dense-seed-0.json").write_text('{"method": "dense"')
    assert main([*SMALL, "--methods", "dense", "--out", str(tmp_path)]) == 2
    assert "dense-seed-0.json; remove it" in capsys.readouterr().err


def test_a_run_without_a_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"method": "dense"}')
    with pytest.raises(RecipeError, match="run.json; remove it"):
        Run.load(tmp_path / "run.json")


def test_a_mistake_leaves_the_folder_for_what_was_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--methods", "dense", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path / "out")]
    assert main(["compare", "--data", "fashion-mnist", "--data-dir", str(tmp_path / "nowhere"), *out]) == 2
    assert main(["compare", "--data", "fashion-mnist", "--model", "resnt", *out]) == 2
    write_idx(tmp_path, compressed=False)
    batches = ["--batch-size", "4", "--model", "mlp", "--width", "8"]
    assert main(["compare", "--data", "fashion-mnist", "--data-dir", str(tmp_path), *batches, *out]) == 0
    (tmp_path / "moved").mkdir()
    for file in tmp_path.glob("*ubyte*"):
        file.rename(tmp_path / "moved" / file.name)
    capsys.readouterr()
    assert main(["compare", "--data", "fashion-mnist", "--data-dir", str(tmp_path / "moved"), *batches, *out]) == 0
    assert "there already" in capsys.readouterr().out


def test_dense_runs_may_have_a_learning_rate_of_their_own() -> None:
    settings = TrainSettings(lr=0.01).resolved()
    asked = module._plan(settings, Comparison(("dense", "demp"), seeds=1, dense_lr=0.002), [])
    assert [(method.name, own.lr) for method, _, own in itertools.islice(asked, 2)] == [("dense", 0.002), ("demp", 0.01)]


def test_a_recipe_with_a_target_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.json").write_text('{"target_sparsity": 0.9}')
    assert main(["compare", "--recipe", str(tmp_path / "mine.json"), "--out", str(tmp_path / "out")]) == 2
    assert "it must have no target-sparsity, got 0.9; --target-sparsity is of the method demp-fast" in capsys.readouterr().err


def test_the_page_of_a_comparison_that_went_on_elsewhere(tmp_path: Path) -> None:
    result = RunResult("demp", steps=9, total_steps=9, live={"a": 1}, total={"a": 2}, units=[(0, {"a": 2}), (5, {"a": 1})])
    runs = [
        Run("dense", "", 0, 0.5, 0.0, 0.0, 10, 4.0, 1.0, RunResult("dense"), "one machine"),
        Run("demp", "penalty 1", 0, 0.5, 0.1, 0.1, 10, 2.0, 1.0, result, "another machine"),
    ]
    comparison_report.write(tmp_path, TrainSettings().resolved(), runs, {})
    assert "one machine; another machine" in (tmp_path / "table.md").read_text()
    assert "training speed against dense" not in (tmp_path / "comparison.html").read_text()


def test_the_names_of_all_methods_fit_below_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    figures, drawing = [], comparison_plots.drawing

    @contextmanager
    def watched(width: float, height: float) -> Iterator[Any]:
        with drawing(width, height) as (figure, svg):
            figures.append(figure)
            yield figure, svg

    monkeypatch.setattr(comparison_plots, "drawing", watched)
    runs = [Run(method, "", 0, 0.5, 0.9, 0.5, 10, 4.0, 1.0, RunResult(method)) for method in module.METHODS]
    comparison_plots.accuracy_against(table_rows(runs), runs, "train_seconds", "training seconds")
    (figure,) = figures
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1 and 0 <= box.y0 < box.y1 < figure.bbox.y1 / 2


def test_speed_up_is_against_the_dense_run_of_the_same_seed() -> None:
    def made(method: str, seed: int, seconds: float) -> Run:
        return Run(method, "" if method == "dense" else "penalty 1", seed, 0.5, 0.1, 0.1, 10, seconds, 1.0, RunResult(method))

    rows = table_rows([made("dense", 0, 4.0), made("demp", 0, 2.0), made("dense", 1, 9.0), made("demp", 1, 3.0)])
    assert [row["speedup"] for row in rows] == [1.0, 2.5]
    assert table_rows([made("demp", 2, 1.0)])[0]["speedup"] is None
    elsewhere = dataclasses.replace(made("demp", 0, 1.0), machine="another")
    both = table_rows([made("demp", 1, 3.0), elsewhere, made("demp", 2, 5.0)])[0]
    assert both["train_seconds"] == 4.0 and both["train_seconds_std"] == pytest.approx(2**0.5) and both["runs"] == 3
    assert table_rows([made("dense", 0, 4.0), elsewhere])[1]["speedup"] is None
