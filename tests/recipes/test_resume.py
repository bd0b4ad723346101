"""`demp train --resume`: bit for bit, whenever it was stopped; refused with other settings; the data's place in an epoch."""
from __future__ import annotations

import csv
import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import write_folder

from demp_kernels.cli import main
from demp_kernels.recipes import loop
from demp_kernels.recipes.data import load_data
from demp_kernels.recipes.methods import Demon
from demp_kernels.selfcheck.kills import AIMS, survive_kills
from demp_kernels.training import policy
from demp_kernels.training.checkpoint_file import read_file

RUN: tuple[object, ...] = (
    "--model", "mlp", "--width", 16, "--train-size", 320, "--batch-size", 32, "--epochs", 3, "--threads", 1, "--device", "cpu",
)


def train(out: Path, *arguments: object) -> int:
    return main(["train", "--out", str(out), *map(str, arguments)])


def test_killed_runs_end_with_the_same_bits() -> None:
    figures = survive_kills(2)
    assert figures.kills == figures.survived == 2, figures
    assert sum(figures.aimed[aim] for aim in AIMS) == 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    assert train(out, *RUN, "--criterion", "scan", "--prune-every", 4) == 0
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in csv.DictReader(file)]


def assert_same_end(out: Path, whole: Path) -> None:
    for name in ("checkpoint-dense.pt", "checkpoint.pt"):
        ours, theirs = read_file(out / name), read_file(whole / name)
        for part in ("model", "optimizers", "units"):
            torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
        assert torch.equal(ours["rng"]["torch"], theirs["rng"]["torch"])
    assert rows(out) == rows(whole)


@pytest.mark.parametrize("stop", [1, 13, 30, 47])
def test_an_interrupt_between_any_steps(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    step, taken = loop.Training._step, []

    def interrupted(self: Any, *batch: Any) -> Any:
        taken.append(1)
        if len(taken) == stop:
            signal.raise_signal(signal.SIGINT)
        return step(self, *batch)

    monkeypatch.setattr(loop.Training, "_step", interrupted)
    assert train(tmp_path, *RUN, "--criterion", "scan", "--prune-every", 4) == 130
    assert train(tmp_path, "--resume") == 0
    assert len(taken) == 60  # no step twice
    assert_same_end(tmp_path, whole)


def test_an_interrupt_between_the_runs_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, calls = Demon.prepare, []

    def interrupted(self: Any, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            return prepare(self, *given)  # the trial before the dense run
        raise KeyboardInterrupt

    monkeypatch.setattr(Demon, "prepare", interrupted)
    assert train(tmp_path, *RUN) == 130
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["interrupted"] is True and summary["demp"] is None
    assert "Stopped before the end" in (tmp_path / "report.html").read_text()


def test_a_run_that_weighs_its_removals_is_resumed_with_its_decisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, taken = loop.Training._step, []

    def interrupted(self: Any, *batch: Any) -> Any:
        taken.append(1)
        if len(taken) == 18:
            signal.raise_signal(signal.SIGINT)
        return step(self, *batch)

    monkeypatch.setattr(loop.Training, "_step", interrupted)
    monkeypatch.setattr(policy, "TENSOR_SECONDS", 1e6)  # nothing pays
    flags = ("--policy", "when_it_pays", "--prune-every", 4, "--no-baseline", "--lr", 0.1, "--peak-penalty", 1, "--round-to", 1)
    assert train(tmp_path, *RUN, *flags) == 130
    stopped = json.loads((tmp_path / "summary.json").read_text())["demp"]["decisions"]
    assert train(tmp_path, "--resume") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    decisions = summary["demp"]["decisions"]
    assert stopped and decisions[: len(stopped)] == stopped and len(decisions) > len(stopped)
    assert not any(d["pays"] for d in decisions) and {d["step"] % 4 for d in decisions} == {0}
    assert summary["live_units"] < summary["total_units"], "the last look removes"


def test_a_finished_run_stays_as_it_is(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = rows(whole)
    assert train(whole, "--resume") == 0
    assert rows(whole) == before
    assert "dense was finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--lr", 0.5), "lr must be that of the run in .*, to resume it, got 0.5"),
        (("--seed", 3), "seed must be that of the run in .*, 0, to resume it, got 3"),
        (("--data", "cifar10"), "data must be that of the run in .*, digits, to resume it, got cifar10"),
        (("--prune-every", 5), "prune-every must be that of the run in .*, 4, to resume it, got 5"),
        (("--no-baseline",), "baseline must be that of the run in .*, True, to resume it, got False"),
    ],
)
def test_other_settings_are_refused(
    whole: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], text: str
) -> None:
    before = {file: file.read_bytes() for file in whole.iterdir() if file.is_file()}
    assert train(whole, "--resume", *flags) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and re.search(text, errors), errors
    assert {file: file.read_bytes() for file in whole.iterdir() if file.is_file()} == before


def test_damaged_checkpoints_and_lost_settings_are_one_line(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (whole / "checkpoint-dense.pt").read_bytes()
    (tmp_path / "checkpoint-dense.pt").write_bytes(content[:-1000])
    assert train(tmp_path, "--resume", *RUN) == 2
    assert "out has a checkpoint but no settings.json" in capsys.readouterr().err
    (tmp_path / "settings.json").write_text((whole / "settings.json").read_text())
    log = (whole / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(log)
    assert train(tmp_path, "--resume") == 2
    assert (tmp_path / "metrics.csv").read_bytes() == log  # all that is left of the run
    errors = capsys.readouterr().err
    assert "out cannot be resumed: " in errors and "not a readable checkpoint" in errors and errors.count("\n") == 1
    assert (tmp_path / "checkpoint-dense.pt").read_bytes() == content[:-1000]
    (tmp_path / "checkpoint-dense.pt").write_bytes(content)  # this run is read, the other one is not
    (tmp_path / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes()[:-1000])
    assert train(tmp_path, "--resume") == 2
    assert (tmp_path / "metrics.csv").read_bytes() == log


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "demp_kernels", "train", "--out", str(tmp_path), *map(str, RUN), "--epochs", "400"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        checkpoint, deadline = tmp_path / "checkpoint-dense.pt", time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (checkpoint.stat().st_size // 2, resource.RLIM_INFINITY))
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2, errors
    assert errors.count("\n") == 1 and "was not written, what was at its place before is unchanged" in errors
    assert read_file(checkpoint)["extra"]["steps"] > 0


def batches(data: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(data.train)


@pytest.mark.parametrize(("name", "workers"), [("digits", 0), ("folder", 0), ("folder", 2)])
def test_batches_go_on_in_the_middle_of_an_epoch(tmp_path: Path, name: str, workers: int) -> None:
    if name == "folder":
        write_folder(tmp_path)

    def load(workers: int) -> Any:
        return load_data(
            name, tmp_path if name == "folder" else None, batch_size=4, seed=5, device=torch.device("cpu"), train_size=24,
            image_size=12, workers=workers,
        )

    whole, stopped, resumed = load(0), load(workers), load(workers)
    expected = [batches(whole), batches(whole), batches(whole)]
    list(whole.train.scan())
    assert not torch.equal(expected[0][0][0], expected[1][0][0])

    batches(stopped)
    second = iter(stopped.train)
    for _ in range(4):
        next(second)
    resumed.train.load_state_dict(stopped.train.state_dict())
    found = [batches(resumed), batches(resumed)]
    assert len(found[0]) == 2
    torch.testing.assert_close(found, [expected[1][4:], expected[2]], rtol=0, atol=0)
    list(resumed.train.scan())
    torch.testing.assert_close(list(resumed.train.scan()), list(whole.train.scan()), rtol=0, atol=0)
