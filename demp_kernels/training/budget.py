"""What a network costs at given widths, and which units have to go for it to fit a budget."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..graph import UnitGraph
from ..graph.capture import evaluation_mode, materialise

__all__ = ["Cost", "flops_cost", "lowest_units", "parameter_cost", "unit_savings"]

Cost = Callable[[Mapping[int, tuple[int, ...]]], float]
"""Cost of a model whose parameters have these shapes, by id; those that are not named have the shape they have now."""


def parameter_cost(model: nn.Module) -> Cost:
    """The number of parameters."""
    return lambda shapes: sum(torch.Size(shapes.get(id(p), p.shape)).numel() for p in model.parameters())


def flops_cost(model: nn.Module, example_inputs: tuple[Any, ...], block: int = 1) -> Cost:
    """Multiply-adds of convolutions and linear layers in one forward: every weight entry is used once at each position of
    the output (of the input, for a transposed convolution). One forward of zeros, in evaluation mode, finds the positions,
    which do not depend on the widths.

    example_inputs: positional arguments of the forward; meta tensors will do.
    block: count widths rounded up to a multiple of it, since kernels that work on so many channels at once take the time of
        them. The inputs of each group of a grouped convolution stay as they are: those kernels go over the groups.
    """
    positions: dict[nn.Module, int] = {}
    computed: dict[nn.Module, torch.Size] = {}
    """Shapes of weights that are no parameters (parametrised ones). Their layers keep their units."""

    def count(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        shape = given[0].shape if isinstance(module, nn.modules.conv._ConvTransposeNd) else output.shape
        channels = shape[-1] if isinstance(module, nn.Linear) else shape[1]
        positions[module] = positions.get(module, 0) + shape.numel() // channels
        if module._parameters.get("weight") is None:
            computed[module] = torch.Size(module.weight.shape)  # type: ignore[arg-type]

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    inputs = materialise(model, example_inputs)
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(*tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, inputs))
    finally:
        for hook in hooks:
            hook.remove()

    def cost(shapes: Mapping[int, tuple[int, ...]]) -> float:
        total = 0
        for layer, places in positions.items():
            weight = layer._parameters.get("weight")
            shape = list(computed[layer] if weight is None else shapes.get(id(weight), weight.shape))
            for dim in (0, 1) if getattr(layer, "groups", 1) == 1 else (0,):
                shape[dim] = -(-shape[dim] // block) * block
            total += torch.Size(shape).numel() * places
        return total

    return cost


def unit_savings(model: nn.Module, graph: UnitGraph, cost: Cost) -> dict[str, float]:
    """Activation name -> how far the cost falls for each of its units that goes, all other activations as they are: a mean
    over half of them, since single ones may have to stay. 0 where none can go."""
    full, savings = cost({}), {}
    for name, units in graph.units.items():
        dead = torch.arange(units) < -(-units // 2)
        left = cost(graph.widths(model, graph.keep({name: dead}).atoms).shapes)
        savings[name] = (full - left) / int(dead.sum())
    return savings


def lowest_units(
    model: nn.Module, graph: UnitGraph, scores: Mapping[str, Tensor], budget: float, *, cost: Cost | None = None,
    round_to: int = 1, floor: float = 0.0, min_units: int = 1,
) -> dict[str, Tensor]:
    """The units to remove, activation name -> (units,) bool: as few of the lowest scores as bring the cost of the model
    (by default its parameters) down to `budget`.

    Args:
        scores: activation name -> (units,), low for what is to go; all layers are compared together.
        round_to: of every layer a multiple of this stays, where it had as many.
        floor, min_units: share of the units at the analysis, and number, that every layer keeps.

    Units that would stay all the same (`Keep`) are not among them. If the budget is out of reach, all that may go.
    """
    cost = cost or parameter_cost(model)
    order = torch.cat([scores[name].flatten().cpu() for name in graph.units]).argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    layers = {name: of_units.sort() for name, of_units in zip(graph.units, rank.split(list(graph.units.values())))}

    def lowest(count: int) -> dict[str, Tensor]:
        dead = {}
        for name, (ranks, from_lowest) in layers.items():
            units = len(ranks)
            left = max(min_units, round(floor * graph.total_units[name]), units - int(torch.searchsorted(ranks, count)))
            left = min(units, -(-left // round_to) * round_to)
            dead[name] = torch.zeros(units, dtype=torch.bool)
            dead[name][from_lowest[: units - left]] = True
        return dead

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if cost(graph.widths(model, graph.keep(lowest(middle)).atoms).shapes) <= budget:
            high = middle
        else:
            low = middle + 1
    dead = lowest(low)
    kept = graph.keep(dead).atoms
    return {a.name: dead[a.name] & ~torch.from_numpy(kept[a.atoms]) for a in graph.activations}
