"""A removal: planned and tried on fake tensors, then carried out, with whatever has to be checked in between."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from ..graph import UnitGraph
from ..graph.units import Keep
from .commit import commit
from .fold import Folding
from .optimizer import StateCut, plan_states
from .plan import Plan, make_plan
from .validate import validate

__all__ = ["Removal"]


class Removal:
    """What `keep` leaves of a model, of the state of its optimisers and of the copies that follow it.

    Raises CompactionError or ValueError if one of them cannot have these widths. Nothing is changed before `carry_out`.
    """

    def __init__(
        self, model: nn.Module, graph: UnitGraph, keep: Keep, *, optimizers: Sequence[Optimizer] = (),
        followers: Sequence[nn.Module] = (), folding: Folding | None = None,
    ) -> None:
        self._graph, self._keep = graph, keep
        plan = self._plan = _planned(model, 0, graph, keep, folding)
        self.selections = {f"{change.name}.channels": (change.out.numel(),) for change in plan.selections}
        """Keys of additions in the model's `state_dict` afterwards, and their shapes."""
        self._shapes = {id(cut.tensor): cut.shape for cut in plan.cuts}
        self._states: list[StateCut] = []
        self._changes = bool(plan.cuts or plan.selections)
        if self._changes:
            for number, follower in enumerate(followers):
                plan.add(_follow(follower, number, graph, keep, folding))
            plan.require_dense()
            self._states = plan_states(optimizers, plan.cuts)
            if not graph.proved:
                validate(model, graph, plan)

    @property
    def units(self) -> dict[str, int]:
        """Units of each activation afterwards."""
        return {a.name: int(self._keep.atoms[a.atoms].sum()) for a in self._graph.activations}

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape that a parameter or buffer of the model will have."""
        return self._shapes.get(id(tensor), tuple(tensor.shape))

    def carry_out(self) -> int:
        """Returns the bytes freed."""
        if not self._changes:
            return 0
        freed = commit(self._plan, self._states)
        self._graph.shrink(self._keep.atoms)
        return freed


def _planned(model: nn.Module, number: int, graph: UnitGraph, keep: Keep, folding: Folding | None) -> Plan:
    """The cuts of the numbered model, and what it is given for them."""
    plan = make_plan(model, graph, keep)
    if folding is not None and plan.cuts:
        folding.add_to(plan, number, dict(model.named_modules(remove_duplicate=False)))
    return plan


def _follow(follower: nn.Module, number: int, graph: UnitGraph, keep: Keep, folding: Folding | None) -> Plan:
    """The same cuts of a copy of the model."""
    try:
        return _planned(follower, number + 1, graph, keep, folding)
    except ValueError as error:
        raise ValueError(f"followers[{number}] must be a copy of the model: {error}") from error
