"""What makes units live or die wrongly and only the user can mend: said once, as a warning."""
from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from ..graph import UnitGraph
from ..graph.units import ActivationUnits
from .liveness import activations_of, not_finite, several_widths
from .report import some_of

__all__ = ["Trouble", "warn_of_analysis"]


def warn_of_analysis(graph: UnitGraph, calls: Mapping[str, list[ActivationUnits]], counted: bool) -> None:
    """Layers that the example inputs do not reach, and, where units are `counted`, activations whose counter means several
    layers. Called by the constructor of `DemP`."""
    if graph.untraced:
        warnings.warn(
            f"{some_of(graph.untraced)}: not used by the forward of example_inputs. If another call of the model uses it, it will "
            "not fit once units in front of it are gone",
            stacklevel=3,
        )
    if counted and (several := several_widths(calls)):
        path, widths = next(iter(several.items()))
        warnings.warn(
            f"{path} is called with {', '.join(map(str, widths))} units, and one counter cannot tell the calls apart: their units "
            "count as live; prepare(model, example_inputs) gives each call an activation of its own",
            stacklevel=3,
        )


class Trouble:
    """What was found so far at the looks of a run.

    not_finite: names of parameters and buffers that held NaN or infinity at the last look.
    """

    def __init__(self) -> None:
        self.not_finite: tuple[str, ...] = ()
        self._resting: set[str] = set()

    def look(self, model: nn.Module, step: int, counted: bool) -> None:
        """Called at every look for dead units, two calls below `DemP.step`; counted: by the counters."""
        found, before = not_finite(model), self.not_finite
        if found and not before:
            # a NaN makes all that it reaches count as live, which reads like a run without deaths
            warnings.warn(
                f"NaN or infinity in {some_of(found)} after step {step}: units that it reaches count as live", RuntimeWarning, stacklevel=4
            )
        self.not_finite = found
        if counted and model.training:
            # a BatchNorm that is frozen takes the activation that is fused into it along
            resting = [name for name, module in activations_of(model).items() if not module.training]
            if new := [name for name in resting if name not in self._resting]:
                self._resting.update(new)
                warnings.warn(
                    f"{some_of(new)}: in evaluation mode at step {step}, in which nothing is counted and no unit dies", stacklevel=4
                )
