"""The callbacks against a plain loop with DemP: the same weights, the same removals."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import demp_kernels as dk

STEPS, BATCH = 24, 16
OPTIONS = {"peak_penalty": 0.5, "peak_noise": 0.0, "prune_every": 4, "seed": 0}


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))
    with torch.no_grad():
        net[1].bias[:7] = -30  # dead from the start, so that something is removed early
    return dk.prepare(net, torch.randn(2, 6))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(STEPS * BATCH, 6, generator=generator), torch.randint(3, (STEPS * BATCH,), generator=generator)
    )


def plain_loop(accumulate: int = 1) -> tuple[nn.Module, dk.DemP]:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    demp = dk.DemP(net, optimizer, total_steps=STEPS // accumulate, **OPTIONS)
    for number, (x, y) in enumerate(DataLoader(data(), BATCH), start=1):
        (F.cross_entropy(net(x), y) / accumulate).backward()
        if number % accumulate == 0:
            demp.penalise_gradients()
            optimizer.step()
            optimizer.zero_grad()
            demp.step()
    return net, demp


def same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(accumulate: int, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from demp_kernels.integrations.lightning import DemPCallback

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    module = Classifier()
    callback = DemPCallback(module.net, **OPTIONS)
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(data(), BATCH))
    expected, demp = plain_loop(accumulate)
    assert callback.demp.steps_done == demp.steps_done == STEPS // accumulate
    assert callback.demp.live_units == demp.live_units and sum(demp.live_units.values()) <= 17
    same(module.net, expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_transformers(accumulate: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from demp_kernels.integrations.transformers import DemPCallback

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = Classifier()
    callback = DemPCallback(model.net, **OPTIONS)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS // accumulate, per_device_train_batch_size=BATCH, learning_rate=0.05,
        weight_decay=0.01, lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=accumulate, remove_unused_columns=False,
    )
    rows = [{"x": x, "labels": y} for x, y in data()]
    trainer = InOrder(
        model, arguments, train_dataset=rows, callbacks=[callback],
        optimizers=(torch.optim.AdamW(model.parameters(), lr=0.05), None),
    )
    trainer.train()
    expected, demp = plain_loop(accumulate)
    assert callback.demp.steps_done == demp.steps_done == STEPS // accumulate
    assert callback.demp.live_units == demp.live_units and sum(demp.live_units.values()) <= 17
    same(model.net, expected)


@pytest.mark.parametrize(("fused", "scaler", "scale"), [(True, True, 128.0), (False, True, 1.0), (True, False, 1.0)])
def test_lightning_penalises_gradients_as_they_are_scaled(fused: bool, scaler: bool, scale: float) -> None:
    """Lightning unscales before the hook, but for optimisers that do it themselves."""
    pytest.importorskip("lightning")
    from demp_kernels.integrations.lightning import DemPCallback

    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, fused=fused)
    precision = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 128.0) if scaler else None)
    callback = DemPCallback(net, **OPTIONS)
    callback.demp = SimpleNamespace(penalise_gradients=lambda scale=1.0: given.append(scale))
    given: list[float] = []
    callback.on_before_optimizer_step(SimpleNamespace(precision_plugin=precision), None, optimizer)
    assert given == [scale]


def test_transformers_with_several_gpus_in_one_process_is_refused() -> None:
    pytest.importorskip("transformers")
    from demp_kernels.integrations.transformers import DemPCallback

    callback = DemPCallback(network(), **OPTIONS)
    with pytest.raises(ValueError, match="works with one GPU, got 2"):
        callback.on_train_begin(SimpleNamespace(world_size=1, n_gpu=2), None, None)


def test_transformers_that_goes_on_with_a_run_is_refused() -> None:
    pytest.importorskip("transformers")
    from demp_kernels.integrations.transformers import DemPCallback

    callback = DemPCallback(network(), **OPTIONS)
    with pytest.raises(ValueError, match="from the first step on, got global_step 7"):
        callback.on_train_begin(SimpleNamespace(world_size=1, n_gpu=0), SimpleNamespace(global_step=7), None)


def test_lightning_without_an_end_or_behind_steps() -> None:
    pytest.importorskip("lightning")
    from demp_kernels.integrations.lightning import DemPCallback

    class Endless(SimpleNamespace):
        @property
        def estimated_stepping_batches(self) -> float:
            return float("inf")

    net = network()
    trainer = Endless(world_size=1, global_step=0, optimizers=[torch.optim.AdamW(net.parameters())])
    with pytest.raises(ValueError, match="must be given total_steps"):
        DemPCallback(net, **OPTIONS).on_train_start(trainer, None)
    callback = DemPCallback(net, total_steps=9, **OPTIONS)
    callback.on_train_start(trainer, None)
    assert callback.demp.total_steps == 9
    trainer.global_step = 5
    with pytest.raises(ValueError, match="from the first step on, got global_step 5"):
        callback.on_train_start(trainer, None)


@pytest.mark.parametrize("unscaled", [False, True])
def test_transformers_penalises_unscaled_gradients(unscaled: bool) -> None:
    """The Trainer unscales them to clip them or to take their norm, but not in every release."""
    pytest.importorskip("transformers")
    from demp_kernels.integrations.transformers import DemPCallback

    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    scaler.scale(net(torch.randn(4, 6)).sum()).backward()
    expected = [p.grad / 128.0 for p in net.parameters()]
    if unscaled:
        scaler.unscale_(optimizer)
    callback = DemPCallback(net, **OPTIONS)
    callback.demp = SimpleNamespace(penalise_gradients=lambda: penalised.extend(p.grad.clone() for p in net.parameters()))
    penalised: list[torch.Tensor] = []
    callback.on_pre_optimizer_step(None, None, None, optimizer=SimpleNamespace(optimizer=optimizer, scaler=scaler))
    torch.testing.assert_close(penalised, expected)
    scaler.step(optimizer)
    scaler.update()
