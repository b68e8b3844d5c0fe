"""Every scheduler of torch.optim.lr_scheduler drives the optimizer through ``lr`` and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from learned_optim import LearnedOptimizer
from tests.cases import assert_identical, make_params, small_rule, take_steps

pytestmark = pytest.mark.usefixtures("each_backend")
STEPS = 8
SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.8),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 4]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, factor=0.5, total_iters=3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=STEPS),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, STEPS),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 2.0, STEPS, cycle_momentum=False),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.1, 1.0, step_size_up=3, cycle_momentum=False),
    "SWALR": lambda opt: SWALR(opt, swa_lr=0.05, anneal_epochs=4),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.5)], milestones=[3]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ConstantLR(opt, total_iters=2),
            lr_scheduler.ExponentialLR(opt, 0.9),
        ]
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # Of SequentialLR itself, in older versions.
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_equals_setting_lr_by_hand(name: str, tensor_lr: bool) -> None:
    scheduled, manual = make_params(), make_params()
    if tensor_lr and torch.__version__ < (2, 7) and name in {"CosineAnnealingWarmRestarts", "SequentialLR"}:
        pytest.skip("of this torch it replaces a tensor")
    optimizer = LearnedOptimizer(scheduled, lr=torch.tensor(1.0) if tensor_lr else 1.0, weights=small_rule())
    by_hand = LearnedOptimizer(manual, weights=small_rule())
    lr = optimizer.param_groups[0]["lr"]
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for step in range(STEPS):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        by_hand.param_groups[0]["lr"] = rates[-1]
        take_steps(optimizer, scheduled, 1, first=step)
        take_steps(by_hand, manual, 1, first=step)
        if step < STEPS - 1:
            scheduler.step()
    assert len(set(rates)) > 1
    torch.testing.assert_close(scheduled, manual, rtol=1e-6, atol=1e-7)
    assert not tensor_lr or optimizer.param_groups[0]["lr"] is lr


def test_reduce_on_plateau() -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, weights=small_rule())
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for step in range(3):
        take_steps(optimizer, params, 1, first=step)
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "build",
    [
        lambda opt: lr_scheduler.OneCycleLR(opt, 1.0, STEPS),
        lambda opt: lr_scheduler.CyclicLR(opt, 0.1, 1.0),
    ],
)
def test_cycling_a_momentum_we_do_not_have_is_an_error_rather_than_silence(build: Callable) -> None:
    optimizer = LearnedOptimizer(make_params(), weights=small_rule())
    with pytest.raises(ValueError, match=r"optimizer must support momentum.*with `?cycle_momentum"):
        build(optimizer)


def test_a_scheduler_and_the_optimizer_resume_together() -> None:
    def build(params: list) -> tuple[LearnedOptimizer, LRScheduler]:
        optimizer = LearnedOptimizer(params, weights=small_rule())
        return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def run(optimizer: LearnedOptimizer, scheduler: LRScheduler, params: list, steps: range) -> None:
        for step in steps:
            take_steps(optimizer, params, 1, first=step)
            scheduler.step()

    params = make_params()
    optimizer, scheduler = build(params)
    run(optimizer, scheduler, params, range(3))
    again = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed, resumed_scheduler = build(again)
    resumed.load_state_dict(optimizer.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    run(optimizer, scheduler, params, range(3, STEPS))
    run(resumed, resumed_scheduler, again, range(3, STEPS))
    assert_identical(again, params)
