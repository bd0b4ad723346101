"""`demp selfcheck`: the soak, parts of the suite run and counted, rows and table, a check that fails or breaks off."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from demp_kernels.cli import main
from demp_kernels.recipes.errors import RecipeError
from demp_kernels.selfcheck import command, soak
from demp_kernels.selfcheck.checks import CHECKS, Check, Outcome, Size
from demp_kernels.selfcheck.rows import CheckRow, markdown, merge, read_rows
from demp_kernels.selfcheck.soak import SoakFigures
from demp_kernels.selfcheck.suite import run_tests

WHAT = {name: check.what for name, check in CHECKS.items()}


def test_soak_trains_removes_saves_and_loads() -> None:
    figures = soak.soak(0.5)
    assert figures.rounds >= 1 and figures.steps == soak.STEPS * figures.rounds == 12 * len(figures.resident)
    assert figures.removals >= figures.rounds and figures.differences == 0
    assert 50 < figures.resident[-1] < 50_000


def test_soak_sees_a_file_that_reads_back_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(path: Path, model: Any, *rest: Any) -> dict[str, Any]:
        loaded = right(path, model, *rest)
        next(model.parameters()).data[0] += 1
        return loaded

    right = soak.load_checkpoint
    monkeypatch.setattr(soak, "load_checkpoint", spoiled)
    figures = soak.soak(0.1)
    assert figures.differences == figures.rounds > 0 and not figures.passed


def test_soak_sees_growth_but_not_the_warm_up() -> None:
    leak = SoakFigures(rounds=400, resident=[700 + 0.1 * number for number in range(400)])
    assert leak.growth == pytest.approx(0.1 * 225, abs=0.1) and not leak.passed
    warm_up = SoakFigures(rounds=400, resident=[600 + min(number, 90) for number in range(400)])
    assert warm_up.growth == 0 and warm_up.passed


def test_parts_of_the_suite_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_right(n, record_property):\n    record_property('networks tried', 5)\n"
        "def test_wrong():\n    assert 1 == 2\n"
        "def test_not_here():\n    pytest.skip('no')\n"
    )
    figures = run_tests(["test_some.py"], root=tmp_path)
    assert (figures.passed, figures.failed, figures.skipped) == (3, 1, 1)
    assert figures.tried["networks tried"] == 15 and "assert 1 == 2" in figures.output and not figures.right
    with pytest.raises(RecipeError, match="pytest test_none.py ended with code 4"):
        run_tests(["test_none.py"], root=tmp_path)


def row(check: str, passed: bool = True, **fields: Any) -> CheckRow:
    facts = dict(figures="3 of 3", seconds=1.0, short=False, torch="2.14", commit="abc", date="2026-11-25", machine="CPU")
    return CheckRow(check, passed, **{**facts, **fields})


def test_a_check_that_fails_or_breaks_off_is_a_row_and_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(size: Size, say: Any) -> Outcome:
        raise ZeroDivisionError("by zero")

    monkeypatch.setitem(CHECKS, "kills", Check("kills", lambda size, say: Outcome(True, f"short: {size.short}")))
    monkeypatch.setitem(CHECKS, "networks", Check("networks", lambda size, say: Outcome(False, "1 of 9", "seed 7")))
    monkeypatch.setitem(CHECKS, "files", Check("files", broken))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- selfcheck:begin -->\n<!-- selfcheck:end -->\nafter\n")
    out = tmp_path / "out"
    assert main(["selfcheck", "kills", "--short", "--out", str(out)]) == 0
    assert main(["selfcheck", "networks", "files", "--out", str(out), "--readme", str(readme)]) == 1
    assert "seed 7" in capsys.readouterr().out
    rows = read_rows(out)
    assert [(r.check, r.passed, r.short) for r in rows] == [("kills", True, True), ("files", False, False), ("networks", False, False)]
    assert rows[1].figures == "broke off with ZeroDivisionError: by zero"
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "`kills`" in text and text.count("**failed**") == 2 and "passed, short form" in text


def test_a_new_row_replaces_the_old_one_of_its_check() -> None:
    rows = merge([row("soak"), row("kills", False)], [row("kills", figures="50 of 50")], list(CHECKS))
    assert [(r.check, r.figures) for r in rows] == [("kills", "50 of 50"), ("soak", "3 of 3")]


def test_the_readme_shows_the_committed_rows() -> None:
    root = Path(__file__).resolve().parents[2]
    rows = read_rows(root / "benchmarks" / "results")
    assert rows and all(r.passed for r in rows)
    shown = (root / "README.md").read_text(encoding="utf-8").split("<!-- selfcheck:begin -->")[1].split("<!-- selfcheck:end -->")[0]
    assert shown.strip() == markdown(rows, WHAT).strip(), "run: demp selfcheck --out benchmarks/results --readme README.md"


def test_every_check_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["selfcheck", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in CHECKS) and command.WHAT == WHAT
