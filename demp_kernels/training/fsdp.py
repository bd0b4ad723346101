"""Removal in a model that FSDP2 (`torch.distributed.fsdp.fully_shard`) keeps in shards: gather, compact, shard again."""
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ..arguments import at_least
from ..compaction import CompactionReport, compact
from ..graph import UnitGraph
from .liveness import activations_of, window_dead

__all__ = ["compact_sharded"]

WHOLE = StateDictOptions(full_state_dict=True)


def compact_sharded(
    model: nn.Module,
    optimizer: Optimizer,
    plain: nn.Module,
    build: Callable[[nn.Module], tuple[nn.Module, Optimizer]],
    *,
    graph: UnitGraph,
    dead: dict[str, Tensor] | None = None,
    round_to: int = 1,
    min_units: int = 1,
) -> tuple[nn.Module, Optimizer, CompactionReport]:
    """Remove dead units from a sharded model: (the new sharded model, its optimiser, what was removed).

        plain = dk.prepare(net, example)
        graph = UnitGraph.trace(plain, example)
        def build(net):
            fully_shard(net)
            return net, torch.optim.AdamW(net.parameters(), lr=1e-3)
        model, optimizer = build(copy.deepcopy(plain))
        ...                                                   # and every few hundred steps, on all ranks:
        model, optimizer, report = compact_sharded(model, optimizer, plain, build, graph=graph)

    A sharded parameter cannot be given another size, so model and optimiser are made anew by `build`; weights, buffers
    and optimiser state are carried over, gradients are not: call it between `zero_grad()` and the next backward. If nothing
    is removed, `model` and `optimizer` come back as they are. Learning rates are carried over too, but a scheduler still
    holds the old optimiser. While it works every rank holds the whole model and optimiser state.

    Args:
        plain: the prepared model before it was sharded, with the widths that `model` has. It is compacted along, and holds
            the current weights after a removal.
        build: shards a copy of `plain` and makes its optimiser, with the same parameter groups each time.
        graph: of `plain`; it follows.
        dead: by default the units that were not active on any rank since the counters were reset.
        round_to, min_units: as for `compact`; round_to is a number here, not "auto".

    Raises CompactionError if the model or the optimiser's state cannot be shrunk; ValueError or TypeError for wrong arguments.
    """
    round_to, min_units = at_least("round_to", round_to, 1, int), at_least("min_units", min_units, 1, int)
    if dead is None:
        if not graph.calls_of(model):
            raise ValueError("graph must be that of plain: it has none of the activations of model")
        dead = window_dead(model, graph)
        for module in activations_of(model).values():
            module.reset_counts()  # a window ends with its decision, whatever it is
    if graph.is_whole(graph.keep(dead, round_to=round_to, min_units=min_units)):
        # without the gathering, which takes time and the memory of a whole model on each rank
        return model, optimizer, compact(plain, dead=dead, graph=graph, round_to=round_to, min_units=min_units)
    state = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    set_model_state_dict(plain, get_model_state_dict(model, options=WHOLE))
    gathered = _Gathered(plain, state)
    report = compact(plain, cast(Optimizer, gathered), dead=dead, graph=graph, round_to=round_to, min_units=min_units)
    if not report.changed:
        return model, optimizer, report
    gathered.fill(state)
    modes = {name: module.training for name, module in model.named_modules()}
    model, optimizer = build(copy.deepcopy(plain))
    for name, module in model.named_modules():
        module.training = modes.get(name, module.training)
    set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
    return model, optimizer, report


class _Gathered:
    """What `compact` needs of an optimiser, made of a whole state dict: state by parameter of the plain model."""

    def __init__(self, plain: nn.Module, state: dict[str, Any]) -> None:
        self._parameters = dict(plain.named_parameters())
        self.state = {self._parameters[name]: entries for name, entries in state["state"].items()}
        self.param_groups = [{"params": list(self._parameters.values())}]

    def fill(self, state: dict[str, Any]) -> None:
        state["state"] = {name: self.state[p] for name, p in self._parameters.items() if p in self.state}
