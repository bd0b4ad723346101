"""The CSV: what is written is read back, other files are refused in one line, newest rows win."""
from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from demp_kernels.bench.rows import COLUMNS, Group, append_rows, groups, latest, read_rows
from demp_kernels.recipes.errors import RecipeError


def test_columns_are_fixed() -> None:
    """Committed files are appended to: a new column is a decision, not an accident."""
    assert COLUMNS == (
        "op", "function", "noise", "layout", "dtype", "shape", "direction", "variant", "median_ms", "p20_ms", "p80_ms",
        "samples", "bytes", "gb_per_s", "peak_bytes", "others", "threads", "device", "machine", "simd", "cache_bytes",
        "allocator", "backend", "torch", "commit", "date",
    )


def test_round_trip(tmp_path, make_rows) -> None:
    path = tmp_path / "deep" / "rows.csv"
    rows = make_rows(copy=2.0, demp=2.125) + make_rows(noise=True, peak_bytes=5, others=None, eager=1.5)
    append_rows(path, rows[:2])
    append_rows(path, rows[2:])
    back = read_rows(path)
    assert len(path.read_text().splitlines()) == 4
    for before, after in zip(rows, back, strict=True):
        for name in COLUMNS:
            wanted = getattr(before, name)
            assert getattr(after, name) == (pytest.approx(wanted, rel=1e-5) if isinstance(wanted, float) else wanted), name


def test_row_has_bandwidth(make_rows) -> None:
    (row,) = make_rows(copy=2.0, bytes=4 * 10**6)
    assert row.gb_per_s == pytest.approx(2.0)
    (nothing,) = make_rows(copy=0.0, bytes=0)
    assert nothing.gb_per_s == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "found no file"),
        ("a,b\n1,2\n", "must have the columns of this version"),
        (",".join(COLUMNS) + "\n" + ",".join("x" * 1 for _ in COLUMNS) + "\n", "line 2 of .* cannot be read"),
        (",".join(COLUMNS) + "\nactivation,relu\n", "line 2 of .* cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, content: str | None, words: str) -> None:
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=words) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


def test_appending_to_another_file_changes_nothing(tmp_path, make_rows) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n")
    with pytest.raises(RecipeError, match="differs in"):
        append_rows(path, make_rows(copy=1.0))
    assert path.read_text() == "a,b\n"


def test_text_with_commas_survives(tmp_path, make_rows, machine) -> None:
    machine = replace(machine, machine='a, "machine"')
    append_rows(tmp_path / "rows.csv", make_rows(machine=machine, copy=1.0))
    assert read_rows(tmp_path / "rows.csv")[0].machine == 'a, "machine"'
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert next(iter(csv.DictReader(file)))["machine"] == 'a, "machine"'


def test_groups_hold_one_case_each(make_rows) -> None:
    rows = make_rows(copy=2.0, demp=3.0) + make_rows(direction="backward", copy=2.0, demp=6.0) + make_rows(threads=1, copy=4.0)
    found = groups(rows)
    assert [sorted(group.rows) for group in found] == [["copy", "demp"], ["copy", "demp"], ["copy"]]
    assert found[1].ratio("demp", "copy") == pytest.approx(3.0)
    assert found[2].ratio("demp", "copy") is None


def test_ratio_per_byte(make_rows) -> None:
    group = Group(make_rows(copy=2.0, demp=3.0, factor=1.5))
    assert group.ratio("demp", "copy") == pytest.approx(1.5)
    assert group.ratio_per_byte("demp", "copy") == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("facts", "quiet"),
    [({}, True), ({"others": None}, True), ({"others": 0.3}, False), ({"spread": 0.3}, False)],
)
def test_quiet(make_rows, facts: dict, quiet: bool) -> None:
    assert Group(make_rows(copy=2.0, demp=3.0, **facts)).quiet is quiet


def test_latest_takes_the_newest_of_each_case(make_rows, machine) -> None:
    older, newer = machine, replace(machine, date="2026-05-05T00:00:00Z")
    elsewhere = replace(machine, machine="another", date="2026-03-03T00:00:00Z")
    rows = [
        *make_rows(machine=newer, demp=1.0), *make_rows(machine=older, demp=2.0, eager=9.0),
        *make_rows(machine=older, direction="backward", demp=3.0), *make_rows(machine=elsewhere, demp=4.0),
    ]
    assert sorted(row.median_ms for row in latest(rows)) == pytest.approx([1.0, 3.0])
    assert latest(rows, device="cuda") == []
    assert latest([]) == []
