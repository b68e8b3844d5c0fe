"""The tables of a judgement, from outcomes written by hand: every figure is known beforehand."""

import math
from pathlib import Path

import pytest
import torch

from meta_train.evidence.cards import RESULTS
from meta_train.judging.baselines import Setting
from meta_train.judging.contestants import Contestant, Learned
from meta_train.judging.report import Report, _ratios, _summary, judge_suite
from meta_train.judging.runner import CaseTrials, Run
from meta_train.judging.suites import SEEDS, TUNING_SEED, Suite, SuiteRunner
from meta_train.judging.trial import Outcome, smoothed_final
from meta_train.rows import read_rows, write_rows
from meta_train.tasks.case import Case, JudgingTask

MINE, ADAM = Learned("mine", "0" * 64), Setting("Adam", 1e-3)
HORIZON = 20


def _never(seed: int) -> Case:
    raise AssertionError("nothing is to be trained")


class Written(SuiteRunner):
    """Outcomes by task and contestant, one for each seed; of each a final and a held-out loss."""

    outcomes_of: dict[tuple[str, Contestant], list[tuple[float, float | None]]]

    def complete(self, runs: object) -> None:
        """Take every run as finished."""

    def outcome(self, run: Run) -> Outcome:
        """Return losses that start at 10 for mine and at 20 for others, and end around the final one; then a huge one."""
        assert isinstance(run.trials, CaseTrials)
        final, held_out = self.outcomes_of[run.trials.task.name, run.contestant][run.seed]
        start = 10.0 if isinstance(run.contestant, Learned) else 20.0
        losses = torch.tensor([start] * (HORIZON - 2) + [final - 0.25, final + 0.25] + [1e6] * 10)
        return Outcome(losses, {30: 1e6} | ({} if held_out is None else {HORIZON: held_out}))


def judged(cache: Path, written: dict[tuple[str, Contestant], list[tuple[float, float | None]]]) -> Report:
    """Judge mine against an untuned Adam on the tasks that are written about."""
    names = dict.fromkeys(task for task, _ in written)
    tasks = [JudgingTask(name, name, _never, (HORIZON,)) for name in names]
    runner = Written(Suite("written", lambda *_: tasks, {}, {}, (ADAM,)), cache)
    runner.outcomes_of = written
    return judge_suite(runner, [MINE])


WRITTEN = {
    ("one", MINE): [(1.0, 3.0), (2.0, 4.0), (3.0, 5.0)],
    ("one", ADAM): [(3.0, 1.0), (4.0, 2.0), (5.0, 3.0)],
    ("two", MINE): [(7.0, 1.0), (8.0, 2.0), (9.0, 3.0)],
    ("two", ADAM): [(0.5, 15.0), (1.0, 16.0), (1.5, 17.0)],
}


def test_results_are_means_over_seeds_with_their_standard_error(tmp_path: Path) -> None:
    of_all = {"horizon": HORIZON, "n": 3}
    mine, adam = {"optimizer": "LSTM (mine)", "setting": ""}, {"optimizer": "Adam(0.001)", "setting": "lr=0.001"}
    one = round(1 / 3**0.5, 5)  # Finals one apart: their standard deviation is 1, and there are three.
    assert judged(tmp_path, WRITTEN).results == [
        {**of_all, "task": "one", **mine, "final": 2, "standard_error": one, "mean_over_run": 9.2, "held_out": 4},
        {**of_all, "task": "one", **adam, "final": 4, "standard_error": one, "mean_over_run": 18.4, "held_out": 2},
        {**of_all, "task": "two", **mine, "final": 8, "standard_error": one, "mean_over_run": 9.8, "held_out": 2},
        {**of_all, "task": "two", **adam, "final": 1, "standard_error": 0.28868, "mean_over_run": 18.1, "held_out": 16},
    ]


def test_ratios_are_the_rule_s_loss_over_the_baseline_s(tmp_path: Path) -> None:
    of_all = {"horizon": HORIZON, "rule": "LSTM (mine)", "against": "Adam(0.001)", "n": 3}
    # Relative errors of both sides, whose squares add up: 0.2887 and 0.1443, then 0.0722 and 0.2887.
    assert judged(tmp_path, WRITTEN).ratios == [
        {**of_all, "task": "one", "ratio": 0.5, "log_standard_error": 0.32275, "held_out_ratio": 2},
        {**of_all, "task": "two", "ratio": 8, "log_standard_error": 0.29756, "held_out_ratio": 0.125},
    ]


def test_the_summary_takes_geometric_means_and_counts_wins(tmp_path: Path) -> None:
    (row,) = judged(tmp_path, WRITTEN).summary
    assert row == {
        "rule": "LSTM (mine)",
        "against": "Adam(0.001)",
        "horizon": HORIZON,
        "ratio": 2,
        "held_out_ratio": 0.5,
        "wins": 1,
        "tasks": 2,
        "worst": 8,
        "worst_task": "two",
        "diverged": 0,
    }


@pytest.mark.parametrize(("task", "wins"), [("one", 1), ("two", 0)])
def test_a_lower_loss_is_a_win(task: str, wins: int, tmp_path: Path) -> None:
    (row,) = judged(tmp_path, {key: outcomes for key, outcomes in WRITTEN.items() if key[0] == task}).summary
    assert (row["wins"], row["tasks"]) == (wins, 1)


def test_a_single_seed_has_no_standard_error(tmp_path: Path) -> None:
    tasks = [JudgingTask("one", "one", _never, (HORIZON,))]
    runner = Written(Suite("written", lambda *_: tasks, {}, {}, (ADAM,)), tmp_path)
    runner.outcomes_of = WRITTEN
    report = judge_suite(runner, [MINE], seeds=(1,))
    assert [row["standard_error"] for row in report.results] == ["", ""]
    assert [row["log_standard_error"] for row in report.ratios] == [""]


def test_a_baseline_that_diverges_is_no_win(tmp_path: Path) -> None:
    """A ratio to infinity is 0, and a geometric mean with it in it too, whatever the other tasks say."""
    broken = {("one", ADAM): [(3.0, 1.0), (math.inf, None), (5.0, 3.0)]}
    report = judged(tmp_path, WRITTEN | broken)
    of_adam = report.results[1]
    assert (of_adam["final"], of_adam["held_out"], of_adam["standard_error"]) == (math.inf, math.inf, "")
    ratio = report.ratios[0]
    assert all(math.isnan(float(ratio[name])) for name in ("ratio", "held_out_ratio"))
    (row,) = report.summary
    assert (row["ratio"], row["held_out_ratio"], row["worst"], row["worst_task"]) == (8, 0.125, 8, "two")
    assert (row["wins"], row["tasks"], row["diverged"], row["baseline_diverged"]) == (0, 1, 0, 1)


def test_a_rule_that_diverges_once_has_lost(tmp_path: Path) -> None:
    broken = {("one", MINE): [(1.0, 3.0), (math.inf, None), (3.0, math.nan)]}
    report = judged(tmp_path, WRITTEN | broken)
    assert (report.results[0]["final"], report.results[0]["held_out"]) == (math.inf, math.inf)
    (row,) = report.summary
    assert (row["ratio"], row["held_out_ratio"], row["worst"], row["worst_task"]) == (math.inf, math.inf, math.inf, "one")
    assert (row["wins"], row["tasks"], row["diverged"]) == (0, 2, 1)
    assert "baseline_diverged" not in row


def test_where_both_diverge_both_are_counted_and_nothing_is_compared(tmp_path: Path) -> None:
    nothing = [(math.inf, None)] * 3
    (row,) = judged(tmp_path, WRITTEN | {("one", MINE): nothing, ("one", ADAM): nothing}).summary
    assert (row["ratio"], row["tasks"], row["diverged"], row["baseline_diverged"]) == (8, 1, 1, 1)
    report = judged(tmp_path, {("one", MINE): nothing, ("one", ADAM): nothing})
    assert report.results[0]["held_out"] == "", "no one is known to have held-out examples"
    (row,) = report.summary
    assert math.isnan(float(row["ratio"]))
    assert (row["wins"], row["tasks"], row["worst_task"]) == (0, 0, "none")


def test_a_loss_of_zero_is_a_figure(tmp_path: Path) -> None:
    nothing = [(0.25, 0.0)] * 3  # The last two losses are 0 and 0.5.
    report = judged(tmp_path, {("one", MINE): nothing, ("one", ADAM): nothing})
    assert [(row["ratio"], row["held_out_ratio"]) for row in report.ratios] == [(1, 1)]


@pytest.mark.parametrize("name", ["judge", "judge-long", "stress", "lr"])
def test_committed_summaries_follow_from_the_committed_results(name: str, tmp_path: Path) -> None:
    rows = {table: read_rows(RESULTS / name / f"{table}.csv") for table in ("results", "ratios", "summary")}
    cases = dict.fromkeys((row["task"], row["horizon"]) for row in rows["results"])
    ratios = [
        ratio for case in cases for ratio in _ratios([r for r in rows["results"] if (r["task"], r["horizon"]) == case])
    ]
    for table, made in (("ratios", ratios), ("summary", _summary(ratios, rows["results"]))):  # type: ignore[arg-type]
        write_rows(tmp_path / table, made)
        assert (tmp_path / table).read_text() == (RESULTS / name / f"{table}.csv").read_text()


@pytest.mark.parametrize(("horizon", "mean"), [(30, 28.0), (20, 18.5), (7, 6.0), (1, 0.0)])
def test_the_final_loss_is_the_mean_of_the_last_tenth(horizon: int, mean: float) -> None:
    losses = torch.arange(40.0)
    assert smoothed_final(losses, horizon) == mean
    assert smoothed_final(torch.where(losses == horizon - 1, math.inf, losses), horizon) == math.inf


def test_drawn_curves_are_smoothed_over_the_seeds(tmp_path: Path) -> None:
    ends = {row["inner_step"]: row["loss"] for row in judged(tmp_path, WRITTEN).curves if row["optimizer"] == "LSTM (mine)"}
    assert (min(ends), max(ends)) == (2, HORIZON)
    assert (ends[2], ends[HORIZON]) == (10, 8)


def test_a_baseline_that_is_not_worth_running_to_the_end_has_no_row_there(tmp_path: Path) -> None:
    task = JudgingTask("one", "one", _never, (HORIZON, 30))
    runner = Written(Suite("written", lambda *_: [task], {}, {"Adam": HORIZON}, (ADAM,)), tmp_path)
    runner.outcomes_of = WRITTEN
    rows = [(row["optimizer"], row["horizon"]) for row in judge_suite(runner, [MINE]).results]
    assert rows == [("LSTM (mine)", HORIZON), ("Adam(0.001)", HORIZON), ("LSTM (mine)", 30)]
    assert {(run.horizon, run.seed) for run in runner.runs_of(ADAM, task, SEEDS)} == {(HORIZON, seed) for seed in SEEDS}
    assert TUNING_SEED not in SEEDS
