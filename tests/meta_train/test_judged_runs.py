"""What one judged training run does with schedule, momentum, evaluation mode and horizons."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from meta_train.judging.baselines import Setting
from meta_train.judging.suites import SUITES, Suite, SuiteRunner, setting_of
from meta_train.judging.trial import train_case
from meta_train.tasks.case import Case, JudgingTask, regression_loss

HELD_OUT = (torch.ones(4, 2), torch.ones(4, 1))


class Moody(nn.Linear):
    """A line that notes the mode in which it was asked."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Note the mode, and whether the examples are held-out ones."""
        self.modes.append((x is HELD_OUT[0], self.training))
        return super().forward(x)


def _case(seed: int) -> Case:
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(8, 2, generator=generator)
        return x, x.sum(1, keepdim=True)

    return Case(Moody(), regression_loss, batch, [HELD_OUT])


TASK = JudgingTask("moody", "moody", _case, (5, 10))


@pytest.mark.parametrize("horizon", [5, 10])
def test_a_cosine_is_stepped_to_zero_at_the_horizon_of_the_run(horizon: int) -> None:
    setting, rates = Setting("AdamW+cosine", 0.1), []

    def make(params: object) -> Optimizer:
        optimizer = setting.make(params)  # type: ignore[arg-type]
        optimizer.register_step_pre_hook(lambda one, *_: rates.append(one.param_groups[0]["lr"]))
        return optimizer

    train_case(TASK, make, horizon, 0, setting.schedule)
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / horizon)) for step in range(horizon)])


def test_held_out_examples_are_seen_in_evaluation_mode_and_no_others() -> None:
    cases: list[Case] = []
    task = JudgingTask("moody", "moody", lambda seed: cases.append(_case(seed)) or cases[0], (5, 10))
    outcome = train_case(task, Setting("SGD", 0.1).make, 10, 0)
    training, held_out = (False, True), (True, False)
    assert cases[0].module.modes == [*[training] * 5, held_out, *[training] * 5, held_out]  # type: ignore[operator]
    module = cases[0].module.eval()
    assert outcome.held_out[10] == pytest.approx(regression_loss(module, HELD_OUT).item())


class TwoPoints(SGD):
    """Trains at one point and is to be evaluated at another, as schedule-free optimizers are."""

    def _move(self, by: float) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.add_(by)

    def eval(self) -> None:
        """Go to the other point."""
        self._move(100.0)

    def train(self) -> None:
        """Come back."""
        self._move(-100.0)


def test_held_out_losses_are_those_of_the_averaged_point() -> None:
    plain, moved = (train_case(TASK, lambda params, make=make: make(params, lr=1e-3), 10, 0) for make in (SGD, TwoPoints))
    torch.testing.assert_close(moved.losses.float(), plain.losses.float(), msg="training goes on where it was")
    assert all(moved.held_out[end] > 1e4 > plain.held_out[end] for end in (5, 10))


def test_schedule_free_is_judged_so() -> None:
    pytest.importorskip("schedulefree")
    optimizer = Setting("ScheduleFree", 0.1).make([nn.Parameter(torch.ones(2))])
    assert optimizer.param_groups[0]["train_mode"]
    assert callable(optimizer.eval)  # type: ignore[attr-defined]


def test_nesterov_is_tuned_with_momentum_and_nothing_else_has_any(tmp_path: Path) -> None:
    task = JudgingTask("moody", "moody", _case, (5,))
    runner = SuiteRunner(Suite("any", lambda *_: [task], {"NAG": (1e-2, 3e-2), "SGD": (1e-2, 3e-2)}, {}, ()), tmp_path)
    assert {(setting.optimizer, setting.momentum) for setting in runner.tune().values()} == {("NAG", 0.9), ("SGD", 0.0)}
    nesterov, plain = (setting_of(name, 0.1).make([nn.Parameter(torch.ones(1))]).param_groups[0] for name in ("NAG", "SGD"))
    assert (nesterov["momentum"], nesterov["nesterov"]) == (0.9, True)
    assert (plain["momentum"], plain["nesterov"]) == (0, False)


def test_some_baselines_of_the_judgement_are_followed_to_1000_steps_alone(tmp_path: Path) -> None:
    task = JudgingTask("any", "any", _case, (200, 1000, 5000))
    judge = SUITES["judge"]
    runner = SuiteRunner(Suite("judge", lambda *_: [task], judge.grids, judge.horizon_limits, judge.untuned), tmp_path)
    names = (*judge.grids, "Prodigy", "ScheduleFree")
    ends = {name: runner.horizons_of(Setting(name, 1.0), task)[-1] for name in names}
    assert ends == dict.fromkeys(names, 1000) | {"Adam": 5000, "AdamW+cosine": 5000}
    for name, end in ends.items():
        runs = [run.horizon for run in runner.runs_of(Setting(name, 1.0), task, (0,))]
        assert runs == ([200, 1000, 5000] if name == "AdamW+cosine" else [end]), "a schedule needs a run for each horizon"
