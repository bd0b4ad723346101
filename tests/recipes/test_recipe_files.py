"""Named recipes: they say what they should, and every one trains on data in the real format."""
from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from image_files import write_cifar10, write_folder, write_idx

from demp_kernels.cli import main
from demp_kernels.recipes.optimisation import DecoupledSGD, build_optimizer, build_schedule
from demp_kernels.recipes.recipe_files import read_recipe, recipe_summaries
from demp_kernels.recipes.settings import TrainSettings
from demp_kernels.recipes.train_command import settings_from

NAMES = list(recipe_summaries())
# every recipe is shrunk to seconds by these; what is left of it is its optimiser, schedule, loss, model and data
SMALL = ["--epochs", "1", "--batch-size", "8", "--threads", "1", "--workers", "0", "--no-baseline"]
MODEL = {"resnet50": [], "vit": ["--width", "32"]}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_on_data_in_its_format(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name)
    where = tmp_path / "data"
    extra = ["--data-dir", str(where)]
    if recipe["data"] == "cifar10":
        write_cifar10(where, a_batch=8)
    elif recipe["data"] == "fashion-mnist":
        write_idx(where, compressed=True, train=40)
    elif recipe["data"] == "folder":
        write_folder(where)
        extra += ["--image-size", "32"]
    else:
        extra = ["--train-size", "40"]
    width = MODEL.get(recipe["model"], ["--width", "8"])
    drops = ["--lr-drops", "1"] if "lr_drops" in recipe else []
    out = tmp_path / "out"
    assert main(["train", "--recipe", name, *SMALL, *width, *drops, *extra, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["demp"]["steps"] == summary["demp"]["total_steps"] > 0
    for key in ("optimizer", "label_smoothing", "lr_schedule", "ramp", "peak_penalty", "momentum", "weight_decay"):
        if key in recipe:
            assert summary["settings"][key] == recipe[key]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_within_limits(name: str, tmp_path: Path) -> None:
    settings = TrainSettings(**{"data_dir": tmp_path, "device": "cpu", **read_recipe(name)}).resolved()
    assert settings.epochs >= 1 and settings.peak_penalty > 0


def test_recipes_of_the_paper() -> None:
    """Values of arXiv 2403.07688: optimisers, rates, epochs, batches, the share of the run that the penalty's cycle takes."""
    resnet = TrainSettings(**read_recipe("resnet18-cifar10-sgd"))
    assert (resnet.optimizer, resnet.lr, resnet.momentum, resnet.weight_decay) == ("sgd", 0.1, 0.9, 5e-4)
    assert (resnet.epochs, resnet.batch_size, resnet.lr_drops, resnet.lr_factor) == (250, 128, (77, 154, 231), 0.2)
    assert resnet.ramp == pytest.approx(85_000 / 97_656, abs=1e-4)
    assert TrainSettings(**read_recipe("resnet18-cifar10-adamw")).lr == 0.005
    vgg = TrainSettings(**read_recipe("vgg16-cifar10-adamw"))
    assert (vgg.optimizer, vgg.lr, vgg.epochs, vgg.batch_size, vgg.prune_every) == ("adamw", 0.005, 80, 256, 1000)
    imagenet = TrainSettings(**read_recipe("resnet50-imagenet"))
    assert (imagenet.lr_drops, imagenet.lr_factor, imagenet.label_smoothing) == ((30, 70, 90), 0.1, 0.1)
    assert imagenet.weight_decay == 1e-4 and imagenet.ramp == pytest.approx(150_000 / 500_456, abs=1e-4)


def test_flags_win_over_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({
        "about": "mine", "model": "mlp", "width": 16, "epochs": 2, "optimizer": "sgd", "lr": 0.1, "train_size": 128,
    }))
    out = tmp_path / "out"
    assert main(["train", "--recipe", str(file), "--epochs", "1", "--no-baseline", "--out", str(out)]) == 0
    settings = json.loads((out / "summary.json").read_text())["settings"]
    assert (settings["epochs"], settings["optimizer"], settings["width"]) == (1, "sgd", 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "recipe must be a .json file or one of resnet18-cifar10-adamw"),
        ("[1]", "recipe must be a JSON object of settings, got list"),
        ("{", "recipe cannot be read"),
        ('{"learning_rate": 1}', "recipe has an unknown setting 'learning_rate'"),
        ('{"epochs": "ten"}', "recipe setting epochs must be int | None, got 'ten'"),
        ('{"lr_drops": [1.5]}', "recipe setting lr_drops must be tuple[int, ...], got [1.5]"),
        ('{"lr_schedule": "steps"}', "lr-drops go with lr-schedule steps"),
        ('{"optimizer": "lion"}', "optimizer must be one of adamw, sgd, got 'lion'"),
        ('{"warm_up": 1.0}', "warm-up must be at least 0 and below 1, got 1.0"),
        ('{"ramp": 0.0}', "ramp must be above 0 and at most 1, got 0.0"),
        ('{"lr_factor": 2}', "lr-factor must be above 0 and at most 1, got 2"),
    ],
)
def test_wrong_recipes(content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wrong.json"
    if content is not None:
        file.write_text(content)
    assert main(["train", "--recipe", str(file if content is not None else "resnet-18"), "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_decoupled_sgd_against_its_formula() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = DecoupledSGD([p], lr=0.1, momentum=0.9, weight_decay=0.05, fused=True)
    expected, velocity = p.detach().clone(), torch.zeros(5, dtype=torch.float64)
    for _ in range(4):
        gradient = torch.randn(5, dtype=torch.float64)
        p.grad = gradient.clone()
        optimizer.step()
        velocity = 0.9 * velocity + gradient
        expected = expected * (1 - 0.1 * 0.05) - 0.1 * velocity
        torch.testing.assert_close(p.detach(), expected)


def test_decoupled_sgd_decays_nothing_in_a_step_that_overflows() -> None:
    p = torch.nn.Parameter(torch.ones(5))
    settings = TrainSettings(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.05, amp="fp16")
    optimizer = build_optimizer(settings, [p])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number, expected in (("inf", 1.0), ("0", 1 - 0.1 * 0.05)):
        scaler.scale((p * float(number)).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        torch.testing.assert_close(p.detach(), torch.full((5,), expected))


def rates(total: int = 100, **settings: object) -> list[float]:
    chosen = TrainSettings(**{"epochs": 10, "lr": 0.5, "warm_up": 0.0, **settings})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = build_schedule(chosen, optimizer, total)
    found = []
    for _ in range(total):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("total", "warm_up"), [(4, 0.2), (9, 0.1), (100, 0)])
def test_a_cycle_without_a_step_to_rise_in_falls_from_the_first_on(total: int, warm_up: float) -> None:
    found = rates(total, lr_schedule="one-cycle", warm_up=warm_up)
    assert 0.45 < found[0] <= 0.5 and found == sorted(found, reverse=True) and found[-1] < 0.1


def test_learning_rates() -> None:
    steps = rates(lr_schedule="steps", lr_drops=(3, 7), lr_factor=0.2)
    assert steps == pytest.approx([0.5] * 30 + [0.1] * 40 + [0.02] * 30)
    warm = rates(lr_schedule="constant", warm_up=0.05)
    assert warm == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5] + [0.5] * 95)
    cycle = rates(lr_schedule="one-cycle", warm_up=0.2)
    assert max(cycle) == pytest.approx(0.5, rel=1e-3) and cycle.index(max(cycle)) in (19, 20) and cycle[-1] < 0.01


def test_a_preset_goes_over_the_recipe_and_under_the_flags() -> None:
    chosen = Namespace(recipe="resnet18-cifar10-adamw", preset="fast", steer_until=0.4)
    settings, recipe = settings_from(chosen).resolved(), read_recipe("resnet18-cifar10-adamw")
    assert settings.target_flops == 0.2 and settings.steer_until == 0.4 and settings.epochs == recipe["epochs"]
    assert (settings.peak_penalty, settings.prune_every, settings.criterion) == (0.0, None, "window")
    paper = settings_from(Namespace(recipe="resnet18-cifar10-adamw")).resolved()
    assert paper.target_flops is None and paper.peak_penalty > 0
