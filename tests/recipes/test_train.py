"""`demp train` from the outside: files, table, exit codes."""
from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from image_files import write_cifar10, write_folder, write_idx

import demp_kernels as dk
from demp_kernels.cli import main
from demp_kernels.recipes.loop import new_model, read_data
from demp_kernels.recipes.methods import Demon
from demp_kernels.recipes.settings import TrainSettings

EPOCHS, STEPS = 8, 80
RUN_KEYS = {"accuracy", "train_seconds", "seconds_per_step_first", "seconds_per_step_last", "params", "flops"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "demp_kernels", "train", *map(str, arguments)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run in which units die, made by the command in a process of its own: (folder, what it printed)."""
    out = tmp_path_factory.mktemp("run")
    done = subprocess.run(
        command(
            "--width", 8, "--image-size", 8, "--train-size", 320, "--batch-size", 32, "--epochs", EPOCHS, "--lr", 0.03,
            "--peak-penalty", 0.1, "--round-to", 1, "--out", out,
        ),
        capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_summary_has_what_scripts_read(finished: tuple[Path, str]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    for run in ("dense", "demp"):
        assert RUN_KEYS <= summary[run].keys()
        assert 0 <= summary[run]["accuracy"] <= 1
        assert summary[run]["train_seconds"] > 0
    assert summary["total_units"] == 8 * 5 + 16 * 4 + 32 * 4 + 64 * 4
    assert 17 <= summary["live_units"] < summary["total_units"]
    assert summary["demp"]["params"] < summary["dense"]["params"]
    assert summary["demp"]["flops"] < summary["dense"]["flops"]
    ratio = summary["dense"]["train_seconds"] / summary["demp"]["train_seconds"]
    assert summary["speedup"] == pytest.approx(ratio)
    assert summary["interrupted"] is False
    assert summary["settings"]["width"] == 8


def test_csv_files(finished: tuple[Path, str]) -> None:
    with (finished[0] / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((finished[0] / "summary.json").read_text())
    for run in ("dense", "demp"):
        steps = [int(row["step"]) for row in rows if row["run"] == run]
        assert steps == sorted(set(steps)) and steps[-1] == STEPS
        assert sum(row["accuracy"] != "" for row in rows if row["run"] == run) == EPOCHS
    assert float(rows[-1]["accuracy"]) == pytest.approx(summary["demp"]["accuracy"], abs=1e-5)
    assert int(rows[-1]["live_units"]) == summary["live_units"]
    with (finished[0] / "units.csv").open() as file:
        units = list(csv.DictReader(file))
    last = max(int(row["step"]) for row in units)
    assert sum(int(row["live"]) for row in units if int(row["step"]) == last) == summary["live_units"]
    assert sum(int(row["live"]) for row in units if row["step"] == "0") == summary["total_units"]


def test_report_needs_nothing_but_itself(finished: tuple[Path, str]) -> None:
    page = (finished[0] / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "$" not in page
    assert page.index("<table") < page.index("<figure")
    assert page.count("data:image/svg+xml;base64,") == 5
    for name in ("metrics.csv", "units.csv", "summary.json", "checkpoint.pt", "checkpoint-dense.pt"):
        assert f'href="{name}"' in page
        assert (finished[0] / name).is_file()


def test_output_without_a_terminal_is_plain_lines_and_the_table(finished: tuple[Path, str]) -> None:
    lines = finished[1].splitlines()
    assert "resnet18 of width 8 on digits: 320 of 1,437 training and 360 test images" in lines[0]
    assert sum(line.startswith("demp epoch") for line in lines) == EPOCHS
    rows = ("accuracy", "units live / total", "parameters", "FLOPs a sample", "a step at the end", "training time")
    for text in rows:
        assert any(line.strip().startswith(text) for line in lines)
    assert "\x1b" not in finished[1]


def test_checkpoint_holds_the_shrunk_network(finished: tuple[Path, str]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    settings = TrainSettings(width=8, image_size=8).resolved()
    data = read_data(settings)
    example = torch.zeros(2, 1, 8, 8)
    model = dk.prepare(new_model(settings, data), example)
    extra = dk.load_checkpoint(finished[0] / "checkpoint.pt", model)
    assert extra["steps"] == STEPS
    assert sum(p.numel() for p in model.parameters()) == summary["demp"]["params"]
    model.eval()
    with torch.no_grad():
        right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in data.test)
    assert abs(right - round(360 * summary["demp"]["accuracy"])) <= 1  # another batch size rounds otherwise


def train(out: Path, *arguments: object) -> dict:
    assert main(["train", "--out", str(out), *map(str, arguments)]) == 0
    return json.loads((out / "summary.json").read_text())


def test_fashion_mnist_mlp_scan_without_baseline(tmp_path: Path) -> None:
    write_idx(tmp_path / "data", compressed=True)
    summary = train(
        tmp_path / "out", "--model", "mlp", "--width", 32, "--data", "fashion-mnist", "--data-dir", tmp_path / "data",
        "--epochs", 2, "--batch-size", 20, "--criterion", "scan", "--prune-every", 2, "--no-baseline", "--tensorboard",
    )
    assert summary["dense"] is None and summary["speedup"] is None
    assert summary["total_units"] == 96
    assert list((tmp_path / "out" / "tensorboard" / "demp").iterdir())


def test_evaluations_may_be_rare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same training, with fewer evaluations beside it; each epoch is a line all the same, and the end is evaluated."""
    losses = []
    for every, evaluated in ((1, [1, 2, 3]), (2, [2, 3])):
        out = tmp_path / str(every)
        small = ("--width", "4", "--image-size", "8", "--train-size", "96", "--batch-size", "32", "--epochs", "3")
        assert main(["train", *small, "--no-baseline", "--evaluate-every", str(every), "--out", str(out)]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [("accuracy" in line) for line in printed if line.startswith("demp epoch")] == [e in evaluated for e in (1, 2, 3)]
        rows = list(csv.DictReader((out / "metrics.csv").open()))
        assert [int(row["epoch"]) for row in rows if row["accuracy"]] == evaluated
        assert json.loads((out / "summary.json").read_text())["demp"]["accuracy"] == pytest.approx(float(rows[-1]["accuracy"]), abs=1e-6)
        losses.append([row["loss"] for row in rows])
    assert losses[0] == losses[1]


def test_cifar10_vgg16(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    summary = train(
        tmp_path / "out", "--model", "vgg16", "--width", 2, "--data", "cifar10", "--data-dir", tmp_path, "--epochs", 1,
        "--batch-size", 50, "--amp", "--no-channels-last",
    )
    assert summary["settings"]["amp"] == "bf16"
    assert summary["total_units"] == 2 * (2 + 4 + 12 + 24 + 24) + 256


def test_image_folder_vit(tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    summary = train(
        tmp_path / "out", "--model", "vit", "--width", 32, "--data", "folder", "--data-dir", tmp_path / "data",
        "--image-size", 28, "--epochs", 1, "--batch-size", 8, "--workers", 0, "--criterion", "scan",
    )
    assert summary["data"]["train_images"] == 24
    assert summary["total_units"] == 6 * 128


def test_torchvision_model_on_grey_images(tmp_path: Path) -> None:
    summary = train(
        tmp_path, "--model", "squeezenet1_1", "--image-size", 40, "--train-size", 64, "--batch-size", 32, "--epochs", 1,
        "--no-baseline",
    )
    assert summary["data"]["channels"] == 3


def test_ctrl_c_keeps_what_is_known(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("--width", 8, "--epochs", 500, "--no-baseline", "--out", tmp_path), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )
    try:
        deadline = time.monotonic() + 120
        log = tmp_path / "metrics.csv"
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and "demp" in log.read_text():
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "stopped" in output and "Traceback" not in errors
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["interrupted"] is True
    assert 0 < summary["demp"]["steps"] < summary["demp"]["total_steps"]
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["demp"]["steps_done"] == summary["demp"]["steps"]
    assert (tmp_path / "report.html").exists()


SMALL = ("--width", "4", "--image-size", "8", "--train-size", "64", "--batch-size", "32", "--epochs", "1")


def test_a_run_that_fails_loses_no_finished_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(self: Demon, loss: torch.Tensor) -> bool:
        loss.fill_(torch.nan)
        return False

    monkeypatch.setattr(Demon, "step", diverge)
    assert main(["train", *SMALL, "--out", str(tmp_path)]) == 2
    assert "the loss of demp is nan at step" in capsys.readouterr().err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["dense"]["steps"] == 2 and summary["dense"]["accuracy"] > 0
    assert summary["interrupted"] is True and (tmp_path / "report.html").is_file()


def test_what_the_second_run_refuses_is_known_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Demon, *_: object) -> None:
        raise ValueError("no unit can be removed")

    monkeypatch.setattr(Demon, "attach", refuse)
    assert main(["train", *SMALL, "--out", str(tmp_path)]) == 2
    assert "cannot be trained with demp: no unit can be removed" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint-dense.pt").exists()


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").mkdir()
    assert main(["train", *SMALL, "--no-baseline", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"demp train: error: Is a directory: {tmp_path / 'summary.json'}\n"


def test_the_process_ends_with_code_2_too(tmp_path: Path) -> None:
    done = subprocess.run(command("--epochs", "-3"), capture_output=True, text=True, timeout=120, cwd=tmp_path, env={
        **os.environ, "PYTHONPATH": str(Path(dk.__file__).parents[1]),
    })
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "demp train: error: epochs must be at least 1, got -3"


def test_info_prints_the_kernel_table_or_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["info", "--kernels"])
    printed = capsys.readouterr()
    if code == 0:
        assert printed.out.startswith("kernel ") and "activation_rows" in printed.out and "sm_90" in printed.out
    else:
        assert code == 2 and printed.err.startswith("demp info: error: --kernels: ") and printed.err.count("\n") == 1


def test_info_prints_what_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert capsys.readouterr().out.strip() == str(dk.build_info())


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "demp: error: the following arguments are required: command\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m demp_kernels info | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True,
    )
    assert done.stderr == "" and done.returncode == 141
