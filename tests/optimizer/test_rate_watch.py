"""Adam's rate left in place: one warning, and none for warm-ups, schedules that decay and factors that are meant."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR

from learned_optim import LearnedOptimizer
from learned_optim.rate_watch import STEPS
from tests.cases import make_params, needs_dynamo, small_rule, take_steps

ONE = [(3,)]
SAYS = r"LearnedOptimizer runs with a small lr: .*lr=0\.0006.* 1 is the usual factor.*filterwarnings"


def made(**options: object) -> tuple[LearnedOptimizer, list[nn.Parameter]]:
    params = make_params(ONE)
    return LearnedOptimizer(params, weights=small_rule(), **options), params


@pytest.mark.parametrize("lr", [6e-4, torch.tensor(6e-4)])
def test_an_optimizer_made_with_adam_s_rate_warns_once_at_the_caller(lr: object) -> None:
    params = make_params(ONE)
    with pytest.warns(UserWarning, match=SAYS) as caught:
        optimizer = LearnedOptimizer(params, weights=small_rule(), lr=lr)
    assert [warning.filename for warning in caught] == [__file__]
    take_steps(optimizer, params, STEPS + 10)  # Warnings are errors here: a second one would fail.


def test_so_does_one_group_of_several() -> None:
    with pytest.warns(UserWarning, match=SAYS) as caught:
        LearnedOptimizer([{"params": make_params(ONE)}, {"params": make_params(ONE), "lr": 6e-4}], weights=small_rule())
    assert len(caught) == 1


@pytest.mark.parametrize("first", [6e-4, 0.0])
def test_a_rate_that_stays_small_warns_after_fifty_steps(first: float) -> None:
    optimizer, params = made()
    optimizer.param_groups[0]["lr"] = first
    take_steps(optimizer, params, 1)
    optimizer.param_groups[0]["lr"] = 6e-4
    take_steps(optimizer, params, STEPS - 2)
    with pytest.warns(UserWarning, match=rf"first {STEPS} steps .*lr=0\.0006 in group 0") as caught:
        take_steps(optimizer, params, 1)
    assert [warning.filename for warning in caught] == [take_steps.__code__.co_filename]
    take_steps(optimizer, params, STEPS)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LambdaLR(o, lambda step: min(1.0, step / 100)),
        lambda o: LambdaLR(o, lambda step: min(1.0, step / 900)),
        lambda o: LinearLR(o, start_factor=1e-6, total_iters=100),
        lambda o: OneCycleLR(o, max_lr=1.0, total_steps=80, cycle_momentum=False),
        lambda o: CosineAnnealingLR(o, T_max=60),
    ],
)
def test_no_schedule_that_passes_through_small_rates_warns(schedule: Callable) -> None:
    optimizer, params = made()
    scheduler = schedule(optimizer)
    for step in range(STEPS + 20):
        take_steps(optimizer, params, 1, first=step)
        scheduler.step()


def test_neither_zero_nor_a_usual_factor_warns() -> None:
    for lr in (0.0, 0.05, 0.3, 1.0):
        optimizer, params = made(lr=lr)
        take_steps(optimizer, params, STEPS + 1)


def test_a_run_that_goes_on_at_the_end_of_its_schedule_does_not_warn() -> None:
    optimizer, params = made()
    take_steps(optimizer, params, 2)
    optimizer.param_groups[0]["lr"] = 6e-4
    others, _ = made()
    others.load_state_dict(optimizer.state_dict())
    for opt in (copy.deepcopy(optimizer), others):
        take_steps(opt, opt.param_groups[0]["params"], STEPS + 1)


def test_it_is_silenced_as_the_warning_says() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LearnedOptimizer runs with a small lr")
        made(lr=6e-4)
        optimizer, params = made()
        optimizer.param_groups[0]["lr"] = 6e-4
        take_steps(optimizer, params, STEPS + 1)


@needs_dynamo
def test_a_compiled_step_is_not_broken_by_it() -> None:
    optimizer, params = made()
    optimizer.param_groups[0]["lr"] = torch.tensor(6e-4)
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    for _ in range(3):
        params[0].grad = torch.ones(3)
        step()


def test_the_guard_says_it_too() -> None:
    params = make_params(ONE)
    rule = small_rule("paper-raw")
    nn.init.constant_(rule.readout.weight, float("nan"))
    optimizer = LearnedOptimizer(params, weights=rule, guard=True)
    optimizer.param_groups[0]["lr"] = 6e-4
    with pytest.warns(UserWarning, match=r"that step was undone; lr=0.0006 is small, 1 is the usual factor"):
        take_steps(optimizer, params, 1)
