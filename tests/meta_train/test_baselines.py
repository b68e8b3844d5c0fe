"""Baselines are judged kindly and tuned for real; a comparison with a badly tuned one is worth nothing."""

import math

import pytest
import torch

from learned_optim import Weights
from meta_train.judging import arena_report as evaluate
from meta_train.judging.arenas import Arena
from meta_train.judging.baselines import CLASSIFICATION, FIXED, QUADRATIC, QUARTIC, UNTUNED, Setting, settings
from meta_train.judging.contestants import Contestant, learned_with
from meta_train.judging.runner import Runner
from meta_train.judging.trial import curves, measure
from meta_train.tasks import Quadratic
from tests.cases import small_rule
from tests.meta_train.judged_runs import WrittenRunner, best_of, losses_of

TASK = Quadratic(dimension=2, functions=3)


def test_the_highest_momentum_is_an_edge_and_the_lowest_is_not() -> None:
    group = settings("NAG", [0.1, 1.0, 10.0], (0.5, 0.9))
    scores = {m: [0.0 if (s.lr, s.momentum) == (1.0, m) else 1.0 for s in group] for m in (0.5, 0.9)}
    assert best_of(group, scores[0.5]) == Setting("NAG", 1.0, 0.5)
    with pytest.raises(ValueError, match=r"best momentum of NAG is 0\.9, at the edge"):
        best_of(group, scores[0.9])


@pytest.mark.parametrize("sweep", [QUADRATIC, QUARTIC, CLASSIFICATION, FIXED, UNTUNED])
def test_every_setting_makes_its_optimizer_and_has_a_text_of_its_own(sweep: list[Setting]) -> None:
    params = [torch.nn.Parameter(torch.zeros(2))]
    for setting in sweep:
        (group,) = setting.make(params).param_groups
        assert group["lr"] == setting.lr
        assert group.get("momentum", 0) == setting.momentum
        assert group.get("nesterov", False) == (setting.optimizer == "NAG")
    assert len({(setting.optimizer, str(setting)) for setting in sweep}) == len(sweep)


def test_a_cosine_ends_at_rate_zero_and_gets_a_run_for_each_horizon() -> None:
    seen = {}
    setting = Setting("AdamW+cosine", 0.1)

    def make(params):
        seen["optimizer"] = setting.make(params)
        return seen["optimizer"]

    losses_of(TASK.sample(0), make, 10, setting.schedule)
    assert seen["optimizer"].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    runs = evaluate.ArenaRuns(Arena(TASK, [setting], tuning=1, fresh=1), Runner())
    assert runs.of(setting, 100, "tuning").shape == (1, 101)
    assert runs.of(setting, 200, "tuning").shape == (1, 201)
    assert runs.of(Setting("Adam", 0.1), 100, "tuning").shape == (1, 201)


def test_tuning_passes_over_a_setting_that_diverges_on_fresh_optimizees() -> None:
    tempting, safe = Setting("SGD", 1.0), Setting("SGD", 0.1)

    def end(contestant: Contestant, purpose: str) -> float:
        return 0.5 if contestant == safe else 5.0 if contestant != tempting else 1e9 if purpose == "evaluation" else 0.1

    group = [Setting("SGD", 0.01), safe, tempting, Setting("SGD", 10.0)]
    runs = evaluate.ArenaRuns(Arena(TASK, group, tuning=2, fresh=2), WrittenRunner(end))
    assert runs.stays(safe, ("final", 100))
    assert not runs.stays(tempting, ("final", 100))
    assert evaluate._tuned(runs, group, ("final", 100)) == {"SGD": safe}


def test_a_run_that_breaks_is_infinite_from_there_on() -> None:
    losses = losses_of(TASK.sample(0), Setting("SGD", 1e30).make, 20)
    assert len(losses) == 21
    assert losses[-1] == math.inf
    assert math.isfinite(losses[0])


def test_sum_leaves_the_last_loss_out_and_final_is_it() -> None:
    losses = torch.arange(12, dtype=torch.float64).expand(2, -1)
    assert measure("sum", losses, 10).tolist() == [45, 45]
    assert measure("final", losses, 10).tolist() == [10, 10]
    assert measure("final", losses, 10, last=3).tolist() == [9, 9]


def test_tuning_and_fresh_optimizees_differ() -> None:
    starts = [curves(TASK, Setting("SGD", 0.1).make, 0, purpose, 3) for purpose in ("tuning", "evaluation")]
    assert not set(starts[0].flatten().tolist()) & set(starts[1].flatten().tolist())


def test_a_rule_at_rest_is_what_it_is_in_the_tables() -> None:
    rule = small_rule("paper-raw")
    with torch.no_grad():
        for parameter in rule.readout.parameters():
            parameter.zero_()
    losses = curves(TASK, learned_with(Weights(rule, "still")), 3, "evaluation", 2)
    assert torch.equal(losses, losses[:, :1].expand(-1, 4))
