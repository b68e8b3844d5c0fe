"""The only engine of the judging: it makes every run once, keeps it in a file, and tunes baselines.

The name of a file is a hash of everything that decides the run. So an interrupted judgement goes on where it stopped, and a
change of one contestant repeats the runs of that contestant alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save

from meta_train.files import write_atomically
from meta_train.judging.baselines import Setting
from meta_train.judging.contestants import Contestant
from meta_train.judging.trial import Outcome, Problem, problem_of_case, problem_of_optimizee, train
from meta_train.provenance import here
from meta_train.tasks import Task, derive_seed
from meta_train.tasks.case import JudgingTask
from meta_train.workers import Each

MEASURES = 2
"""Version of how runs of cases are measured and seeded: a new number keeps old runs from being used."""

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps an iterable of known length, to show its progress."""


class Trials(Protocol):
    """A source of problems, one for each seed."""

    def start(self, seed: int) -> Problem:
        """Make the problem of a seed."""
        ...

    def file(self, contestant: Contestant, horizon: int, seed: int) -> str:
        """Name the file of a finished run by everything that decides it."""
        ...


@dataclass(frozen=True, eq=False)
class OptimizeeTrials:
    """Optimizees of a task; the seed is their index.

    Args:
        task: Samples them; its ``repr`` names everything that decides it.
        purpose: ``"tuning"`` or ``"evaluation"``.
    """

    task: Task
    purpose: str

    def start(self, seed: int) -> Problem:
        """Sample an optimizee."""
        return problem_of_optimizee(self.task.sample(derive_seed(0, self.purpose, seed)))

    def file(self, contestant: Contestant, horizon: int, seed: int) -> str:
        """Name the file of a finished run."""
        factor = () if isinstance(contestant, Setting) or contestant.lr == 1 else (contestant.lr,)
        return f"{_digest(repr((self.task, contestant.identity, horizon, self.purpose, seed, *factor)))}.safetensors"


@dataclass(frozen=True, eq=False)
class CaseTrials:
    """Cases of a judging task.

    Args:
        task: Makes them.
        again: A call that finds these trials in another process, since functions cannot be pickled.
    """

    task: JudgingTask
    again: tuple[Callable[..., CaseTrials], tuple[Any, ...]] | None = None

    def __reduce__(self) -> Any:
        """Pickle these trials as the call that finds them."""
        if self.again is None:
            raise TypeError(f"the task {self.task.name!r} belongs to no registered suite and cannot leave its process")
        return self.again

    def start(self, seed: int) -> Problem:
        """Make a case."""
        return problem_of_case(self.task, seed)

    def file(self, contestant: Contestant, horizon: int, seed: int) -> str:
        """Name the file of a finished run."""
        task = self.task
        name = task.name.removesuffix(f", {task.decay}")  # Only learned rules have the decay, and their own names say so.
        what = [name, task.about, task.data, contestant.identity, contestant.lr, horizon, seed]
        text = json.dumps([*what, task.horizons, MEASURES])
        return f"{re.sub('[^a-z0-9.]+', '-', name)}-{_digest(text)}.safetensors"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        trials: Make the problem.
        contestant: Trains it.
        horizon: Inner steps.
        seed: Chooses the problem.
    """

    trials: Trials
    contestant: Contestant
    horizon: int
    seed: int

    @property
    def file(self) -> str:
        """The name of the file that keeps the outcome."""
        return self.trials.file(self.contestant, self.horizon, self.seed)


class Runner:
    """Makes outcomes, each once.

    Args:
        cache: Directory of outcomes; None keeps them in memory alone.
        each: Goes over the runs: ``map``, or the method ``map`` of :class:`~meta_train.workers.Workers`.
        progress: Shows the progress through a list of runs.
    """

    def __init__(self, cache: Path | None = None, each: Each = map, progress: Progress = lambda runs, total: runs) -> None:
        self.cache, self.each, self.progress = cache, each, progress
        self.used: set[Path] = set()
        self._known: dict[Run, Outcome] = {}

    def complete(self, runs: Iterable[Run]) -> None:
        """Make the outcomes of runs that have none, longest first."""
        todo = [run for run in dict.fromkeys(runs) if run not in self._known and not self._kept(run)]
        todo.sort(key=lambda run: -run.horizon)
        outcomes = self.each(functools.partial(_make, self.cache), todo)
        for run, outcome in zip(todo, self.progress(outcomes, len(todo)), strict=True):
            self._known[run] = outcome

    def outcome(self, run: Run) -> Outcome:
        """Return the outcome of a run, made if it is missing, and add its file to ``used``."""
        if self.cache:
            self.used.add(self.cache / run.file)
        if run not in self._known:
            if self.cache and self._kept(run):
                self._known[run] = read_outcome(self.cache / run.file)
            else:
                self.complete([run])
        return self._known[run]

    def _kept(self, run: Run) -> bool:
        return self.cache is not None and (self.cache / run.file).exists()


def _make(cache: Path | None, run: Run) -> Outcome:
    contestant = run.contestant
    outcome = train(run.trials.start(run.seed), contestant.make, run.horizon, contestant.schedule)
    if cache:
        write_outcome(cache / run.file, outcome, {**here(), "run": f"{contestant}, {run.horizon} steps, seed {run.seed}"})
    return outcome


def write_outcome(path: Path, outcome: Outcome, about: Mapping[str, str]) -> None:
    """Keep an outcome: losses as a tensor, every further measure as JSON in the metadata.

    Args:
        path: The file.
        outcome: Any.
        about: Further metadata: where the run was made.
    """
    measures = {one.name: json.dumps(getattr(outcome, one.name)) for one in fields(Outcome) if one.name != "losses"}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({"losses": outcome.losses}, {**about, **measures}))


def read_outcome(path: Path) -> Outcome:
    """Read an outcome.

    Args:
        path: Written by :func:`write_outcome`.

    Returns:
        The outcome.
    """
    with safe_open(path, "pt") as file:
        about = file.metadata()
        kept = {one.name: json.loads(about.get(one.name, "{}")) for one in fields(Outcome) if one.name != "losses"}
        by_horizon = {name: {int(end): value for end, value in values.items()} for name, values in kept.items()}
        return Outcome(file.get_tensor("losses").double(), **by_horizon)


Look = TypeVar("Look", bound=Hashable)
AtEdge = Callable[[Setting, Sequence[Setting]], Iterable[Setting]]
"""Takes the best setting of a group, and returns further settings to try, or raises."""


def tune(
    group: list[Setting],
    looks: Sequence[Look],
    scores: Callable[[Setting, Look], float],
    at_edge: AtEdge,
    usable: Callable[[Setting, Look], bool] = lambda setting, look: True,
) -> tuple[dict[Look, Setting], list[Setting]]:
    """Choose the best setting of one baseline for each look, and name further settings to try first.

    Args:
        group: The settings that were tried.
        looks: Points of view, for instance horizons, or criteria at horizons.
        scores: Score of a setting in tuning; NaN or infinite where it diverged.
        at_edge: :func:`refuse_edge` or :func:`extend_edge`.
        usable: Whether a chosen setting may stand; where it may not, the next best one is chosen.

    Returns:
        Settings by look, and missing settings; with any, try them and call again.

    Raises:
        ValueError: If ``at_edge`` refuses.
    """
    chosen: dict[Look, Setting] = {}
    missing: dict[Setting, None] = {}
    for look in looks:
        scored = {setting: scores(setting, look) for setting in group}
        while True:
            best = min(group, key=lambda setting: scored[setting] if not math.isnan(scored[setting]) else math.inf)
            if math.isinf(scored[best]) and at_edge is refuse_edge:
                raise ValueError(f"every setting of {best.optimizer} diverged; extend its grid to lower rates")
            missing |= dict.fromkeys(at_edge(best, group))
            if usable(best, look):
                break
            scored[best] = math.inf
        chosen[look] = best
    return chosen, sorted(missing, key=lambda setting: setting.lr)


def refuse_edge(best: Setting, group: Sequence[Setting]) -> list[Setting]:
    """Refuse a best rate that is the lowest or highest that was tried, or a best momentum that is the highest.

    Below the lowest momentum there is plain SGD.

    Args:
        best: The best setting.
        group: All that were tried.

    Returns:
        Nothing more to try.

    Raises:
        ValueError: If the best setting lies at the edge.
    """
    lrs, momenta = [setting.lr for setting in group], [setting.momentum for setting in group]
    edges = {"rate": (best.lr, (min(lrs), max(lrs))), "momentum": (best.momentum, (max(momenta) or None,))}
    for name, (value, ends) in edges.items():
        if value in ends:
            raise ValueError(f"the best {name} of {best.optimizer} is {value:g}, at the edge of its grid; extend the grid")
    return []


def extend_edge(best: Setting, group: Sequence[Setting]) -> list[Setting]:
    """Extend the grid by half a decade where the best rate is its lowest or highest.

    Args:
        best: The best setting.
        group: All that were tried.

    Returns:
        Further settings to try.
    """
    rates = [setting.lr for setting in group]
    edges = ((min(rates), -1), (max(rates), 1))
    further = [_half_decade(edge, direction) for edge, direction in edges if best.lr == edge and 1e-6 < edge < 30]
    return [Setting(best.optimizer, lr, best.momentum) for lr in further]


def _half_decade(rate: float, direction: int) -> float:
    """Return the next rate of the grid 1e-3, 3e-3, 1e-2, ..."""
    index = round(2 * math.log10(rate)) + direction
    return float(f"{(3 if index % 2 else 1) * 10.0 ** (index // 2):.1g}")


def stacked(outcomes: Iterable[Outcome]) -> torch.Tensor:
    """Return the losses of several outcomes of one length as one tensor."""
    return torch.stack([outcome.losses for outcome in outcomes])
