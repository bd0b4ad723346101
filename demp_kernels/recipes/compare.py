"""`demp compare`: DemP, the dense network and rival pruning methods over seeds and sparsities; resumable run by run."""
from __future__ import annotations

import gc
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import nn

from ..graph import finalize
from .data import ImageData
from .errors import RecipeError, need
from .loop import RunResult, Training, Watcher, new_model, read_data, warm_up
from .machine import machine_facts, prepare_machine, versions
from .methods import Demon, Dense, Method
from .outside import OUTSIDE, TorchPruning
from .resume import FREE
from .rivals import RIVALS, Rival
from .settings import PRESETS, TrainSettings

__all__ = ["METHODS", "Comparison", "Run", "compare", "table_rows"]

DEMP = ("demp", "demp-fast")
"""The open loop of a peak penalty, and the closed loop of a budget: `--preset fast`."""
METHODS = ("dense", *DEMP, *RIVALS, *OUTSIDE)
OURS = ("dense", "demp", *RIVALS)
"""Compared by default."""
SETTINGS_FILE = "comparison.json"


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    methods: of `METHODS`. seeds: runs of each, with seeds 0, 1, ... peak_penalties: a "demp" run for each. target_flops,
    target_sparsities: a "demp-fast" run for each, the share of the operations that it steers to, or of the parameters that
    is to go; both empty: the preset's. sparsities: parameter sparsities of the rivals; empty: each DemP run's own, so that
    they are matched seed by seed. fast: what the demp-fast runs change in the settings. dense_lr: learning rate of the dense
    runs; None: that of all.
    """

    methods: tuple[str, ...] = OURS
    seeds: int = 3
    peak_penalties: tuple[float, ...] = ()
    target_flops: tuple[float, ...] = ()
    target_sparsities: tuple[float, ...] = ()
    sparsities: tuple[float, ...] = ()
    fast: Mapping[str, Any] = field(default_factory=lambda: PRESETS["fast"])
    dense_lr: float | None = None

    def check(self) -> None:
        """Raises RecipeError for a wrong choice."""
        for method in self.methods:
            if method not in METHODS:
                raise RecipeError(f"methods must be of {', '.join(METHODS)}, got {method!r}")
            if method in OUTSIDE:
                need("torch_pruning", f"the method {method}")  # now rather than when hours of training are done
        if not self.methods:
            raise RecipeError("methods must be one or more, got none")
        if len(set(self.methods)) < len(self.methods):
            raise RecipeError(f"methods must be different ones, got {' '.join(self.methods)}")
        if self.dense_lr is not None and not 0 < self.dense_lr < math.inf:
            raise RecipeError(f"dense-lr must be above 0 and finite, got {self.dense_lr}")
        if self.seeds < 1:
            raise RecipeError(f"seeds must be at least 1, got {self.seeds}")
        for penalty in self.peak_penalties:
            if not penalty > 0:
                raise RecipeError(f"peak-penalty must be above 0, got {penalty}")
        given = {
            "target-flops": self.target_flops, "target-sparsity": self.target_sparsities, "sparsity": self.sparsities
        }
        for name, shares in given.items():
            for share in shares:
                if not 0 < share < 1:
                    raise RecipeError(f"{name} must be between 0 and 1, got {share}")
        for name, values in {"peak-penalty": self.peak_penalties, **given}.items():
            written = [f"{value:g}" for value in values]  # in the names of levels and files
            if len(set(written)) < len(written):
                raise RecipeError(f"{name} must be different in six digits, got {' '.join(map(str, values))}")
        for name, values in (("target-flops", self.target_flops), ("target-sparsity", self.target_sparsities)):
            if values and "demp-fast" not in self.methods:
                raise RecipeError(f"{name} is of the method demp-fast: methods must have it, got {' '.join(self.methods)}")
        if not self.sparsities and not set(DEMP) & set(self.methods) and set(self.methods) - {"dense"}:
            raise RecipeError("sparsity is required where demp, whose sparsity the others would match, is not compared")


@dataclass
class Run:
    """One finished run of the comparison.

    level: "" (dense), "penalty 0.03", "flops 0.2", "sparsity 0.9" (DemP's peak or budget), "sparsity 0.9" (a rival's) or
        "as flops 0.2" (a rival at the sparsity of that DemP run).
    train_flops: of the training steps, three forward passes each; the passes in which rivals score are in the seconds alone.
    sparsity, neuron_sparsity: shares of the dense network's parameters and units that are gone; None where a method does not
        tell its units.
    inference_ms: median of a batch of up to 128 test images, without gradients, of the finished plain network.
    """

    method: str
    level: str
    seed: int
    accuracy: float
    sparsity: float
    neuron_sparsity: float | None
    train_flops: int
    train_seconds: float
    inference_ms: float
    result: RunResult
    machine: str = ""
    """What it ran on: seconds of two machines are not compared."""

    @property
    def file(self) -> str:
        parts = [self.method, self.level.replace(" ", "-"), f"seed-{self.seed}"]
        return "-".join(filter(None, parts)) + ".json"

    def save(self, folder: Path) -> None:
        _write_whole(folder / self.file, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, file: Path) -> Run:
        try:
            content = json.loads(file.read_text())
            result = RunResult(**content.pop("result"))
            result.units = [(step, live) for step, live in result.units]
            return cls(**content, result=result)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise RecipeError(f"out has a damaged run, {file}; remove it to repeat it ({error})") from error


def compare(settings: TrainSettings, comparison: Comparison) -> list[Run]:
    """Make the runs that `out` does not have yet, one after the other, and write tables, figures and comparison.html.

    Stopped at any moment and called again with the same settings, it goes on behind the last finished run. A run that fails,
    as one whose loss is not finite does, costs the others nothing but what was to match its sparsity. Raises RecipeError, in
    one line, for what cannot be compared, an `out` of another comparison, and at the end if runs have failed.
    """
    for module in ("rich", "matplotlib"):
        need(module, "demp compare")
    from rich.console import Console

    from . import comparison_report
    from .progress import ProgressDisplay

    comparison.check()
    for name in ("target_flops", "target_sparsity"):
        if getattr(settings, name) is not None:
            flag = name.replace("_", "-")
            raise RecipeError(f"recipe: it must have no {flag}, got {getattr(settings, name)}; --{flag} is of the method demp-fast")
    settings = settings.resolved()
    device = torch.device(settings.device)
    prepare_machine(device, settings.threads)
    console = Console()
    data = read_data(settings)
    warm_up(settings, data)
    folder = _runs_folder(settings, comparison)
    runs: list[Run] = []
    failures: list[str] = []
    facts = machine_facts(device)
    machine = ", ".join((
        facts.get("gpu") or f"{facts['processor']} with {facts['vector_instructions']}", f"{facts['threads']} threads",
        f"torch {torch.__version__}",
    ))
    facts |= versions()
    planned = _count(settings, comparison)
    for number, (method, level, seeded) in enumerate(_plan(settings, comparison, runs), start=1):
        wanted = Run(method.name, level, seeded.seed, 0, 0, 0, 0, 0, 0, RunResult(method.name))
        name = f"{' '.join(filter(None, (method.name, level)))}, seed {seeded.seed}"
        headline = f"run {number} of {planned}: {name}"
        if (folder / wanted.file).is_file():
            runs.append(Run.load(folder / wanted.file))
            console.print(f"{headline}: there already", highlight=False)
            continue
        console.print(headline, highlight=False)
        try:
            with ProgressDisplay(console) as progress:
                run = replace(_run(method, level, seeded, [progress]), machine=machine)
        except RecipeError as error:
            failures.append(f"{name}: {error}")
            console.print(f"failed: {error}", highlight=False, soft_wrap=True)
            continue
        finally:
            gc.collect()  # a finished training is a cycle: its memory and its data's workers are not for the next one
        run.save(folder)
        runs.append(run)
        comparison_report.write(settings.out, settings, runs, facts)  # a report of what there is, from the first run on
    if not runs:
        raise RecipeError(f"no run could be made: {failures[0]}")
    comparison_report.write(settings.out, settings, runs, facts)
    console.print(comparison_report.terminal_table(runs))
    console.print(f"written to {settings.out}: comparison.html, table.md, table.csv, runs.csv, figures", soft_wrap=True)
    if failures:
        raise RecipeError(f"{len(failures)} of {planned} runs failed, the first of them {failures[0]}")
    return runs


def _plan(
    settings: TrainSettings, comparison: Comparison, runs: list[Run]
) -> Iterator[tuple[Method, str, TrainSettings]]:
    """The runs in order. DemP goes first in each seed: the others match the sparsity it reached, found in `runs`."""
    for seed in range(comparison.seeds):
        seeded = replace(settings, seed=seed)
        if "dense" in comparison.methods:
            yield Dense(), "", seeded if comparison.dense_lr is None else replace(seeded, lr=comparison.dense_lr)
        targets = {f"sparsity {sparsity:g}": sparsity for sparsity in comparison.sparsities}
        for name, level, changes in _demp_runs(settings, comparison):
            yield Demon(name), level, replace(seeded, **changes)
            if not comparison.sparsities and runs and (runs[-1].method, runs[-1].level, runs[-1].seed) == (name, level, seed):
                targets[f"as {level}"] = runs[-1].sparsity
        for level, sparsity in targets.items():
            for name in comparison.methods:
                if name in RIVALS:
                    yield Rival(name, sparsity), level, seeded
                elif name in OUTSIDE:
                    yield TorchPruning(name, sparsity), level, seeded


def _demp_runs(settings: TrainSettings, comparison: Comparison) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, level, what it changes in the settings) of DemP's runs with one seed."""
    runs: list[tuple[str, str, dict[str, Any]]] = []
    if "demp" in comparison.methods:
        for penalty in comparison.peak_penalties or (settings.peak_penalty,):
            runs.append(("demp", f"penalty {penalty:g}", {"peak_penalty": penalty}))
    if "demp-fast" in comparison.methods:
        fast = {**comparison.fast, "steer_until": settings.steer_until}
        shares = comparison.target_flops or (() if comparison.target_sparsities else (PRESETS["fast"]["target_flops"],))
        for share in shares:
            runs.append(("demp-fast", f"flops {share:g}", {**fast, "target_flops": share}))
        for share in comparison.target_sparsities:
            runs.append(("demp-fast", f"sparsity {share:g}", {**fast, "target_flops": None, "target_sparsity": share}))
    return runs


def _count(settings: TrainSettings, comparison: Comparison) -> int:
    demp = len(_demp_runs(settings, comparison))
    rivals = sum(name not in ("dense", *DEMP) for name in comparison.methods)
    return comparison.seeds * (("dense" in comparison.methods) + demp + rivals * (len(comparison.sparsities) or demp))


def _run(method: Method, level: str, settings: TrainSettings, watchers: list[Watcher]) -> Run:
    data = read_data(settings)
    training = Training(settings, method, data, watchers)
    dense = training.result.params if method.name == "dense" else _dense_parameters(settings, data)
    result = training.run()
    live, total = sum(result.live.values()), sum(result.total.values())
    untold = 0.0 if method.name == "dense" else None
    model = training.model if method.name == "dense" else finalize(training.model)
    images = next(iter(data.test))[0][:128].contiguous(memory_format=training.layout)
    return Run(
        method.name, level, settings.seed, result.accuracy, 1 - result.params / dense, 1 - live / total if total else untold,
        result.train_flops, result.train_seconds, 1e3 * _inference_seconds(model, images), result,
    )


def _dense_parameters(settings: TrainSettings, data: ImageData) -> int:
    return sum(p.numel() for p in new_model(settings, data).parameters())


@torch.no_grad()
def _inference_seconds(model: nn.Module, images: torch.Tensor) -> float:
    model.eval()
    seconds = []
    for _ in range(18):
        began = time.perf_counter()
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        seconds.append(time.perf_counter() - began)
    return median(seconds[3:])


def _runs_folder(settings: TrainSettings, comparison: Comparison) -> Path:
    """The folder of the runs in `out`, which may hold those of an earlier start of the same comparison only."""
    folder = settings.out / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"out cannot be made: {settings.out}: {error.strerror}") from error
    # what a run depends on; methods, seeds and levels may be added later
    free = {*FREE, "seed", "peak_penalty", "baseline"} - ({"data_dir"} if settings.data == "folder" else set())
    facts = {name: value for name, value in settings.as_json().items() if name not in free}
    facts |= {"torch_threads": torch.get_num_threads(), "dense_lr": comparison.dense_lr}
    if "demp-fast" in comparison.methods:
        # budgets are levels, and where they end is a setting above
        own = PRESETS["fast"].keys() - free - {"target_flops", "steer_until"}
        facts["fast"] = {name: comparison.fast.get(name, getattr(settings, name)) for name in sorted(own)}
    facts = json.loads(json.dumps(facts))
    file, written = settings.out / SETTINGS_FILE, {}
    if file.is_file():
        # a setting that is not there had its default: it came with a later version; those of `fast` are not known before the first
        defaults = json.loads(json.dumps({**TrainSettings().as_json(), "fast": facts.get("fast")}))
        try:
            written = json.loads(file.read_text())
            before = {**defaults, **written}
        except (ValueError, TypeError) as error:
            raise RecipeError(f"out has a damaged {SETTINGS_FILE}: {file}") from error
        for name in facts:
            if before.get(name) != facts[name]:
                raise RecipeError(
                    f"out has a comparison with {name} {before.get(name)}, got {facts[name]}: choose another --out"
                )
    if not facts.items() <= written.items():
        _write_whole(file, json.dumps({**written, **facts}, indent=2) + "\n")
    return folder


def _write_whole(file: Path, text: str) -> None:
    """Whole or not at all, so that a kill leaves nothing half written."""
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    os.replace(part, file)


COLUMNS = (
    "method", "level", "runs", "accuracy", "accuracy_std", "sparsity", "neuron_sparsity", "train_flops", "train_seconds",
    "train_seconds_std", "speedup", "inference_ms",
)
"""Columns of table.csv: means over the seeds; ..._std: sample standard deviation (0 for one run); seconds and milliseconds: of the
machine that made most of the runs; speedup: mean over the seeds of dense train_seconds / train_seconds, empty without a dense run of
that seed on that machine; neuron_sparsity: empty where a method does not tell its units."""


def table_rows(runs: list[Run]) -> list[dict[str, Any]]:
    """A row for each method and level, in the order in which they were first run."""
    dense = {(run.seed, run.machine): run.train_seconds for run in runs if run.method == "dense"}
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.level), []).append(run)
    rows = []
    for (method, level), group in groups.items():
        machine, _ = Counter(run.machine for run in group).most_common(1)[0]
        timed = [run for run in group if run.machine == machine]
        accuracy, seconds = [run.accuracy for run in group], [run.train_seconds for run in timed]
        pairs = [(dense.get((run.seed, run.machine)), run.train_seconds) for run in group]
        speedups = [before / after for before, after in pairs if before is not None]
        gone = [run.neuron_sparsity for run in group if run.neuron_sparsity is not None]
        rows.append({
            "method": method, "level": level, "runs": len(group), "accuracy": mean(accuracy),
            "accuracy_std": stdev(accuracy) if len(accuracy) > 1 else 0.0,
            "train_seconds_std": stdev(seconds) if len(seconds) > 1 else 0.0,
            **{name: mean(getattr(run, name) for run in group) for name in ("sparsity", "train_flops")},
            **{name: mean(getattr(run, name) for run in timed) for name in ("train_seconds", "inference_ms")},
            "neuron_sparsity": mean(gone) if gone else None,
            "speedup": mean(speedups) if speedups else None,
        })
    return rows
