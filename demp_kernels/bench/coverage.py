"""`demp coverage`: which models can be compacted, how far, and how exactly.

For every model: random weights in float64, a random half of the units of each activation made zero for good (by a hook on the
activation), the output before; then `compact`, and the output after. What the analysis gets wrong shows as an error far above
rounding, a failed forward or a failed backward; what it cannot follow shows as units that stay, with the reason.
"""
from __future__ import annotations

import csv
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..compaction import CompactionError, CompactionReport, compact
from ..graph import AnalysisError, PrepareError, UnitGraph, prepare
from ..modules import DemPActivation

__all__ = ["CoverageRow", "cover", "read_coverage", "write_coverage"]

SHARE = 0.5
"""Of the units of every activation, those made zero."""
SEED = 0


@dataclass(frozen=True)
class CoverageRow:
    """One model. units: of all activations. removable: that would go if all were zero. dead: made zero. removed: of these.
    eval_error, train_error: largest difference of the outputs after and before, relative to the largest output; empty
    where it does not apply. kept: why units stay, most frequent first. refused: the error, if it was refused or failed."""

    model: str
    prepared: bool
    units: int = 0
    removable: int = 0
    dead: int = 0
    removed: int = 0
    params_before: int = 0
    params_after: int = 0
    eval_error: float | None = None
    train_error: float | None = None
    seconds: float = 0.0
    kept: str = ""
    refused: str = ""


def cover(name: str, build: Callable[[], nn.Module], images: Tensor) -> CoverageRow:
    """Compact one model with half of its units zero, and compare. Never raises for a model that fails: the row says so.

    images: float32; the model sees them in float64.
    """
    began = time.perf_counter()
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _shaken(build()).double()
        images = images.double()
        try:
            model, prepared = prepare(model, images, fuse=False), True
        except PrepareError:
            prepared = False
        try:
            row = _compacted(name, prepared, model, images)
        except (AnalysisError, CompactionError, RuntimeError, ValueError) as error:
            row = CoverageRow(name, prepared, refused=" ".join(str(error).split())[:300])
    return CoverageRow(**{**asdict(row), "seconds": time.perf_counter() - began})


def _compacted(name: str, prepared: bool, model: nn.Module, images: Tensor) -> CoverageRow:
    graph = UnitGraph.trace(model, images)
    total = sum(graph.units.values())
    most = graph.keep({key: torch.ones(count, dtype=torch.bool) for key, count in graph.units.items()})
    removable = total - sum(int(most.atoms[a.atoms].sum()) for a in graph.activations)
    dead = _choice(model, graph)
    with _silenced(model, graph, dead):
        before = [_outputs(model, images, training) for training in (False, True)]
    report = compact(model, None, images, dead=dead, graph=graph)
    left = {key: mask[torch.from_numpy(graph.unit_ids[key])] for key, mask in dead.items()}
    with _silenced(model, graph, left):  # those that other layers need stay, and stay zero
        after = [_outputs(model, images, training) for training in (False, True)]
    errors = [_error(a, b) for a, b in zip(after, before)]
    _require_gradients(model, images)
    return CoverageRow(
        name, prepared, total, removable, sum(int(mask.sum()) for mask in dead.values()), sum(report.removed.values()),
        report.params_before, report.params_after, *errors, kept=_reasons(report),
    )


def _shaken(model: nn.Module) -> nn.Module:
    """Parameters and statistics that differ from channel to channel, and nothing random in the forward. A head that is
    zero at first, or a layer scale of 1e-6, would hide every mistake behind it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                for tensor in (module.weight, module.running_var):
                    if tensor is not None:
                        tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    if tensor is not None:
                        tensor.normal_(0, 0.1)
            if isinstance(getattr(module, "p", None), float):
                module.p = 0.0  # dropout, stochastic depth: another number of channels draws other random numbers
    return model


def _choice(model: nn.Module, graph: UnitGraph) -> dict[str, Tensor]:
    """Which units are made zero: of activations that are modules, a hook on a function call not being possible."""
    generator = torch.Generator().manual_seed(SEED)
    modules = dict(model.named_modules())
    return {
        a.name: torch.rand(a.atoms.size, generator=generator) < SHARE
        for a in graph.activations if a.module in modules
    }


@contextmanager
def _silenced(model: nn.Module, graph: UnitGraph, dead: dict[str, Tensor]) -> Iterator[None]:
    """The model with the outputs of its dead units set to zero."""
    handles = []
    for module, calls in graph.calls_of(model).items():
        if calls[0].name in dead:
            handles.append(module.register_forward_hook(_silence([dead[call.name] for call in calls])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _silence(calls: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that zeroes the units of the first call, of the second, ... of every forward."""
    made = 0

    def hook(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        nonlocal made
        mask = calls[made % len(calls)]
        made += 1
        dim = module.channel_dim if isinstance(module, DemPActivation) else 1
        if output.shape[dim] != mask.numel():
            dim = -1
        shape = [1] * output.dim()
        shape[dim] = -1
        return output * (~mask).to(output.dtype).view(shape)

    return hook


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor, training: bool) -> list[Tensor]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        return [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor)]
    finally:
        model.load_state_dict(state)  # running statistics: both forwards in training start from the same
        for module, mode in modes:
            module.training = mode


def _error(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Raises RuntimeError for outputs that do not vary: they would be equal whatever the compaction did."""
    if any(float(b.std()) <= 1e-6 * float(b.abs().max()) for b in before):
        raise RuntimeError("the outputs do not depend on anything: nothing can be compared")
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True))


def _require_gradients(model: nn.Module, images: Tensor) -> None:
    """One backward pass through what is left: its shapes have to fit too."""
    model.train()
    outputs = [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            raise RuntimeError(f"the gradient of {name} is not finite after the compaction")


def _reasons(report: CompactionReport) -> str:
    """The reasons without their numbers, and how many activations each stopped. Modules that run the same line of source
    count as one."""
    counted = Counter(re.sub(r" in \S+ \(", " (", text.split(": ", 1)[-1]) for text in report.kept.values())
    return "; ".join(f"{text} ({count}x)" for text, count in counted.most_common(3))


# --- files -----------------------------------------------------------------------------------------------------------


def write_coverage(folder: Path, rows: Sequence[CoverageRow], facts: str) -> None:
    """coverage.csv and coverage.md in `folder`. facts: versions and date, for the heading."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "coverage.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(CoverageRow))
        writer.writerows(["" if value is None else value for value in astuple(row)] for row in rows)
    (folder / "coverage.md").write_text(f"# Models that can be compacted\n\n{facts}\n\n{__doc__.split('.', 1)[1].strip()}\n\n"
                                        + "\n".join(markdown(rows)) + "\n")


def read_coverage(path: Path) -> list[CoverageRow]:
    """Rows of a coverage.csv."""
    kinds = {"model": str, "kept": str, "refused": str, "prepared": lambda text: text == "True"}
    floats = ("eval_error", "train_error", "seconds")
    with path.open(newline="") as file:
        return [
            CoverageRow(**{
                key: kinds[key](text) if key in kinds else (float(text) if text else None) if key in floats else int(text)
                for key, text in line.items()
            })
            for line in csv.DictReader(file)
        ]


def markdown(rows: Sequence[CoverageRow]) -> list[str]:
    lines = [
        "| model | units | removable | made zero | removed | parameters | error, eval | error, train | units that stay: why |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --- |",
    ]
    return lines + ["| " + " | ".join(cells(row)) + " |" for row in rows]


def cells(row: CoverageRow) -> list[str]:
    """A row as texts, in the order of `markdown`'s columns."""
    if row.refused:
        return [row.model, *[""] * 7, f"refused: {row.refused}".replace("|", "/")]
    share = f"{row.params_before:,} -> {row.params_after:,}"
    errors = ["" if error is None else f"{error:.0e}" for error in (row.eval_error, row.train_error)]
    numbers = [f"{n:,}" for n in (row.units, row.removable, row.dead, row.removed)]
    return [row.model, *numbers, share, *errors, row.kept.replace("|", "/")]
