"""The order in which training images come, which a resumed run takes up in the middle of an epoch."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["EpochOrder"]

Drawn = TypeVar("Drawn")


class EpochOrder:
    """What is drawn once an epoch from a generator of its own, and how far the epoch has come.

    Others may draw from `generator` during the epoch (augmentation does): the state at the epoch's start is kept beside
    the present one, so that after `load_state_dict` the same is drawn again without moving the generator.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.position = 0
        """Batches of the epoch that have been taken."""
        self._at_start: Tensor = self.generator.get_state()
        self._taken_up = False

    def begin(self, draw: Callable[[torch.Generator], Drawn], batches: int) -> Drawn:
        """What `draw` draws for a new epoch, or for the one of `batches` batches that was loaded unfinished."""
        unfinished, self._taken_up = self._taken_up and self.position < batches, False
        if not unfinished:
            self.position = 0
            self._at_start = self.generator.get_state()
            return draw(self.generator)
        present = self.generator.get_state()
        self.generator.set_state(self._at_start)
        drawn = draw(self.generator)
        self.generator.set_state(present)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {"at_start": self._at_start, "generator": self.generator.get_state(), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self._at_start, self.position, self._taken_up = state["at_start"], state["position"], True
