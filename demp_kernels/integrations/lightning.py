"""A callback for Lightning (`pip install lightning`).

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = dk.prepare(resnet18(), torch.randn(2, 3, 32, 32))
        ...                                       # training_step, configure_optimizers: as without DemP

    module = Classifier()
    callback = DemPCallback(module.net, peak_penalty=0.03, prune_every=500)
    lightning.Trainer(max_epochs=20, callbacks=[callback]).fit(module, loader)
    print(callback.demp.report())
"""
from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from ..training import DemP

__all__ = ["DemPCallback"]


class DemPCallback(Callback):
    """Penalises, adds noise and removes dead units at the right places of Lightning's loop.

    The penalty goes into the gradients before the optimiser's step (after unscaling, before clipping), so the logged loss
    is that of the task. Gradient accumulation counts as one step. Works with one optimiser in one process.

    Lightning restores weights before callbacks, into the widths the network was built with, so `ckpt_path=` cannot
    resume a run behind a removal; `demp_kernels.save_checkpoint` and `load_checkpoint` can.

    Args:
        network: a model from `prepare` (or with DemP activations and `example_inputs=`) inside the LightningModule.
        options: of `DemP`; total_steps is by default what the trainer expects to make.

    Raises ValueError when training starts with several processes or optimisers, behind steps that were made before, or
    without an end while `total_steps` is not given.
    """

    demp: DemP | None = None
    """The controller, from the start of training on."""

    def __init__(self, network: nn.Module, **options: Any) -> None:
        self.network, self.options = network, options
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise ValueError(f"DemPCallback works in one process, got {trainer.world_size}: write the loop for DDP yourself")
        if len(trainer.optimizers) != 1:
            raise ValueError(f"DemPCallback works with one optimizer, got {len(trainer.optimizers)}")
        if trainer.global_step:
            raise ValueError(
                f"DemPCallback must be there from the first step on, got global_step {trainer.global_step}: its schedule would "
                "start anew; demp_kernels.load_checkpoint goes on with a run"
            )
        options = dict(self.options)
        if "total_steps" not in options:
            expected = trainer.estimated_stepping_batches
            if not 0 < expected < float("inf"):
                raise ValueError(f"DemPCallback must be given total_steps where the Trainer knows no end, got {expected} steps")
            options["total_steps"] = int(expected)
        self.demp = DemP(self.network, trainer.optimizers[0], **options)
        self._seen = 0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert self.demp is not None
        # fused optimisers unscale in their own step, so that here gradients are still scaled
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            self.demp.penalise_gradients(scaler.get_scale())
        else:
            self.demp.penalise_gradients()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self._seen:
            assert self.demp is not None
            self._seen = trainer.global_step
            self.demp.step()
