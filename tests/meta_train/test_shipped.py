"""Tables of shipped weights, from rows written by hand and from small runs."""

import math
from pathlib import Path

import pytest
import torch

from meta_train.judging.baselines import Setting
from meta_train.judging.contestants import Learned
from meta_train.judging.report import judge_suite, read_baselines
from meta_train.judging.runner import Run
from meta_train.judging.shipped import shipped_rows, shipped_summary
from meta_train.judging.suites import Suite, SuiteRunner
from meta_train.judging.trial import Outcome
from meta_train.rows import Row, write_judgement
from meta_train.tasks.case import Case, JudgingTask

MINE, ADAM = Learned("mine", "0" * 64), Setting("Adam", 1e-3)
HORIZON = 20


def _never(seed: int) -> Case:
    raise AssertionError("nothing is to be trained")


class Written(SuiteRunner):
    """Losses at the last weights are 1, 2 and 3 by seed; half of it at averaged ones; Adam's are four times those."""

    def complete(self, runs: object) -> None:
        """Take every run as finished."""

    def outcome(self, run: Run) -> Outcome:
        """Write it."""
        loss = (run.seed + 1) * (1.0 if isinstance(run.contestant, Learned) else 4.0)
        losses = torch.tensor([6.0] * 10 + [2.0] * 9 + [3.0 + run.seed], dtype=torch.float64)
        at = {HORIZON: loss}
        return Outcome(losses, {HORIZON: 10 * loss}, {0: 3.0, **at}, {HORIZON: loss / 2}, {HORIZON: 5 * loss})


@pytest.fixture
def runner(tmp_path: Path) -> SuiteRunner:
    task = JudgingTask("one", "one", _never, (HORIZON,))
    return Written(Suite("written", lambda *_: [task], {}, {}, (ADAM,)), tmp_path / "cache")


def test_every_figure_of_a_row(runner: SuiteRunner) -> None:
    last, averaged = shipped_rows(runner, [("a", MINE, "last"), ("a", ADAM, "averaged")], "one", HORIZON, (0, 1, 2))
    assert last == {
        "task": "one",
        "horizon": HORIZON,
        "optimizer": "a",
        "setting": "",
        "weights": "last",
        "loss": 2,
        "standard_error": round(1 / 3**0.5, 5),
        "held_out": 20,
        "spike": 2.5,
        "early": round((6 * 6 + 5 * 2) / 11 / 3, 4),
        "n": 3,
    }
    assert (averaged["loss"], averaged["held_out"], averaged["setting"]) == (4, 40, "lr=0.001")


def test_a_learned_rule_is_judged_at_both_weights_and_the_tables_serve_again(runner: SuiteRunner, tmp_path: Path) -> None:
    report = judge_suite(runner, [MINE])
    ratios = {(row["weights"], row["against_weights"]): row["ratio"] for row in report.shipped_summary}
    assert ratios == {("last", "last"): 0.25, ("averaged", "last"): 0.125}
    report.sweep.append({"task": "one"})
    write_judgement(report, tmp_path / "earlier")
    again = judge_suite(runner, [MINE], baselines=read_baselines(tmp_path / "earlier"))
    assert again.shipped_summary == report.shipped_summary
    (tmp_path / "earlier" / "shipped.csv").unlink()
    with pytest.raises(ValueError, match="before losses of shipped weights were measured"):
        read_baselines(tmp_path / "earlier")


def _row(task: str, optimizer: str, loss: float, **changes: float | str) -> Row:
    row: Row = {"task": task, "horizon": 5, "optimizer": optimizer, "weights": "last", "loss": loss}
    return {**row, "standard_error": 0.1 * loss, "held_out": loss, "spike": 1.5, "n": 3, **changes}


def test_the_summary_takes_geometric_means_over_tasks() -> None:
    rows = [
        _row("a", "LSTM (x)", 2.0, spike=7.0),
        _row("a", "Adam", 1.0),
        _row("b", "LSTM (x)", 1.0),
        _row("b", "Adam", 8.0),
    ]
    (row,) = shipped_summary(rows)
    assert row == {
        "rule": "LSTM (x)",
        "weights": "last",
        "against": "Adam",
        "against_weights": "last",
        "horizon": 5,
        "ratio": 0.5,
        "standard_error": 0.1,  # Each ratio has 0.1414; of two, the root of the sum of squares over two.
        "spread": round(math.log(16) / 2**0.5, 4),
        "held_out_ratio": 0.5,
        "wins": 1,
        "tasks": 2,
        "worst": 2,
        "worst_task": "a",
        "diverged": 0,
        "against_diverged": 0,
        "spike": 7,
        "against_spike": 1.5,
        "n": 3,
    }


def test_where_an_opponent_diverged_nothing_is_won_and_where_the_rule_did_all_is_lost() -> None:
    rows = [_row("a", "LSTM (x)", 2.0), _row("a", "Adam", math.inf), _row("b", "LSTM (x)", math.inf), _row("b", "Adam", 1.0)]
    (row,) = shipped_summary(rows)
    assert (row["ratio"], row["wins"], row["tasks"], row["worst_task"]) == (math.inf, 0, 1, "b")
    assert (row["diverged"], row["against_diverged"]) == (1, 1)
    (row,) = shipped_summary(rows[:2])
    assert (row["ratio"], row["tasks"], row["worst_task"]) == ("", 0, "none")
