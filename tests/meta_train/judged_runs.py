"""What tests of the judging share: one run without an engine, and outcomes that a test writes itself."""

from collections.abc import Callable

import torch

from meta_train.judging.baselines import MakeOptimizer, MakeSchedule, Setting
from meta_train.judging.contestants import Contestant
from meta_train.judging.runner import OptimizeeTrials, Run, Runner, refuse_edge, tune
from meta_train.judging.trial import Outcome, problem_of_optimizee, train
from meta_train.tasks import Optimizee

End = Callable[[Contestant, str], float]
"""From contestant and purpose to the loss at the end of a run."""


def losses_of(optimizee: Optimizee, make: MakeOptimizer, horizon: int, schedule: MakeSchedule | None = None) -> list[float]:
    """The losses of one optimizee."""
    return train(problem_of_optimizee(optimizee), make, horizon, schedule).losses.tolist()


def best_of(group: list[Setting], scores: list[float]) -> Setting:
    """The setting that tuning chooses by its score, where an edge is an error."""
    return tune(group, ["any"], lambda setting, _: scores[group.index(setting)], refuse_edge)[0]["any"]


class WrittenRunner(Runner):
    """Losses go in a line from 10 to an end that the test writes."""

    def __init__(self, end: End) -> None:
        super().__init__()
        self.end = end

    def complete(self, runs: object) -> None:
        """Take every run as finished."""

    def outcome(self, run: Run) -> Outcome:
        """The line."""
        assert isinstance(run.trials, OptimizeeTrials)
        end = self.end(run.contestant, run.trials.purpose)
        return Outcome(torch.linspace(10, end, run.horizon + 1, dtype=torch.float64))
