"""`compact`: dead units out of a model, its optimiser and its gradients, or not at all."""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ..arguments import require_module, require_not_negative
from ..graph import AnalysisError, UnitGraph, remembered_inputs
from ..graph.reasons import explain
from ..modules import DemPActivation, SelectiveAdd
from .batches import as_batches
from .fold import Folding
from .optimizer import as_optimizers
from .plan import CompactionError
from .removal import Removal
from .report import CompactionReport

__all__ = ["as_followers", "check_followers", "compact", "counted_dead"]


def compact(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    example_inputs: Any = None,
    *,
    dead: Mapping[str, Tensor] | None = None,
    round_to: int | str = 1,
    min_units: int = 1,
    graph: UnitGraph | None = None,
    followers: nn.Module | Sequence[nn.Module] | None = None,
    fold_batches: Any = None,
    max_change: float = float("inf"),
) -> CompactionReport:
    """Remove dead units from `model` and everything that belongs to them from its optimiser.

    A unit whose output is zero goes without a change of the function: with it go the rows and columns of the weights,
    BatchNorm's entries, gradients and optimiser moments. Parameters stay the same objects. Planned and tried on fake
    tensors first: a refusal changes nothing.

    Args:
        optimizer: one, several, or none. Optimisers with parameter-shaped state (Adam family, SGD momentum, RMSprop, ...).
        example_inputs: a tensor or a tuple, for the analysis; not needed for a prepared model or with `graph`.
        dead: activation name -> (units,) bool, True for units whose output is zero on everything. By default what the
            counters of the DemP activations say. A path of a module that is called several times means all its calls.
        round_to: keep dead units so that widths are multiples of it. "auto": 8 for half precision on CUDA (tensor cores), the
            SIMD block of oneDNN's kernels on the CPU (16 with AVX-512, else 8), 1 elsewhere: time jumps behind a multiple
            of it. On the CPU that was no gain over 1: as fast in NCHW, slower in channels_last (see `width_step`).
        min_units: units that every activation keeps at least.
        graph: a `UnitGraph` of the model, to be used again; it follows the compaction.
        followers: copies of the model that are to be cut alike: an `AveragedModel` (EMA, SWA), a teacher, or several.
        fold_batches: for dead units that are constant or nearly so instead of zero (a scale of zero and a shift behind a
            smooth activation, tails of GELU, SiLU, leaky ReLU): batches of inputs (tensors, or tuples of positional
            arguments), or a function that returns them. The model runs on them in evaluation mode, and the mean of what each
            linear layer and convolution loses goes into its bias, or off the running mean of the BatchNorm behind it.
            Constant units so go exactly. Where no bias can do that, because what a layer loses differs from position to
            position (borders of zero padding), one of them stays and its weights take the others' place, or all stay, if
            that is not exact either. Constant is what is the same in all samples; these lie along the first dimension, and
            two are enough. The report's `folded` tells, layer by layer, what change is left. A unit that something else
            reads (an addition, a layer without bias) stays, with the reason.
            Without: units are removed as if they were zero. In training a constant may be another one: dropout in front of
            the reader scatters it, a gate scales it with the batch's statistics.
        max_change: with `fold_batches`: a layer whose output would change by more than this share of its standard deviation
            keeps some of its inputs that are not zero, those that it changes most without. 1e-9, say, lets only constants go.

    Raises:
        CompactionError: the model or the optimiser cannot be shrunk; nothing was changed.
        ValueError, TypeError: wrong arguments.

    In a model that changes, a strided 1x1 nn.Conv2d of fewer than 16 inputs becomes a `SubsampledConv2d`, the same object,
    function and `state_dict` keys: its weight gradient in channels_last on the CPU is broken (oneDNN#6035). On the CPU
    removals also leave such layers the inputs that they need; a subclass and a functional call have only that.
    """
    start = time.perf_counter()
    model, optimizers = _checked(model), as_optimizers(optimizer)
    step = width_step(model) if round_to == "auto" else round_to
    for name, number in (("round_to", step), ("min_units", min_units)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {number!r}")
    assert isinstance(step, int)  # for mypy
    if dead is None:
        _require_counters(model)
    copies = as_followers(followers)
    require_not_negative("max_change", max_change)
    batches = None if fold_batches is None else as_batches(fold_batches)
    if graph is not None and not isinstance(graph, UnitGraph):
        raise TypeError(f"graph must be a UnitGraph, got {type(graph).__name__}")
    graph = graph if graph is not None else _analyse(model, example_inputs)
    analysed = time.perf_counter()
    dead = counted_dead(model, graph) if dead is None else dead
    before, parameters = graph.units, sum(p.numel() for p in model.parameters())
    folding = None if batches is None else Folding(
        [model, *copies], graph, dead, batches, round_to=step, min_units=min_units, max_change=max_change
    )
    keep = graph.keep(dead, round_to=step, min_units=min_units) if folding is None else folding.keep
    kept = {**explain(graph, graph.masks(dead), keep), **({} if folding is None else folding.kept)}
    removal = Removal(model, graph, keep, optimizers=optimizers, followers=copies, folding=folding)
    planned = time.perf_counter()
    freed = removal.carry_out()
    committed = time.perf_counter()
    after = graph.units
    return CompactionReport(
        live_units=after,
        total_units=dict(graph.total_units),
        removed={name: before[name] - after[name] for name in after if before[name] != after[name]},
        kept=kept,
        params_before=parameters,
        params_after=sum(p.numel() for p in model.parameters()),
        bytes_freed=freed,
        seconds=time.perf_counter() - start,
        plan_seconds=planned - analysed,
        commit_seconds=committed - planned,
        folded={} if folding is None else folding.folded,
        notes=[f"{name}: never used by the forward" for name in graph.untraced],
    )


def counted_dead(model: nn.Module, graph: UnitGraph) -> dict[str, Tensor]:
    """Dead units by the counters: looked at and never active since they were reset."""
    dead = {}
    for module, calls in graph.calls_of(model).items():
        if isinstance(module, DemPActivation) and (mask := module.dead()) is not None:
            # the counter of several calls is their sum: zero only where all were silent
            dead.update({call.name: mask for call in calls if call.atoms.size == mask.numel()})
    return dead


def width_step(model: nn.Module) -> int:
    """The width in whose steps the time of a layer rises on the model's device and precision.

    A table of this machine, measured when asked for, would not choose better than "as it is". A 3x3 convolution, 14x14, batch
    64, forward and backward, float32, AVX-512, two cores, ms a step at so many channels (inputs and outputs):

                       8     9    15    16    17    24    31    32    33    48    49    63    64
        channels_last  0.40  0.43  0.66  0.59  1.01  1.31  1.77  1.70  2.58  3.42  4.74  6.80  6.55
        NCHW           0.55  0.84  0.90  0.69  2.35  2.28  2.53  2.30  4.68  4.75  8.03  8.56  8.47

    All widths from 1 to 64 together, each rounded up, take in channels_last 1.04 to 1.05 times their own time (steps of 4),
    1.08 to 1.10 (8), 1.17 to 1.20 (16), and in NCHW 0.97 to 1.01 with any of them, with one thread and with two, each
    measured twice: time jumps behind a block, but rises within it too in channels_last, and what rounding up gains at 15 or
    31 channels it loses at 9 or 17. So rounding saves nothing here, and a table would tell 1, or noise.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        return 1
    if parameter.device.type == "cpu":
        return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    half = parameter.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(parameter.device.type)
    return 8 if parameter.device.type == "cuda" and half else 1


def as_followers(followers: Any) -> list[nn.Module]:
    """Copies of the model out of what wraps them. Raises TypeError for what is no module."""
    several = isinstance(followers, Sequence) and not isinstance(followers, str)
    found = [] if followers is None else list(followers) if several else [followers]
    for one in found:
        if not isinstance(one, nn.Module):
            raise TypeError(f"followers must be a module or a list of modules, got {type(one).__name__}")
    return [_unwrapped(one) for one in found]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile, data parallelism and averages, however they are nested."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (AveragedModel, DataParallel, DistributedDataParallel)):
            model = model.module
        else:
            return model


def check_followers(model: nn.Module, followers: Sequence[nn.Module]) -> None:
    """Raises ValueError if one of `as_followers` has not the parameters and additions that the model has."""
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    additions = {name for name, module in model.named_modules() if isinstance(module, SelectiveAdd)}
    for number, follower in enumerate(followers):
        found = {name: p.shape for name, p in follower.named_parameters(remove_duplicate=False)}
        for name in shapes:
            if found.get(name) != shapes[name]:
                raise ValueError(
                    f"followers[{number}] must be a copy of the model: {name} is {tuple(shapes[name])} in the model, "
                    f"{tuple(found[name]) if name in found else 'missing'} in it"
                )
        if missing := additions - {name for name, module in follower.named_modules() if isinstance(module, SelectiveAdd)}:
            raise ValueError(
                f"followers[{number}] must be a copy of the model: it has no {min(missing)}; copy the model that prepare() returned"
            )


def _checked(model: nn.Module) -> nn.Module:
    require_module("model", model)
    return getattr(model, "_orig_mod", model)  # torch.compile's wrapper


def _require_counters(model: nn.Module) -> None:
    if not any(isinstance(module, DemPActivation) for module in model.modules()):
        raise ValueError(
            f"dead is required for a model without DemP activations, got None for {type(model).__name__}"
        )


def _analyse(model: nn.Module, example_inputs: Any) -> UnitGraph:
    inputs = remembered_inputs(model) if example_inputs is None else example_inputs
    if inputs is None:
        raise ValueError("example_inputs is required for a model that was not made by prepare(), got None")
    try:
        return UnitGraph.trace(model, inputs)
    except AnalysisError as error:
        raise CompactionError(str(error)) from error
