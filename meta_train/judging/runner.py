"""Run a suite of judging tasks: tune the baselines, run everything on fresh seeds, reuse whatever was run before.

Each run is one file named by a hash of all that decides it, so an interrupted judgement goes on and only what changed is run
again. Baselines are tuned, per task and horizon, on a seed of their own; a best rate at the edge of its grid extends it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import ParamsT

from learned_optim import LearnedOptimizer
from learned_optim.weights import Weights, resolve_weights
from meta_train.files import write_atomically
from meta_train.judging.baselines import Setting
from meta_train.judging.real import real_tasks
from meta_train.judging.real_data import prepared
from meta_train.judging.stress import stress_tasks
from meta_train.judging.trial import Outcome, train_case
from meta_train.provenance import here
from meta_train.tasks.case import JudgingTask
from meta_train.tasks.held_out import HELD_OUT_KINDS, LONG_KINDS
from meta_train.workers import Workers

TUNING_SEED = 1000
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Learned:
    """A learned rule as a contestant.

    Args:
        name: In tables.
        weights: Bundled name, file or Hub id.
        fingerprint: Of the weights.
        lr: Factor on the update.
    """

    name: str
    weights: str
    fingerprint: str
    lr: float = 1.0
    schedule: None = None

    def make(self, params: ParamsT) -> Optimizer:
        """Build the shipped optimizer."""
        return LearnedOptimizer(params, lr=self.lr, weights=_resolved(self.weights))


Contestant = Setting | Learned


@functools.cache
def _resolved(name: str) -> Weights:
    return resolve_weights(name)


def learned(name: str, lr: float = 1.0) -> Learned:
    """Return weights as a contestant.

    Args:
        name: Bundled name, file or Hub id.
        lr: Factor on the update.

    Returns:
        The contestant.
    """
    return Learned(Path(name).stem if name.endswith(".safetensors") else name, name, _resolved(name).fingerprint, lr)


@dataclass(frozen=True)
class Suite:
    """A named list of tasks and how baselines are tuned on them.

    Args:
        name: On the command line.
        tasks: Makes the tasks from the cache directory and ``--data``.
        grids: First rates tried of each tuned baseline; extended where the best lies at an end.
        horizon_limits: Longest horizon of a baseline that is not worth running to the end.
        untuned: Settings that are reported as they are.
    """

    name: str
    tasks: Callable[[Path, Path | None], Sequence[JudgingTask]]
    grids: dict[str, tuple[float, ...]]
    horizon_limits: dict[str, int]
    untuned: tuple[Setting, ...]


_ADAM = Setting("Adam", 1e-3)
_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "held-out-kinds", lambda cache, data: HELD_OUT_KINDS + LONG_KINDS, {"Adam": _RATES}, {}, (Setting("Adam", 1e-3),)
        ),
        Suite("stress", lambda cache, data: stress_tasks(), {"Adam": _RATES}, {}, (Setting("Adam", 1e-3),)),
        Suite(
            "judge",
            lambda cache, data: real_tasks(*prepared(cache, data)),
            {
                "Adam": _RATES,
                "AdamW+cosine": (1e-3, 3e-3, 1e-2),
                "SGD": (1e-2, 3e-2, 1e-1, 3e-1),
                "NAG": (3e-3, 1e-2, 3e-2, 1e-1),
                "RMSprop": (3e-4, 1e-3, 3e-3),
            },
            {"SGD": 1000, "NAG": 1000, "RMSprop": 1000, "Prodigy": 1000, "ScheduleFree": 1000},
            (_ADAM, Setting("Prodigy", 1.0), Setting("ScheduleFree", 2.5e-3)),
        ),
    )
}
"""Synthetic kinds outside the mixture, for selection; the same under stress; and real data, for the judgement."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        task: Name.
        contestant: Who trains.
        horizon: Inner steps.
        seed: Of initialisation and minibatches.
    """

    task: str
    contestant: Contestant
    horizon: int
    seed: int

    def file(self, cache: Path, task: JudgingTask) -> Path:
        """Return where the outcome is kept: the name is a hash of all that decides it."""
        who = self.contestant
        name = who.fingerprint if isinstance(who, Learned) else f"{who.optimizer} {who}"
        text = json.dumps([task.name, task.about, task.data, name, who.lr, self.horizon, self.seed])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return cache / f"{re.sub('[^a-z0-9.]+', '-', self.task)}-{digest}.safetensors"


class Runner:
    """Makes outcomes, each once.

    Args:
        suite: What to run.
        cache: Directory of outcomes.
        data: Directory of real data, for suites that need it.
        horizon: Leave out longer horizons, and tasks that have no others.
        workers: Processes, one thread each; 0 runs everything in this one.
        progress: Wraps a list of runs, to show how far it is.
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
        workers: int = 1,
        progress: Callable[[Iterable[Run], int], Iterable[Run]] = lambda runs, total: runs,
        only: Sequence[str] = (),
    ) -> None:
        self.suite, self.cache, self.data, self.workers, self.progress = suite, cache / suite.name, data, workers, progress
        self.cache.mkdir(parents=True, exist_ok=True)
        self.tried: dict[tuple[str, str], list[Setting]] = {}
        self.used: set[Path] = set()
        every = {task.name: task for task in suite.tasks(self.cache, data)}
        if unknown := [name for name in only if name not in every]:
            raise ValueError(f"the suite {suite.name} has no task {unknown[0]!r}; it has {', '.join(every)}")
        chosen = [task for name, task in every.items() if not only or name in only]
        limited = [_limited(task, math.inf if horizon is None else horizon) for task in chosen]
        self.tasks = {task.name: task for task in limited if task.horizons}
        if short := [task for task in chosen if task.name not in self.tasks and (only or not self.tasks)]:
            least = min(short, key=lambda task: min(task.horizons))
            raise ValueError(
                f"a longest horizon of {horizon} leaves nothing of {least.name}; its shortest is {min(least.horizons)}"
            )

    def runs_of(self, contestant: Contestant, task: JudgingTask, seeds: Sequence[int]) -> list[Run]:
        """Return the runs that give a contestant's result at every horizon: a schedule needs one for each."""
        horizons = self.horizons_of(contestant, task)
        chosen = horizons if contestant.schedule else horizons[-1:]
        return [Run(task.name, contestant, end, seed) for end in chosen for seed in seeds]

    def horizons_of(self, contestant: Contestant, task: JudgingTask) -> list[int]:
        """Return the horizons at which a contestant is looked at."""
        limit = self.suite.horizon_limits.get(getattr(contestant, "optimizer", ""), math.inf)
        return [end for end in task.horizons if end <= limit]

    def complete(self, runs: Iterable[Run]) -> None:
        """Make the outcomes of runs that have none, longest first."""
        todo = [run for run in dict.fromkeys(runs) if not self._file(run).exists()]
        todo.sort(key=lambda run: -run.horizon)
        if self.workers == 0:
            for run in self.progress(todo, len(todo)):
                _make(run, self.cache, self.tasks[run.task])
            return
        work = functools.partial(_work, self.suite.name, self.cache, self.data)
        with Workers(self.workers) as workers:
            for done in self.progress(workers.map(work, todo), len(todo)):
                del done

    def _file(self, run: Run) -> Path:
        return run.file(self.cache, self.tasks[run.task])

    def outcome(self, run: Run) -> Outcome:
        """Load what a finished run found; its file is one of those ``used``."""
        self.used.add(path := self._file(run))
        with safe_open(path, "pt") as file:
            return Outcome(
                file.get_tensor("losses"), {int(k): v for k, v in json.loads(file.metadata()["held_out"]).items()}
            )

    def outcomes(self, contestant: Contestant, task: str, horizon: int, seeds: Sequence[int]) -> list[Outcome]:
        """Load a contestant's outcomes for a horizon; where no schedule depends on it, of a longer run."""
        runs = self.runs_of(contestant, self.tasks[task], seeds)
        return [self.outcome(run) for run in runs if run.horizon == horizon or not contestant.schedule]

    def final(self, contestant: Contestant, task: str, horizon: int, seeds: Sequence[int]) -> Tensor:
        """Return the smoothed final training loss of each seed."""
        return torch.stack([smoothed_final(one.losses, horizon) for one in self.outcomes(contestant, task, horizon, seeds)])

    def tune(self) -> dict[tuple[str, str, int], Setting]:
        """Tune every baseline on every task for every horizon, extending grids until no best rate lies at an end.

        Returns:
            Settings by task, baseline and horizon.
        """
        self.tried = {
            (task, name): [_setting(name, lr) for lr in grid]
            for task in self.tasks
            for name, grid in self.suite.grids.items()
        }
        while True:
            groups = self.tried.items()
            runs = (self.runs_of(one, self.tasks[task], (TUNING_SEED,)) for (task, _), group in groups for one in group)
            self.complete(run for of_setting in runs for run in of_setting)
            best = {
                (task, name, horizon): self._best(task, group, horizon)
                for (task, name), group in groups
                for horizon in self.horizons_of(group[0], self.tasks[task])
            }
            missing = {(key[:2], lr) for key, chosen in best.items() for lr in _beyond(chosen, self.tried[key[:2]])}
            if not missing:
                return best
            for key, lr in sorted(missing):
                self.tried[key].append(_setting(key[1], lr))

    def _best(self, task: str, group: Sequence[Setting], horizon: int) -> Setting:
        return min(group, key=lambda setting: float(self.final(setting, task, horizon, (TUNING_SEED,))))


def _setting(name: str, lr: float) -> Setting:
    return Setting(name, lr, _MOMENTUM.get(name, 0.0))


def _beyond(best: Setting, group: Sequence[Setting]) -> list[float]:
    """Return the next rate of the grid where the best is its lowest or highest."""
    rates = [setting.lr for setting in group]
    edges = ((min(rates), -1), (max(rates), 1))
    return [_half_decade(edge, direction) for edge, direction in edges if best.lr == edge and 1e-6 < edge < 30]


_MOMENTUM = {"NAG": 0.9}


def smoothed_final(losses: Tensor, horizon: int) -> Tensor:
    """Return the mean of the last tenth of the losses up to a horizon."""
    return losses[horizon - max(horizon // 10, 1) : horizon].double().mean()


def _half_decade(rate: float, direction: int) -> float:
    """Return the next rate of the grid 1e-3, 3e-3, 1e-2, ..."""
    index = round(2 * math.log10(rate)) + direction
    return float(f"{(3 if index % 2 else 1) * 10.0 ** (index // 2):.1g}")


def _limited(task: JudgingTask, limit: float) -> JudgingTask:
    return replace(task, horizons=tuple(end for end in task.horizons if end <= limit))


def _make(run: Run, cache: Path, task: JudgingTask) -> None:
    schedule: Callable[[Optimizer, int], LRScheduler] | None = run.contestant.schedule
    outcome = train_case(task, run.contestant.make, run.horizon, run.seed, schedule)
    about = {**here(), "run": repr(run), "held_out": json.dumps(outcome.held_out)}
    write_atomically(run.file(cache, task), save({"losses": outcome.losses}, about))


@functools.cache
def _tasks(suite: str, cache: Path, data: Path | None) -> dict[str, JudgingTask]:
    """Return a suite's tasks, once a process: they hold functions, which do not travel."""
    return {task.name: task for task in SUITES[suite].tasks(cache, data)}


def _work(suite: str, cache: Path, data: Path | None, run: Run) -> Run:
    _make(run, cache, _tasks(suite, cache, data)[run.task])
    return run
