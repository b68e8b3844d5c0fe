"""What one judged training run does with schedule, momentum, evaluation mode and horizons."""

import copy
import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from meta_train.judging.averages import AveragedWeights
from meta_train.judging.baselines import Setting
from meta_train.judging.contestants import DECAYS, learned
from meta_train.judging.runner import Run, read_outcome, write_outcome
from meta_train.judging.suites import SUITES, Suite, SuiteRunner, setting_of
from meta_train.judging.trial import Outcome, early_loss, spike, train_case
from meta_train.tasks import derive_seed
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


def test_measuring_leaves_no_trace_in_what_is_trained() -> None:
    cases: list[Case] = []
    task = JudgingTask("moody", "moody", lambda seed: cases.append(_case(seed)) or cases[0], (5, 10))
    outcome = train_case(task, Setting("SGD", 0.1).make, 10, 0)
    assert cases[0].module.modes == [(False, True)] * 10, "training minibatches in training mode, and nothing else"
    module = cases[0].module.eval()
    assert outcome.held_out[10] == pytest.approx(regression_loss(module, HELD_OUT).item())


def _noisy_case(seed: int) -> Case:
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(8, 4, generator=generator)
        return x, x[:, :1] + torch.randn(8, 1, generator=generator)

    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
    return Case(module, regression_loss, batch, [batch(torch.Generator().manual_seed(3))])


NOISY = JudgingTask("noisy", "noisy", _noisy_case, (30, 60))


def _by_hand(horizon: int, lr: float) -> tuple[Case, nn.Module]:
    """Train without the judge, and return the case and a module at weights averaged from the closed formula."""
    case = NOISY.case(0)
    optimizer, draws = SGD(case.module.parameters(), lr=lr), torch.Generator().manual_seed(derive_seed(0, "minibatches"))
    average = copy.deepcopy(case.module)
    for step in range(1, horizon + 1):
        optimizer.zero_grad()
        case.loss(case.module, case.next_batch(draws)).backward()
        optimizer.step()
        with torch.no_grad():
            for mean, param in zip(average.parameters(), case.module.parameters(), strict=True):
                mean += (param - mean) * (1 - 0.5 ** (1 / max(1, 0.05 * step)))
    return case, average


def test_the_readouts_are_losses_of_the_last_and_of_averaged_weights() -> None:
    outcome = train_case(NOISY, functools.partial(SGD, lr=0.3), 60, 0)
    case, average = _by_hand(60, 0.3)
    draws = torch.Generator().manual_seed(derive_seed(0, "fresh minibatches"))
    fresh = [case.next_batch(draws) for _ in range(64)]
    inputs = torch.stack([average[0](x).detach() for x, _ in fresh])  # Mean over minibatches of the moments that each has.
    average[1].running_mean.copy_(inputs.mean((0, 1)))
    average[1].running_var.copy_(inputs.var(1).mean(0))
    for module, training, held_out in (
        (case.module, outcome.final_loss, outcome.held_out),
        (average, outcome.averaged_loss, outcome.averaged_held_out),
    ):
        module.eval()
        assert training[60] == pytest.approx(sum(case.loss(module, batch).item() for batch in fresh) / 64, rel=1e-5)
        assert held_out[60] == pytest.approx(case.loss(module, case.held_out[0]).item(), rel=1e-5)
    assert outcome.averaged_loss[60] < outcome.final_loss[60]
    assert (set(outcome.averaged_loss), set(outcome.final_loss)) == ({30, 60}, {0, 30, 60})


def test_the_half_life_is_a_twentieth_of_the_steps_taken() -> None:
    weight = torch.zeros(1)
    average = AveragedWeights([weight])
    for _ in range(2000):
        average.update()
    weight.fill_(1.0)
    for _ in range(round(0.05 * 2000)):
        average.update()
    assert float(average.values[0]) == pytest.approx(0.5, abs=0.02)


def test_spikes_are_looked_for_in_the_second_half() -> None:
    losses = torch.tensor([90.0, 9.0, 2.0, 2.0, 6.0, 2.0, 1.0, 50.0])
    assert spike(losses, 7) == 3
    assert spike(torch.where(losses == 6, math.inf, losses), 7) == math.inf


def test_the_first_steps_are_compared_with_the_start() -> None:
    losses = torch.tensor([9.0] * 4 + [4.0] * 11 + [1.0] * 5, dtype=torch.float64)
    assert early_loss(Outcome(losses, final_loss={0: 2.0})) == 2
    assert math.isnan(early_loss(Outcome(losses)))


def test_a_kept_run_carries_every_measure(tmp_path: Path) -> None:
    outcome = train_case(NOISY, functools.partial(SGD, lr=0.3), 60, 0)
    write_outcome(tmp_path / "run", outcome, {})
    again = read_outcome(tmp_path / "run")
    assert torch.equal(again.losses, outcome.losses)
    for name in ("held_out", "final_loss", "averaged_loss", "averaged_held_out"):
        assert getattr(again, name) == getattr(outcome, name) != {}


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


def test_a_schedule_is_attached_to_learned_rules_and_other_runs_are_shared(tmp_path: Path) -> None:
    plain = JudgingTask("moody", "moody", _case, (5, 10))
    decayed = plain.decayed("linear")
    runner = SuiteRunner(Suite("any", lambda *_: [plain, decayed], {}, {}, ()), tmp_path)
    rule, adam = learned("default"), Setting("Adam", 1e-3)
    assert [run.file for run in runner.runs_of(adam, plain, (0,))] == [
        run.file for run in runner.runs_of(adam, decayed, (0,))
    ]
    ours = runner.runs_of(rule, decayed, (0,))
    assert [run.horizon for run in ours] == [5, 10], "a schedule needs a run for each horizon"
    assert not {run.file for run in ours} & {run.file for run in runner.runs_of(rule, plain, (0,))}
    (outcome,) = runner.outcomes(rule, "moody, linear", 5, (0,))
    rates = []

    def make(params: object) -> Optimizer:
        optimizer = rule.make(params)  # type: ignore[arg-type]
        optimizer.register_step_pre_hook(lambda one, *_: rates.append(one.param_groups[0]["lr"]))
        return optimizer

    assert torch.equal(outcome.losses, train_case(plain, make, 5, 0, DECAYS["linear"]).losses)
    assert rates == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_a_task_can_leave_baselines_out(tmp_path: Path) -> None:
    task = JudgingTask("moody", "moody", _case, (5,), without=("SGD",))
    runner = SuiteRunner(Suite("any", lambda *_: [task], {"Adam": (1e-2, 3e-2), "SGD": (1e-2, 3e-2)}, {}, ()), tmp_path)
    assert {name for _, name, _ in runner.tune()} == {"Adam"}
    assert runner.runs_of(Setting("SGD", 0.1), task, (0,)) == []


class TwoBests(SuiteRunner):
    """The last weights are best at a rate of 0.01, averaged ones at 0.1."""

    def complete(self, runs: object) -> None:
        """Take every run as finished."""

    def outcome(self, run: Run) -> Outcome:
        """Write losses at the end alone."""
        last, averaged = (1 + abs(math.log(run.contestant.lr / best)) for best in (0.01, 0.1))
        return Outcome(torch.ones(run.horizon), final_loss={60: last}, averaged_loss={60: averaged})


def test_averaged_weights_are_tuned_for_themselves(tmp_path: Path) -> None:
    task, grid = replace(NOISY, horizons=(60,)), {"SGD": (0.003, 0.01, 0.03), "NAG": (0.003, 0.01, 0.03)}
    runner = TwoBests(Suite("any", lambda *_: [task], grid, {}, (), ("SGD",)), tmp_path)
    assert {name: one.lr for (_, name, _), one in runner.tune().items()} == {"SGD": 0.01, "NAG": 0.01}
    assert {name: one.lr for (_, name, _), one in runner.best_averaged.items()} == {"SGD": 0.1}


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
    to_the_end = ("Adam", "AdamW+cosine", "Muon", "Muon+cosine")
    assert ends == dict.fromkeys(names, 1000) | dict.fromkeys(to_the_end, 5000)
    for name, end in ends.items():
        runs = [run.horizon for run in runner.runs_of(Setting(name, 1.0), task, (0,))]
        assert runs == ([200, 1000, 5000] if name.endswith("+cosine") else [end]), "a schedule needs a run for each horizon"
