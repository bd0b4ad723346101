"""`DemP`: the controller that a training loop calls once before the backward pass and once after the optimiser's step."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import at_least, one_of, require_integer, require_module, require_not_negative
from ..compaction import CompactionReport, compact, recycle
from ..compaction.batches import Batches, as_batches
from ..compaction.entry import as_followers, check_followers, width_step
from ..compaction.optimizer import parameters_of
from ..compaction.report import Payoff
from ..compaction.state_checks import entry
from ..graph import UnitGraph, remembered_inputs
from ..graph.capture import as_tuple
from .distributed import (
    any_rank,
    from_first_rank,
    is_distributed,
    mean_over_ranks,
    refit_wrappers,
    require_all_ranks,
    sum_counters,
    to_first_rank,
    unwrap,
)
from .liveness import (
    StepLiveness,
    activations_of,
    alike_on_ranks,
    allocate_counters,
    calls_by_name,
    check_counters,
    counters_of,
    of_calls,
    scan_dead,
    window_dead,
)
from .noise import noise_on_live
from .penalty import PENALTY_NORMS, add_penalty_gradient, penalised_parameters, penalty_value
from .policy import POLICIES, Weighing
from .report import DemPEvent, DemPReport, check_history
from .schedule import SCHEDULES
from .steering import Steerer, Steering
from .trouble import Trouble, warn_of_analysis

__all__ = ["DemP"]


class DemP:
    """Demon Pruning: units that die during training are removed while it goes on.

    A step of the loop is

        loss = criterion(model(x), y) + demp.penalty()
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        demp.step()

    `penalty()` is lambda_t * R: lambda_t follows a one-cycle cosine that peaks at `peak_penalty`, R is by default the sum
    of |gamma| over all normalisation layers. `step()` adds the noise sigma_t * xi to the weights of live units, then, every
    `prune_every` steps and after the last one, removes the units that are dead. Without `steering` there is no
    target: the peak of the penalty, the learning rate and the length of the run decide how many units die.

    Args:
        model: a model from `prepare`, or any model with DemP activations (then `example_inputs` is required). It may
            be wrapped by torch.compile or DistributedDataParallel: then all ranks remove the same units (dead on
            every rank) and the wrapper is rebuilt in place.
        optimizer: the optimiser of the model's parameters, or a list of them. Their state shrinks with the model.
        total_steps: optimiser steps of the run.
        peak_penalty: peak of lambda, >= 0.
        peak_noise: peak standard deviation of the weight noise, >= 0.
        prune_every, prune_after: look for dead units at steps that are a multiple of `prune_every`, from
            `prune_after` on. Under the window criterion `prune_every` is the number of steps in which a unit must have
            been silent: let it cover about an epoch. The last look of the run, after `total_steps`, has a window of at least
            that length, for which the multiple just before it is left out.
        ramp_steps: length T_r of the schedule, by default int(0.87 * total_steps), as in the authors' ResNet-18 recipe.
        schedule: of lambda and the noise: "one_cycle", "constant", "cosine_decay" or "linear_warmup".
        criterion: "window" (never active in training since the last look, counted for free) or "scan" (the authors':
            sum <= 0 in every batch of `scan_batches`).
        scan_batches: for "scan": batches of inputs, or a function that returns fresh ones.
        example_inputs: a tensor or tuple for the analysis; not needed for a prepared model.
        penalty_norm: "l1" (the sum of |p|), "l2" (half of p squared) or "positive" (of p where p > 0).
        penalty_on: "scales" (of normalisations), "offsets", "normalisation" (both), "weights" or "all".
        round_to, followers: as for `compact`: "auto" or a number; copies (EMA, SWA) that shrink with the model.
        fold_batches, max_change: as for `compact`, for networks with GELU, SiLU or leaky ReLU: batches of inputs, or a function
            that returns fresh ones, on which what dead units still give is measured, to be added to the biases behind
            them. Asked for at removals with dead units only. By default such units are removed as if they were zero.
        min_units: units that every layer keeps at least. The authors let a layer reach 0, which ends the network.
        on_dead: "remove"; "recycle": give dead units a new start instead (ReDo, see `compaction.recycle`), for training that
            goes on with other data; or "report": say how many there are and change nothing.
        policy: "always" removes what is dead at every look. "when_it_pays": only if the time that smaller steps are estimated to
            save until the end exceeds what the removal takes (see `training.policy`), except at the last look, which always
            removes. Reports give the numbers (`payoff`, `decisions`). Times are measured, so that a run need not repeat
            itself bit for bit, nor a resumed one go on so; with "always" both do.
        seed: of the weight noise; by default drawn from torch's generator.
        steering: a budget that units are pushed to meet, beside the penalty; for a budget alone `peak_penalty=0`. See `Steering`.

    Networks may train in several threads. Make their `DemP`s before the threads start: torch exchanges functions of the
    whole process while it traces, so that a step beside an analysis may round differently.

    Raises ValueError or TypeError that names the argument, what is required and what it got.

    Source: Dufort-Labbe et al., arXiv 2403.07688.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        total_steps: int,
        peak_penalty: float = 0.03,
        peak_noise: float = 5e-5,
        prune_every: int = 500,
        prune_after: int = 0,
        ramp_steps: int | None = None,
        schedule: str = "one_cycle",
        criterion: str = "window",
        scan_batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        example_inputs: Any = None,
        penalty_norm: str = "l1",
        penalty_on: str = "scales",
        round_to: int | str = 1,
        min_units: int = 1,
        followers: nn.Module | Sequence[nn.Module] | None = None,
        fold_batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        max_change: float = float("inf"),
        on_dead: str = "remove",
        policy: str = "always",
        seed: int | None = None,
        steering: Steering | None = None,
    ) -> None:
        self.total_steps = at_least("total_steps", total_steps, 1, int)
        self.peak_penalty = at_least("peak_penalty", peak_penalty, 0.0)
        self.peak_noise = at_least("peak_noise", peak_noise, 0.0)
        self.prune_every = at_least("prune_every", prune_every, 1, int)
        self.prune_after = at_least("prune_after", prune_after, 0, int)
        ramp = int(0.87 * total_steps) if ramp_steps is None else ramp_steps
        self.ramp_steps = at_least("ramp_steps", max(ramp, 1) if ramp_steps is None else ramp, 1, int)
        self.round_to = round_to if round_to == "auto" else at_least("round_to", round_to, 1, int)
        self.on_dead = one_of("on_dead", on_dead, ("remove", "recycle", "report"))
        self.policy = one_of("policy", policy, POLICIES)
        if policy != "always" and on_dead != "remove":
            raise ValueError(f"policy={policy!r} requires on_dead='remove', got {on_dead!r}")
        self.followers = followers
        require_not_negative("max_change", max_change)
        self.max_change = max_change
        later = fold_batches is None or callable(fold_batches)
        self.fold_batches = fold_batches if later else as_batches(fold_batches, sum_counters)
        self.min_units = at_least("min_units", min_units, 1, int)
        self.schedule = one_of("schedule", schedule, SCHEDULES)
        self.criterion = one_of("criterion", criterion, ("window", "scan"))
        self.penalty_norm = one_of("penalty_norm", penalty_norm, PENALTY_NORMS)
        if criterion == "scan" and scan_batches is None:
            raise ValueError("criterion='scan' requires scan_batches, got None")
        # a generator would be exhausted by the first look
        self.scan_batches = list(scan_batches) if isinstance(scan_batches, Iterator) else scan_batches
        self.on_compaction: list[Callable[[CompactionReport], None]] = []
        """Called with the report after every removal."""

        require_module("DemP: model", model)
        require_all_ranks(model)
        self._wrapper, self._model = model, unwrap(model)
        self._optimizers = _optimizers(optimizer)
        if not activations_of(self._model):
            raise ValueError(
                f"model must have DemP activations, got none in {type(self._model).__name__}: "
                "use model = prepare(model, example_inputs) or swap_activations(model)"
            )
        inputs = remembered_inputs(self._model) if example_inputs is None else example_inputs
        if inputs is None:
            raise ValueError("example_inputs is required for a model that was not made by prepare(), got None")
        self._penalised = penalised_parameters(self._model, penalty_on) if self.peak_penalty > 0 else []
        check_followers(self._model, as_followers(followers))
        self.graph = UnitGraph.trace(self._model, inputs)
        self._calls = calls_by_name(self._model, self.graph)
        warn_of_analysis(self.graph, self._calls, counted=criterion == "window")
        self.total_units: dict[str, int] = dict(self.graph.units)
        device = next(self._model.parameters()).device
        if seed is not None:
            require_integer("seed", seed)
        drawn = torch.randint(2**62, (1,)) if seed is None else torch.tensor([seed])
        self._noise_seed = from_first_rank(drawn.to(device=device, dtype=torch.int64))
        allocate_counters(self._model, self._calls)
        self._liveness = StepLiveness(self._model)
        self._steerer = None if steering is None else self._steered(steering, inputs)
        self._weighing = Weighing(self._wrapper, self._optimizers, self.graph, as_tuple(inputs)) if policy == "when_it_pays" else None
        self._decisions: list[Payoff] = []
        self._history: list[DemPEvent] = []
        self._trouble = Trouble()
        self._steps_done = 0

    # --- the two calls of a training loop ---

    def penalty(self) -> Tensor:
        """lambda_t * R as a differentiable scalar, to be added to the loss: once a step. Where gradients of k parts of a batch are
        accumulated, add a k-th of it to each part's loss, or call `penalise_gradients` once before the optimiser's step."""
        if not self._penalised:
            return torch.zeros((), device=self._noise_seed.device)
        return self.penalty_weight * penalty_value(self._penalised, self.penalty_norm)

    def penalise_gradients(self, scale: float = 1.0) -> None:
        """Add scale * lambda_t * dR/dp to the gradients: instead of `penalty()`, after `backward()`, where the loss is out
        of reach or an autograd graph too much. `scale`: what the loss was multiplied by, if gradients are still scaled.
        """
        weight = self.penalty_weight
        if self._penalised and weight > 0:
            add_penalty_gradient(self._penalised, self.penalty_norm, scale * weight)

    def step(self, loss: Tensor | None = None) -> CompactionReport | None:
        """Noise on the weights of live units, a push for those that the steering has chosen; then, if it is time, removal
        of the dead ones.

        Call it after the optimiser's step. loss: of this step, a scalar, for the guard of the steering.
        Returns the report of the removal, or None if nothing was looked for.
        """
        if self.noise_std > 0:
            self._add_noise(self.noise_std)
        if self._steerer is not None:
            self._steerer.step(self._steps_done, None if loss is None else mean_over_ranks(loss))
        self._steps_done += 1
        if self._weighing is not None:
            self._weighing.pace.ends()
        report = self._remove_dead() if self._due() else None
        if self._weighing is not None:
            self._weighing.pace.begins(report)
        return report

    def _due(self) -> bool:
        """Whether dead units are looked for after this step: at multiples of `prune_every`, and at the end."""
        left = self.total_steps - self._steps_done
        if left == 0:
            return True
        if self.criterion == "window" and 0 < left < self.prune_every:
            return False  # a look now would leave the last one a window too short to tell
        return self._steps_done % self.prune_every == 0 and self._steps_done >= self.prune_after

    # --- what is going on ---

    @property
    def steps_done(self) -> int:
        return self._steps_done

    @property
    def penalty_weight(self) -> float:
        """lambda_t of the coming step."""
        return SCHEDULES[self.schedule](self._steps_done, self.ramp_steps, self.peak_penalty)

    @property
    def noise_std(self) -> float:
        """sigma_t of the coming step."""
        return SCHEDULES[self.schedule](self._steps_done, self.ramp_steps, self.peak_noise)

    @property
    def live_units(self) -> dict[str, int]:
        """Units that each activation still has."""
        return dict(self.graph.units)

    def report(self) -> DemPReport:
        return DemPReport(self._steps_done, self.total_steps, self.live_units, self.total_units, list(self._history), self._trouble.not_finite,
                          list(self._decisions))

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the model, the optimiser and the graph: plain values and tensors."""
        return {
            "steps_done": self._steps_done,
            "total_steps": self.total_steps,
            "noise_seed": self._noise_seed.clone(),
            "total_units": dict(self.total_units),
            "steering": None if self._steerer is None else self._steerer.state_dict(),
            "counters": {
                name: {"active": m.active.clone(), "seen": m.seen.clone()}
                for name, m in activations_of(self._model).items()
                if m.active is not None and m.seen is not None and not m.mixed
            },
            "history": [asdict(event) for event in self._history],
            "decisions": [asdict(decision) for decision in self._decisions],
        }

    def pool_counters(self) -> None:
        """Before rank 0 alone saves in the middle of a window: give it the counters of all ranks; those of the others start
        from zero, so that their sums stay right. Called by every rank. Does nothing in one process."""
        if is_distributed():
            to_first_rank(counters_of(self._model, self._calls))
            self._liveness.restart()
            self._liveness.take()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. The model must have the widths of that moment already (`load_checkpoint` sees to
        it). Raises ValueError, with nothing changed, if the state belongs to another model or run length."""
        self.check_state_dict(state, self.live_units)
        modules = activations_of(self._model)
        for module in modules.values():
            module.reset_counts()
        for name, counts in state["counters"].items():
            module = modules[name]
            module.allocate(len(counts["active"]), self._noise_seed.device)
            assert module.active is not None and module.seen is not None
            module.active.copy_(counts["active"])
            module.seen.copy_(counts["seen"])
        allocate_counters(self._model, self._calls)
        self._noise_seed.copy_(state["noise_seed"])
        self._steps_done = state["steps_done"]
        if self._steerer is not None and state.get("steering") is not None:
            self._steerer.load_state_dict(state["steering"])
        self._history = [DemPEvent(e["step"], e["live_units"], e["parameters"], e["seconds"]) for e in state["history"]]
        self._decisions = [
            Payoff(d["step"], d["step_seconds"], d["saved"], d["steps_left"], d["cost"]) for d in state.get("decisions", [])
        ]
        # what the last saved step saw is part of the window already
        self._liveness.restart()
        self._liveness.take()
        if self._weighing is not None:
            self._weighing.pace.forget()

    def check_state_dict(self, state: dict[str, Any], units: dict[str, int]) -> None:
        """Raises ValueError if `state` cannot be loaded once the model has these `units`: it is no `state_dict()`, or one
        of another model or run length."""
        where = "DemP state"
        if entry(state, "total_units", dict, where) != self.total_units:
            raise ValueError("DemP state belongs to another model: its activations or their sizes differ")
        if (total := entry(state, "total_steps", int, where)) != self.total_steps:
            raise ValueError(f"total_steps must be that of the saved run, {total}, got {self.total_steps}")
        if (done := entry(state, "steps_done", int, where)) < 0:  # above total_steps: a run may go on behind its end
            raise ValueError(f"steps_done must be at least 0, got {done}")
        seed = entry(state, "noise_seed", Tensor, where)
        if seed.shape != self._noise_seed.shape or seed.dtype != torch.int64:
            raise ValueError(f"noise_seed must be one int64 number, got {seed.dtype} of shape {tuple(seed.shape)}")
        if self._steerer is not None and state.get("steering") is not None:
            self._steerer.check_state_dict(state["steering"], units)
        check_counters(entry(state, "counters", dict, where), self._model, units)
        check_history(entry(state, "history", list, where), state.get("decisions", []), done)

    # --- the parts of a step ---

    def _steered(self, steering: Steering, inputs: Any) -> Steerer:
        if not isinstance(steering, Steering):
            raise TypeError(f"steering must be a Steering or None, got {type(steering).__name__}")
        if self.on_dead != "remove":
            raise ValueError(f"steering requires on_dead='remove', got {self.on_dead!r}")
        return Steerer(
            steering, self._model, self.graph, self._optimizers, as_tuple(inputs), self.total_steps, self._width_step(), self.min_units
        )

    def _width_step(self) -> int:
        return width_step(self._model) if isinstance(self.round_to, str) else self.round_to

    def _add_noise(self, std: float) -> None:
        # every rank must add the same noise, or their weights would drift apart
        live = any_rank(alike_on_ranks(self._calls, self._liveness.take(), self._noise_seed.device))
        noise_on_live(self._model, of_calls(self._calls, live), self.graph.gates, std, self._noise_seed, parameters_of(self._optimizers))
        self._noise_seed.add_(1)

    def _remove_dead(self) -> CompactionReport:
        self._trouble.look(self._model, self._steps_done, counted=self.criterion == "window")
        if self.criterion == "window":
            dead = window_dead(self._model, self.graph)
        else:
            assert self.scan_batches is not None  # __init__ insists on it
            dead = scan_dead(self._model, self.graph, self.scan_batches)
        payoff = self._payoff(dead)
        start = time.perf_counter()
        if self.on_dead == "remove" and (payoff is None or payoff.pays):
            report = compact(
                self._model, self._optimizers, dead=dead, round_to=self.round_to, min_units=self.min_units, graph=self.graph,
                followers=self.followers, fold_batches=self._batches_to_fold(dead), max_change=self.max_change,
            )
        else:
            report = self._leave_widths(dead)
        report = replace(report, payoff=payoff)
        for module in activations_of(self._model).values():
            module.reset_counts()
        allocate_counters(self._model, self._calls)
        self._liveness.restart()
        if report.changed:
            refit_wrappers(self._wrapper)
        if self._weighing is not None and payoff is not None and payoff.pays:
            self._weighing.removal_seconds = time.perf_counter() - start
        if report.changed:
            self._history.append(DemPEvent(self._steps_done, self.live_units, report.params_after, report.seconds))
            for callback in self.on_compaction:
                callback(report)
        return report

    def _payoff(self, dead: dict[str, Tensor]) -> Payoff | None:
        """Whether removing what is dead pays; None if that is no question."""
        left = self.total_steps - self._steps_done
        if self._weighing is None or left <= 0:
            return None
        keep = self.graph.keep(dead, round_to=self._width_step(), min_units=self.min_units)
        if self.graph.is_whole(keep):
            return None
        payoff = self._weighing.weigh(keep, self._steps_done, left)
        self._decisions.append(payoff)
        return payoff

    def _batches_to_fold(self, dead: dict[str, Tensor]) -> Batches | None:
        if self.fold_batches is None or not any(mask.any() for mask in dead.values()):
            return None
        return as_batches(self.fold_batches, sum_counters)

    def _leave_widths(self, dead: dict[str, Tensor]) -> CompactionReport:
        """Recycle the dead units, or only say how many there are."""
        start = time.perf_counter()
        found = {name: count for name, mask in dead.items() if (count := int(mask.sum()))}
        recycled: dict[str, int] = {}
        if found and self.on_dead == "recycle":
            # the noise's seed is that of every rank, so all draw the same weights
            recycled = recycle(self._model, self._optimizers, self.graph, dead, seed=int(self._noise_seed) + self._steps_done)
        parameters = sum(p.numel() for p in self._model.parameters())
        return CompactionReport(
            self.live_units, self.total_units, {}, {}, parameters, parameters, 0, time.perf_counter() - start,
            found=found, recycled=recycled,
        )


def _optimizers(optimizer: Any) -> list[Optimizer]:
    found = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for one in found:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a list of them, got {type(one).__name__}")
    return found

