"""`demp bench` from the outside."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from demp_kernels.bench.report import BEGIN, END
from demp_kernels.bench.rows import append_rows, read_rows
from demp_kernels.cli import main


def test_quick_activation_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "demp_kernels", "bench", "--quick", "activation", "--threads", "1", "--seconds", "0.01", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "out" / "rows.csv")
    assert {row.op for row in rows} == {"activation"} and {row.threads for row in rows} == {1}
    assert {row.variant for row in rows} == {"copy", "copy_into", "plain", "eager", "demp"}
    assert {row.allocator for row in rows} <= {"tuned", "default"}
    assert "relu forward nchw float32" in done.stdout and "goals" in done.stdout
    assert "allocator" in done.stdout.splitlines()[0]


def test_runs_are_appended_and_reported(tmp_path: Path, make_rows, capsys) -> None:
    out, readme = tmp_path / "out", tmp_path / "README.md"
    append_rows(out / "rows.csv", make_rows(copy=2.0, copy_into=2.0, plain=2.0, eager=9.0, demp=2.1))
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert main(["bench", "report", "--out", str(out), "--readme", str(readme)]) == 0
    assert "512x64x32x32" in capsys.readouterr().out
    assert "512x64x32x32" in readme.read_text()
    assert (out / "against_copy.svg").exists()
    assert main(["bench", "channel_select", "--quick", "--no-tune", "--seconds", "0.001", "--threads", "1,2", "--out", str(out), "--only", "forward-nchw"]) == 0
    rows = read_rows(out / "rows.csv")
    assert rows[0].op == "activation" and {row.op for row in rows[5:]} == {"channel_select"}
    assert {row.threads for row in rows[5:]} == {1, 2} and {row.direction for row in rows[5:]} == {"forward"}
    assert {row.allocator for row in rows[5:]} == {"default"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["relu"], "what must be among activation, norm_act, .* got 'relu'"),
        (["--seconds", "0"], "seconds must be above 0"),
        (["--seconds", "nan"], "seconds must be above 0"),
        (["--threads", "0"], "threads must be whole numbers above 0"),
        (["--threads", "2,x"], "threads must be whole numbers above 0"),
        (["--device", "toaster"], "device must be"),
        (["step", "--device", "cuda"], "device cuda is not there|measured on the CPU"),
        (["--out", "a-file"], "out must be a folder, got the file"),
        (["report"], "report needs rows in"),
        (["compaction", "--models", "resnet17"], "got 'resnet17'"),
        (["--out", "other-columns"], "must have the columns of this version"),
        (["activation", "--quick", "--only", "tanh"], "only must be part of a case's name"),
        (["--seconds", "soon"], "invalid float"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, monkeypatch, capsys, arguments: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    (tmp_path / "other-columns").mkdir()
    (tmp_path / "other-columns" / "rows.csv").write_text("a,b\n")
    try:
        code = main(["bench", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("demp bench: error: ")


    assert re.search(words, lines[0])


def test_help_names_the_ops_and_programs(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    for word in ("activation", "norm_act", "weight_noise", "compact", "channel_select", "step", "compaction", "report"):
        assert word in text


def test_pytest_suites_run(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks").is_dir():
        pytest.skip("benchmarks/ is not there")
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable, "-m", "pytest", str(root / "benchmarks" / "bench_channel_select.py"), "--quick", "--turns", "2", "-q",
        "-p", "no:cacheprovider", f"--benchmark-json={tmp_path / 'out.json'}",
    ]
    # pytest-benchmark switches itself off in a worker of pytest-xdist, and tells one by this variable
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "demp_over_copy" in (tmp_path / "out.json").read_text()
