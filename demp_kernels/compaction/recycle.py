"""Recycling: dead units start anew instead of being removed."""
from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..graph import UnitGraph
from ..modules import SelectiveAdd
from .optimizer import as_optimizers, plan_states
from .plan import CompactionError, Cut, Plan, make_plan

__all__ = ["recycle"]

KNOWN = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.PReLU)
"""Modules of which it is known which dimension makes a unit and which reads it, and how they start."""
FRESH = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum",
}
"""Optimiser state that starts as zeros (Adagrad's sum: as its initial_accumulator_value)."""


@torch.no_grad()
def recycle(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    graph: UnitGraph,
    dead: Mapping[str, Tensor],
    *,
    seed: int = 0,
) -> dict[str, int]:
    """Give dead units a new start (ReDo): incoming weights and norm entries as their modules initialise them, outgoing
    weights zero, and the optimiser's state of both zero. The function does not change, since nobody reads the units yet;
    the gradient of the outgoing weights brings them back.

    Units stay as they are where something else than a layer reads them, of which no weight can be made zero: a sum over units, a
    product, a residual sum with a selection, which would pass them on; and of a bare parameter it is not known what it does.

    Args:
        graph, dead: as for `compact`.
        seed: of the new weights; every rank must give the same. torch's generators are left alone.

    Returns activation -> units recycled, for those where there are any. Raises CompactionError, with nothing changed, for
    optimiser state of which it is not known how it starts.

    Source: Sokar et al., arXiv 2302.12902.
    """
    keep = graph.keep(dead, min_units=0)
    modules = dict(model.named_modules(remove_duplicate=False))
    for (name, _), atoms in graph.axes.items():
        if not isinstance(modules[name.rpartition(".")[0]], KNOWN):
            keep.atoms[atoms] = True
    keep.atoms[graph.flow.atom_of[graph.flow.foreign]] = True
    for selection in graph.selections:
        if isinstance(modules[selection.name], SelectiveAdd):
            keep.atoms[graph.flow.atoms(selection.skip)] = True
            keep.atoms[graph.flow.atoms(selection.out)] = True
    plan = make_plan(model, graph, keep)
    states = plan_states(as_optimizers(optimizer), plan.cuts)
    for state in states:
        if state.key not in FRESH:
            raise CompactionError(f"recycle: how the optimiser's state {state.key!r} of {state.cut.name} starts is not known")
    for cut in plan.cuts:
        if cut.blocks is not None and _makes_columns(modules, cut):
            raise CompactionError(f"recycle: {cut.name} must not be that of a grouped transposed convolution")
    start = {id(p): g.get("initial_accumulator_value", 0.0) for o in as_optimizers(optimizer) for g in o.param_groups for p in g["params"]}
    for cut, fresh in zip(plan.cuts, _fresh(modules, plan, seed)):
        _renew(cut.tensor, cut, _makes_columns(modules, cut), fresh)
    for state in states:
        zero = torch.full_like(state.state[state.key], start.get(id(state.cut.tensor), 0.0) if state.key == "sum" else 0.0)
        _set_all(state.state[state.key], state.cut, zero)
    counts = {a.name: int((~keep.atoms[a.atoms]).sum()) for a in graph.activations}
    return {name: count for name, count in counts.items() if count}


def _makes_columns(modules: Mapping[str, nn.Module], cut: Cut) -> bool:
    """Whether the weight's second dimension is the one that makes units."""
    return isinstance(modules[cut.name.rpartition(".")[0]], nn.modules.conv._ConvTransposeNd) and cut.tensor.dim() > 1


def _fresh(modules: Mapping[str, nn.Module], plan: Plan, seed: int) -> list[Tensor]:
    """What each tensor of the plan would be in a newly made module."""
    made: dict[str, nn.Module] = {}
    with _seeded(seed, {cut.tensor.device for cut in plan.cuts}):
        for cut in plan.cuts:
            path = cut.name.rpartition(".")[0]
            if path not in made:
                made[path] = copy.deepcopy(modules[path])
                reset = getattr(made[path], "reset_parameters", None)
                if reset is not None:
                    reset()
    leaves = [(cut.name.rpartition(".")[0], cut.name.rpartition(".")[2]) for cut in plan.cuts]
    return [getattr(made[path], leaf).detach() for path, leaf in leaves]


@contextmanager
def _seeded(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Inside, the generators of the CPU and of these GPUs start from `seed`; behind, they are as before. torch.manual_seed would
    seed those of all other devices as well, which nothing restores."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([], device_type="cpu"))
        torch.default_generator.manual_seed(seed)
        for device in devices:
            if device.type in ("cuda", "xpu"):
                stack.enter_context(torch.random.fork_rng([device.index], device_type=device.type))
                accelerator = torch.get_device_module(device.type)
                with accelerator.device(device.index):
                    accelerator.manual_seed(seed)
        yield


def _gone(kept: Tensor, size: int) -> Tensor:
    """The entries that are not in `kept`."""
    mask = torch.ones(size, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask.nonzero()[:, 0]


_Region = tuple[Tensor | None, Tensor | None]
"""Rows and columns of a tensor; None: all."""


def _regions(cut: Cut) -> tuple[list[_Region], list[_Region]]:
    """What a cut would remove, as ((rows, all), ...) and ((rows or all, columns), ...)."""
    size = cut.tensor.shape
    if cut.blocks is None:
        rows: list[_Region] = [(_gone(cut.index[0], size[0]), None)] if 0 in cut.index else []
        return rows, [(None, _gone(cut.index[1], size[1]))] if 1 in cut.index else []
    rows = [(_gone(torch.cat([rows for rows, _ in cut.blocks]), size[0]), None)]
    return rows, [(rows_, _gone(columns, size[1])) for rows_, columns in cut.blocks]


def _put(tensor: Tensor, rows: Tensor | None, columns: Tensor | None, value: Tensor) -> None:
    # an optimiser's state need not lie where its parameter does
    rows, columns = (None if at is None else at.to(tensor.device) for at in (rows, columns))
    if columns is None:
        tensor[rows] = value[rows]
    elif rows is None:
        tensor[:, columns] = value[:, columns]
    else:
        tensor[rows[:, None], columns] = value[rows[:, None], columns]


def _renew(tensor: Tensor, cut: Cut, swapped: bool, fresh: Tensor) -> None:
    """New incoming weights, then zero outgoing ones: those between two recycled units are both, and become zero."""
    rows, columns = _regions(cut)
    incoming, outgoing = (columns, rows) if swapped else (rows, columns)
    for where in incoming:
        _put(tensor, *where, fresh)
    for where in outgoing:
        _put(tensor, *where, torch.zeros_like(tensor))


def _set_all(tensor: Tensor, cut: Cut, value: Tensor) -> None:
    rows, columns = _regions(cut)
    for where in [*rows, *columns]:
        _put(tensor, *where, value)
