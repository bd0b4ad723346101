"""`demp bench step`, as small as it gets."""
from __future__ import annotations

import pytest
import torch

from demp_kernels.bench import step
from demp_kernels.bench.rows import Group
from demp_kernels.bench.runner import threads
from demp_kernels.bench.step_worker import PRUNE_EVERY, SETUPS, Sites, StepSpec, Trainer
from demp_kernels.recipes.errors import RecipeError

SPEC = StepSpec(width=8, shape=(4, 1, 8, 8), threads=1)


@pytest.mark.parametrize("setup", SETUPS)
def test_setups_train(setup: str) -> None:
    trainer = Trainer(SPEC, SETUPS[setup])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    assert (trainer.demp is not None) == setup.startswith("demp")
    trainer.step()


def test_parts_do_what_they_are_timed_for() -> None:
    trainer = Trainer(SPEC, SETUPS["demp"])
    trainer.step()
    units = dict(trainer.demp.live_units)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    for call in trainer.parts().values():
        call.before()
        call.run()
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters())]
    assert all(moved), "noise must reach every parameter, or it is not what a step costs"
    assert trainer.demp.live_units == units, "a decision must find nothing to remove"


def test_sites_are_all_activations() -> None:
    sites = Sites(Trainer(SPEC, SETUPS["demp_unfused"]))
    sites.counted()
    sites.plain()
    assert len(sites._inputs) == 17


def test_step_rows(machine) -> None:
    with threads(1):
        group = Group(step.step_rows(8, machine, batch=2, side=8, rounds=2))
    assert set(group.rows) >= {*SETUPS, *(f"{name}_tuned" for name in SETUPS), "own_work", *step.OWN}
    assert group.case.op == "step" and group.case.function == "resnet18-w8" and group.case.shape == "2x1x8x8"
    assert {row.samples for row in group.rows.values()} == {2}
    assert group.time("own_work") >= max(group.time(name) for name in ("own_penalty", "own_noise"))


def test_compiled_steps_have_rows_of_their_own(machine) -> None:
    with threads(1):
        group = Group(step.step_rows(8, machine, batch=2, side=8, rounds=1, compile=True))
    assert {"plain_compile_tuned", "demp_compile_tuned"} <= group.rows.keys()


def test_own_work_is_the_sum_of_its_parts() -> None:
    samples = {
        "own_penalty": [1.0, 1.0], "own_noise": [2.0, 2.0], "own_decision": [PRUNE_EVERY * 0.5] * 2,
        "sites_counted": [5.0, 7.0], "sites_plain": [6.0, 6.0],
    }
    found = step._own_work(samples)
    assert found["own_work"].median == pytest.approx(4.0)  # 3.5 where counting was the faster one, 4.5 where not
    assert found["own_counts"].median == pytest.approx(0.5)  # 0 where counting was the faster one, 1 where not


def test_a_worker_that_fails_is_one_line(machine) -> None:
    with threads(1), pytest.raises(RecipeError, match="a process that trains must answer") as caught:
        step.step_rows(0, machine, batch=2, side=8, rounds=1)
    assert "\n" not in str(caught.value)
