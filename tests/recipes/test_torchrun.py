"""`demp train` under torchrun: two processes train like one, stop together, and end when one of them is killed."""
from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from demp_kernels.cli import main
from demp_kernels.recipes import settings as settings_module
from demp_kernels.recipes.errors import RecipeError
from demp_kernels.recipes.loop import Training, read_data
from demp_kernels.recipes.methods import Demon
from demp_kernels.recipes.ranks import Ranks, announced
from demp_kernels.recipes.settings import TrainSettings, resolve_device
from demp_kernels.training.checkpoint_file import read_file
from demp_kernels.training.penalty import penalised_parameters

needs_torchrun = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")

# Normalised per sample, so that a process's share of a batch sees the statistics of the whole one; and an optimiser linear
# in the gradient: Adam would blow up the rounding of gradients that are nearly zero.
RUN = (
    "--model", "vit", "--width", 32, "--image-size", 8, "--train-size", 128, "--batch-size", 32, "--epochs", 4, "--optimizer",
    "sgd", "--lr", 0.05, "--lr-schedule", "constant", "--warm-up", 0, "--penalty-on", "weights", "--peak-penalty", 0.03,
    "--round-to", 1, "--prune-every", 5, "--threads", 1, "--device", "cpu", "--no-baseline",
)

# The command, in which rank 1 sends itself a signal before a step.
DISTURBED = """
import os, signal, sys
from demp_kernels.cli import main
from demp_kernels.recipes import loop

step, at, number = loop.Training._step, int(sys.argv[1]), int(sys.argv[2])

def disturbed(self, *batch):
    if self.ranks.rank == 1 and self.result.steps == at:
        os.kill(os.getpid(), number)
    return step(self, *batch)

loop.Training._step = disturbed
sys.exit(main(sys.argv[3:]))
"""


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it, undisturbed."""
    out = tmp_path_factory.mktemp("one")
    assert main(["train", *map(str, RUN), "--out", str(out)]) == 0
    return out


def assert_like(out: Path, one: Path) -> None:
    ours, theirs = (read_file(folder / "checkpoint.pt")["extra"]["training"]["result"] for folder in (out, one))
    live = [row["live_units"] for row in theirs["rows"]]
    assert [row["live_units"] for row in ours["rows"]] == live and len(set(live)) >= 4  # at least three removals
    losses, expected = (torch.tensor([row["loss"] for row in result["rows"]]) for result in (ours, theirs))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=1.5 / 360)


@needs_torchrun
def test_two_processes_stopped_killed_and_resumed_train_like_one(one: Path, tmp_path: Path) -> None:
    two, script = tmp_path / "two", tmp_path / "disturbed.py"
    script.write_text(DISTURBED)

    stopped = torchrun(script, 6, int(signal.SIGINT), "train", *RUN, "--accumulate", 2, "--save-every", 5, "--out", two)
    assert stopped.returncode != 0 and "exitcode  : 130" in stopped.stderr, stopped.stderr
    assert stopped.stdout.count("stopped; written to") == stopped.stdout.count("demp epoch 1:") == 1  # rank 0 alone prints
    summary = json.loads((two / "summary.json").read_text())
    assert summary["interrupted"] is True and summary["demp"]["steps"] == 7 and summary["machine"]["processes"] == 2
    assert "Warning" not in stopped.stderr

    killed = torchrun(script, 12, int(signal.SIGKILL), "train", "--resume", "--out", two)
    assert killed.returncode != 0 and "exitcode  : -9" in killed.stderr, killed.stderr
    before = rows_of(two)
    assert len(before) == 12 and read_file(two / "checkpoint.pt")["extra"]["steps"] == 10

    ended = torchrun("-m", "demp_kernels", "train", "--resume", "--out", two)
    assert ended.returncode == 0, ended.stderr
    assert "demp goes on behind step 10 of 16" in ended.stdout
    assert rows_of(two)[:12] == before  # steps 11 and 12 once more
    assert_like(two, one)


def test_accumulation_is_the_whole_batch(one: Path, tmp_path: Path) -> None:
    assert main(["train", *map(str, RUN), "--accumulate", "4", "--out", str(tmp_path)]) == 0
    assert_like(tmp_path, one)


def test_a_scaled_loss_takes_the_steps_of_a_plain_one() -> None:
    """GradScaler by itself, without fp16: a power of two leaves every digit where it is. The penalty is not scaled."""
    settings = TrainSettings(
        model="mlp", width=32, train_size=320, batch_size=32, epochs=2, lr=0.05, peak_penalty=0.3, device="cpu", accumulate=2,
    ).resolved()
    losses, scales = [], []
    for enabled in (False, True):
        training = Training(settings, Demon(), read_data(settings), [])
        training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        losses.append([row["loss"] for row in training.run().rows])
        scales.append(torch.cat([p.detach() for p in penalised_parameters(training.model, "scales")]))
    assert losses[0] == losses[1] and torch.equal(*scales)
    assert scales[0].mean() < 0.9  # the penalty has moved them


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "current_ranks", lambda: Ranks(0, 2))
    text = "batch-size must be a multiple of processes times accumulate, 2 x 3, got 32"
    with pytest.raises(RecipeError, match=text):
        TrainSettings(batch_size=32, accumulate=3).resolved()
    assert TrainSettings(batch_size=36, accumulate=3).resolved().batch_size == 36


def test_other_commands_run_in_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare"]) == 2
    assert capsys.readouterr().err == "demp compare: error: runs in one process (demp train in several), got WORLD_SIZE=2\n"


def test_half_an_announcement_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RecipeError, match="WORLD_SIZE=2 must come with LOCAL_RANK, MASTER_ADDR, MASTER_PORT, as torchrun"):
        announced()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(RecipeError, match="WORLD_SIZE must be a number of processes, got 'two'"):
        announced()


def test_every_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match="device must be auto, cpu or cuda where each process has a GPU .*, got cuda:0"):
        resolve_device("cuda:0")
    with pytest.raises(RecipeError, match="nproc-per-node must be at most the CUDA devices of this machine, 1, got 2"):
        resolve_device("auto")
