"""Suites: named lists of judging tasks, how baselines are tuned on them, and their runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from meta_train.judging.baselines import NOMINAL, Setting
from meta_train.judging.contestants import Contestant, Learned
from meta_train.judging.real_data import prepared
from meta_train.judging.real_further import judging_tasks
from meta_train.judging.runner import CaseTrials, Progress, Run, Runner, extend_edge, tune
from meta_train.judging.stress import stress_tasks
from meta_train.judging.trial import Outcome, smoothed_final
from meta_train.tasks.case import JudgingTask
from meta_train.tasks.held_out import HELD_OUT_KINDS, LONG_KINDS, SHIPPED_KINDS
from meta_train.workers import Each

TUNING_SEED = 1000
SEEDS = (0, 1, 2)


NOMINAL_RATE = 3.0
"""Rate of our rule without its LSTM: the one with the lowest geometric mean in a sweep on held-out kinds."""


@dataclass(frozen=True)
class Suite:
    """A named list of tasks and how baselines are tuned on them.

    Args:
        name: Name on the command line.
        tasks: Makes the tasks from the cache directory and ``--data``.
        grids: First rates to try for each tuned baseline; a grid is extended where the best rate lies at an end.
        horizon_limits: Longest horizon of a baseline that is not worth running to the end.
        untuned: Settings that are reported without tuning.
        averaged: Tuned baselines whose averaged weights are an opponent too, at the best rate for averaged weights.
    """

    name: str
    tasks: Callable[[Path, Path | None], Sequence[JudgingTask]]
    grids: dict[str, tuple[float, ...]]
    horizon_limits: dict[str, int]
    untuned: tuple[Setting, ...]
    averaged: tuple[str, ...] = ()


_ADAM = Setting("Adam", 1e-3)
_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_COSINE_RATES = (1e-3, 3e-3, 1e-2)
_MOMENTUM = {"NAG": 0.9}
_STRONG = {"Adam": _RATES, "AdamW+cosine": _COSINE_RATES, "Muon": _RATES, "Muon+cosine": _COSINE_RATES}
_AVERAGED = ("Adam", "Muon")
SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "held-out-kinds",
            lambda cache, data: HELD_OUT_KINDS + LONG_KINDS + SHIPPED_KINDS,
            {**_STRONG, NOMINAL: (1.0, 3.0, 10.0)},
            {},
            (_ADAM,),
            _AVERAGED,
        ),
        Suite("stress", lambda cache, data: stress_tasks(), {"Adam": _RATES}, {}, (_ADAM,)),
        Suite(
            "judge",
            lambda cache, data: judging_tasks(*prepared(cache, data)),
            {
                **_STRONG,
                "SGD": (1e-2, 3e-2, 1e-1, 3e-1),
                "NAG": (3e-3, 1e-2, 3e-2, 1e-1),
                "RMSprop": (3e-4, 1e-3, 3e-3),
            },
            {"SGD": 1000, "NAG": 1000, "RMSprop": 1000, "Prodigy": 1000, "ScheduleFree": 1000},
            (_ADAM, Setting("Prodigy", 1.0), Setting("ScheduleFree", 2.5e-3), Setting(NOMINAL, NOMINAL_RATE)),
            _AVERAGED,
        ),
    )
}
"""Synthetic kinds outside the mixture, for selection; the same under stress; and real data, for the judgement."""


class SuiteRunner(Runner):
    """The runs of a suite.

    Args:
        suite: What to run.
        cache: Directory of outcomes; the suite has a directory of its own below it.
        data: Directory of real data, for suites that need it.
        horizon: Leave out longer horizons, and tasks that have no others.
        each: Goes over the runs.
        progress: Shows the progress through a list of runs.
        only: Names of the tasks to judge on; empty for all.

    Raises:
        ValueError: If the suite has no task of a name, or no horizon that is short enough.
    """

    def __init__(
        self,
        suite: Suite,
        cache: Path,
        data: Path | None = None,
        horizon: int | None = None,
        each: Each = map,
        progress: Progress = lambda runs, total: runs,
        only: Sequence[str] = (),
    ) -> None:
        directory = cache / suite.name
        super().__init__(directory, each, progress)
        directory.mkdir(parents=True, exist_ok=True)
        self.suite = suite
        self.tried: dict[tuple[str, str], list[Setting]] = {}
        self.best_averaged: dict[tuple[str, str, int], Setting] = {}
        every = {task.name: task for task in suite.tasks(directory, data)}
        if unknown := [name for name in only if name not in every]:
            raise ValueError(f"the suite {suite.name} has no task {unknown[0]!r}; it has {', '.join(every)}")
        chosen = [task for name, task in every.items() if not only or name in only]
        limit = math.inf if horizon is None else horizon
        limited = [replace(task, horizons=tuple(end for end in task.horizons if end <= limit)) for task in chosen]
        self.tasks = {task.name: task for task in limited if task.horizons}
        if short := [task for task in chosen if task.name not in self.tasks and (only or not self.tasks)]:
            least = min(short, key=lambda task: min(task.horizons))
            raise ValueError(
                f"a longest horizon of {horizon} leaves nothing of {least.name}; its shortest is {min(least.horizons)}"
            )
        # A run holds every horizon of its task, so that a later judgement finds them too.
        self.trials = {name: CaseTrials(every[name], (_again, (suite.name, directory, data, name))) for name in self.tasks}

    def horizons_of(self, contestant: Contestant, task: JudgingTask) -> list[int]:
        """Return the horizons at which a contestant is measured."""
        limits = self.suite.horizon_limits
        if isinstance(contestant, Setting) and contestant.optimizer in task.without:
            return []
        limit = limits.get(contestant.optimizer, math.inf) if isinstance(contestant, Setting) else math.inf
        return [end for end in task.horizons if end <= limit]

    def runs_of(self, contestant: Contestant, task: JudgingTask, seeds: Sequence[int]) -> list[Run]:
        """Return the runs that give a contestant's result at every horizon: a schedule needs a run for each horizon."""
        if isinstance(contestant, Learned) and task.decay:
            contestant = replace(contestant, decay=task.decay)
        horizons = self.horizons_of(contestant, task)
        chosen = horizons if contestant.schedule else horizons[-1:]
        return [Run(self.trials[task.name], contestant, end, seed) for end in chosen for seed in seeds]

    def outcomes(self, contestant: Contestant, task: str, horizon: int, seeds: Sequence[int]) -> list[Outcome]:
        """Return a contestant's outcomes for a horizon, from a longer run where no schedule depends on the horizon."""
        runs = self.runs_of(contestant, self.tasks[task], seeds)
        return [self.outcome(run) for run in runs if run.horizon == horizon or not run.contestant.schedule]

    def final(self, contestant: Contestant, task: str, horizon: int, seeds: Sequence[int]) -> Tensor:
        """Return the smoothed final training loss of each seed."""
        return torch.stack([smoothed_final(one.losses, horizon) for one in self.outcomes(contestant, task, horizon, seeds)])

    def shipped(self, contestant: Contestant, task: str, horizon: int, seeds: Sequence[int], measure: str) -> Tensor:
        """Return a measure of each seed at the weights that are shipped; infinite where the run diverged.

        Args:
            contestant: Any contestant.
            task: Name of the task.
            horizon: Inner steps.
            seeds: Seeds of the runs.
            measure: Name of a field of :class:`~meta_train.judging.trial.Outcome` that holds values by horizon.

        Returns:
            One value for each seed.
        """
        values = [getattr(one, measure).get(horizon, math.inf) for one in self.outcomes(contestant, task, horizon, seeds)]
        return torch.tensor([value if math.isfinite(value) else math.inf for value in values], dtype=torch.float64)

    def tune(self) -> dict[tuple[str, str, int], Setting]:
        """Tune every baseline on every task for every horizon, extending grids until no best rate lies at an end.

        The best rate has the lowest training loss at the last weights. Where averaged weights are an opponent,
        ``best_averaged`` holds the settings with the lowest loss at averaged weights.

        Returns:
            Settings by task, baseline and horizon.
        """
        self.tried = {
            (task, name): [setting_of(name, lr) for lr in grid]
            for task in self.tasks
            for name, grid in self.suite.grids.items()
            if name not in self.tasks[task].without
        }
        while True:
            runs = (
                self.runs_of(one, self.tasks[task], (TUNING_SEED,))
                for (task, _), group in self.tried.items()
                for one in group
            )
            self.complete(run for of_setting in runs for run in of_setting)
            best: dict[tuple[str, str, int], Setting] = {}
            complete = True
            for (task, name), group in self.tried.items():
                ends = self.horizons_of(group[0], self.tasks[task])
                measures = ("final_loss", "averaged_loss") if name in self.suite.averaged else ("final_loss",)
                looks = [(end, measure) for end in ends for measure in measures]
                chosen, missing = tune(group, looks, functools.partial(self._score, task), extend_edge)
                for (end, measure), setting in chosen.items():
                    (best if measure == "final_loss" else self.best_averaged)[task, name, end] = setting
                group.extend(missing)
                complete &= not missing
            if complete:
                return best

    def _score(self, task: str, setting: Setting, look: tuple[int, str]) -> float:
        horizon, measure = look
        return float(self.shipped(setting, task, horizon, (TUNING_SEED,), measure).mean())


def setting_of(name: str, lr: float) -> Setting:
    """Return the setting of a tuned baseline at a rate."""
    return Setting(name, lr, _MOMENTUM.get(name, 0.0))


@functools.cache
def _tasks(suite: str, directory: Path, data: Path | None) -> dict[str, JudgingTask]:
    return {task.name: task for task in SUITES[suite].tasks(directory, data)}


@functools.cache
def _again(suite: str, directory: Path, data: Path | None, name: str) -> CaseTrials:
    """Find the trials of a task in another process."""
    return CaseTrials(_tasks(suite, directory, data)[name])
