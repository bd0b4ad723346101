"""A callback for the Trainer of Hugging Face's transformers (`pip install transformers accelerate`).

    model = Classifier()                          # any module that the Trainer takes, with a network in it:
    model.net = dk.prepare(model.net, torch.randn(2, 3, 32, 32))
    callback = DemPCallback(model.net, peak_penalty=0.03, prune_every=500)
    Trainer(model, TrainingArguments(...), train_dataset=..., callbacks=[callback]).train()
    print(callback.demp.report())
"""
from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..training import DemP

__all__ = ["DemPCallback"]


class DemPCallback(TrainerCallback):
    """Penalises, adds noise and removes dead units at the right places of the Trainer's loop.

    The penalty goes into the gradients before the optimiser's step (after clipping), so the logged loss is that of the
    task. Gradient accumulation counts as one step. Works in one process. The Trainer's own checkpoints load into the
    widths they were saved with, so resuming behind a removal takes `demp_kernels.save_checkpoint` and `load_checkpoint`.

    Args:
        network: a model from `prepare` (or with DemP activations and `example_inputs=`), the Trainer's model or part of it.
        options: of `DemP`; total_steps is by default the Trainer's max_steps.

    Raises ValueError when training starts with several processes, or several GPUs in one, or behind steps that were made before.
    """

    demp: DemP | None = None
    """The controller, from the start of training on."""

    def __init__(self, network: nn.Module, **options: Any) -> None:
        self.network, self.options = network, options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            raise ValueError(f"DemPCallback works in one process, got {args.world_size}: write the loop for DDP yourself")
        if args.n_gpu > 1:
            # torch.nn.DataParallel's replicas count for themselves, and are thrown away
            raise ValueError(f"DemPCallback works with one GPU, got {args.n_gpu}: set CUDA_VISIBLE_DEVICES")
        if state.global_step:
            raise ValueError(
                f"DemPCallback must be there from the first step on, got global_step {state.global_step}: its schedule would "
                "start anew; demp_kernels.load_checkpoint goes on with a run"
            )
        # accelerate wraps the optimiser; DemP shrinks the state of the one inside
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self.demp = DemP(self.network, optimizer, **{"total_steps": state.max_steps, **self.options})

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.demp is not None
        # accelerate's optimiser, around the one that steps
        optimizer = kwargs["optimizer"]
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None:
            with suppress(RuntimeError):  # unscaled already, where the Trainer has clipped gradients or taken their norm
                scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
        self.demp.penalise_gradients()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.demp is not None
        self.demp.step()
