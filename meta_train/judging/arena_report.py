"""Judge optimizers: every one, learned or not, runs through the same ``torch.optim`` path on optimizees it has never seen.

Baselines are tuned on optimizees of their own (purpose ``"tuning"``), then everything is reported on fresh ones (purpose
``"evaluation"``). A curve holds the losses ``f(theta_0) ... f(theta_T)``; its *sum* adds ``f(theta_0) ... f(theta_{T-1})``,
the losses an ordinary training loop prints, and its *final* loss is ``f(theta_T)``, where losses are those of minibatches
the mean of the last few.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from meta_train.files import write_atomically
from meta_train.judging.arenas import ARENAS, Arena
from meta_train.judging.baselines import MakeOptimizer, Setting, best_setting
from meta_train.judging.contestants import LEARNED, AnyWeights, Contestant, learned_with
from meta_train.provenance import here, read_environment
from meta_train.rows import Row, Rows, read_rows, rounded
from meta_train.tasks import Mnist, Optimizee, Task, derive_seed
from meta_train.workers import Each

MakeSchedule = Callable[[Optimizer, int], LRScheduler]


def run(
    optimizee: Optimizee, make_optimizer: MakeOptimizer, horizon: int, schedule: MakeSchedule | None = None
) -> list[float]:
    """Train one optimizee with a ``torch.optim`` optimizer.

    Args:
        optimizee: Freshly sampled, a single problem (P = 1).
        make_optimizer: From named parameters to optimizer.
        horizon: Inner steps, T.
        schedule: From optimizer and horizon to a schedule of the rate.

    Returns:
        T + 1 losses, before each step and after the last; infinite from where it diverged.

    Raises:
        ValueError: If the optimizee holds several problems, which would share what an optimizer knows of a tensor.
    """
    if optimizee.num_problems != 1:
        raise ValueError(f"evaluate one problem at a time, got {optimizee.num_problems} side by side")
    params = {name: nn.Parameter(value[0].clone()) for name, value in optimizee.params.items()}
    optimizer = make_optimizer(params.items())
    scheduler = schedule(optimizer, horizon) if schedule else None
    losses = []

    def forward() -> Tensor:
        optimizer.zero_grad()
        return optimizee.losses({name: value.unsqueeze(0) for name, value in params.items()}).sum()

    def closure() -> float:
        loss = forward()
        loss.backward()
        return loss.item()

    for step in range(horizon + 1):
        loss = forward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return losses[:-1] + [math.inf] * (horizon + 1 - step)
        if step < horizon:
            loss.backward()
            optimizer.step(closure if isinstance(optimizer, LBFGS) else None)
            if scheduler:
                scheduler.step()
    return losses


def curves(
    task: Task,
    make_optimizer: MakeOptimizer,
    horizon: int,
    purpose: str,
    count: int,
    schedule: MakeSchedule | None = None,
) -> Tensor:
    """Train ``count`` fresh optimizees.

    Args:
        task: Where they come from.
        make_optimizer: From parameters to optimizer.
        horizon: Inner steps, T.
        purpose: ``"tuning"`` or ``"evaluation"``: their optimizees are disjoint.
        count: How many.
        schedule: From optimizer and horizon to a schedule of the rate.

    Returns:
        Losses ``(count, T + 1)``; infinite from where one diverged.
    """
    sampled = (task.sample(derive_seed(0, purpose, index)) for index in range(count))
    return torch.tensor([run(one, make_optimizer, horizon, schedule) for one in sampled], dtype=torch.float64)


def measure(criterion: str, losses: Tensor, horizon: int, last: int = 1) -> Tensor:
    """Reduce curves to one number each.

    Args:
        criterion: ``"sum"`` or ``"final"``.
        losses: ``(count, >= horizon + 1)``.
        horizon: Inner steps to look at.
        last: Losses averaged into the final one.

    Returns:
        Tensor of shape ``(count,)``.
    """
    if criterion == "sum":
        return losses[:, :horizon].sum(1)
    return losses[:, horizon + 1 - last : horizon + 1].mean(1)


@dataclass(frozen=True)
class Judgement:
    """Everything one evaluation found, as rows of tables.

    Args:
        sweep: Every setting tried while tuning.
        curves: Mean loss and standard error at each inner step; baselines as tuned for the final loss of the first horizon,
            and untuned optimizers that are no baseline.
        summary: Each criterion at each horizon, and its ratio to the best baseline's.
        fixed: The same for untuned settings.
    """

    sweep: Rows = field(default_factory=list)
    curves: Rows = field(default_factory=list)
    summary: Rows = field(default_factory=list)
    fixed: Rows = field(default_factory=list)


def _ways(contestant: Contestant) -> tuple[MakeOptimizer, MakeSchedule | None]:
    if isinstance(contestant, Setting):
        return contestant.make, contestant.schedule
    return learned_with(contestant), None


def _file(task: Task, contestant: Contestant, horizon: int, purpose: str, cache: Path, index: int) -> Path:
    """Return where a finished run is kept: the name is a hash of all that decides it."""
    who = f"{contestant.optimizer} {contestant}" if isinstance(contestant, Setting) else contestant.fingerprint
    digest = hashlib.sha256(repr((task, who, horizon, purpose, index)).encode()).hexdigest()[:16]
    return cache / f"{digest}.json"


def _curve(task: Task, contestant: Contestant, horizon: int, purpose: str, cache: Path | None, index: int) -> list[float]:
    file = _file(task, contestant, horizon, purpose, cache, index) if cache else None
    if file and file.exists():
        kept = json.loads(file.read_text())
        return kept["losses"] if isinstance(kept, dict) else kept  # Earlier versions kept the losses alone.
    make, schedule = _ways(contestant)
    losses = run(task.sample(derive_seed(0, purpose, index)), make, horizon, schedule)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({**here(), "losses": losses}).encode())
    return losses


class _Runs:
    """Curves of baselines and rules, each made once for each horizon it needs; with a directory, once for all."""

    def __init__(self, arena: Arena, cache: Path | None, each: Each, used: set[Path] | None = None) -> None:
        self.tasks = {"tuning": arena.tuning_task or arena.task, "evaluation": arena.task}
        self.counts = {"tuning": arena.tuning, "evaluation": arena.fresh}
        self.last, self.drawn, self.longest = arena.last, arena.horizons[0], max(arena.horizons)
        self.cache, self.each, self.used = cache, each, set() if used is None else used
        self.kept: dict[tuple[Contestant, int, str], Tensor] = {}

    def of(self, contestant: Contestant, end: int, purpose: str) -> Tensor:
        """Return the curves of a contestant: where no schedule depends on a horizon, longer ones serve shorter ones too."""
        scheduled = _ways(contestant)[1] is not None
        shared = purpose == "tuning" or end == self.drawn or (contestant, self.longest, purpose) in self.kept
        horizon = self.longest if shared and not scheduled else end
        key = (contestant, horizon, purpose)
        if key not in self.kept:
            task, indices = self.tasks[purpose], range(self.counts[purpose])
            curve = functools.partial(_curve, task, contestant, horizon, purpose, self.cache)
            self.kept[key] = torch.tensor(list(self.each(curve, indices)), dtype=torch.float64)
            if self.cache:
                self.used |= {_file(task, contestant, horizon, purpose, self.cache, index) for index in indices}
        return self.kept[key]

    def score(self, contestant: Contestant, criterion: str, end: int, purpose: str = "evaluation") -> Tensor:
        """Return one number for each optimizee."""
        return measure(criterion, self.of(contestant, end, purpose), end, self.last)

    def diverges(self, contestant: Contestant, end: int) -> bool:
        """Return whether any fresh optimizee ends above where they all start."""
        losses = self.of(contestant, end, "evaluation")
        return bool(losses[:, end].max() > losses[:, 0].max())


def judge(
    learned: Sequence[AnyWeights],
    arena: Arena,
    *,
    cache: Path | None = None,
    each: Each = map,
    progress: Callable[[Iterable[Setting]], Iterable[Setting]] = iter,
    used: set[Path] | None = None,
) -> Judgement:
    """Compare learned rules with tuned baselines.

    Each baseline gets, for each criterion and horizon, the setting that is best for it; one that is best at the edge of what
    was tried is an error.

    Args:
        learned: Rules, of different names; they are not tuned.
        arena: What they are judged on.
        cache: Directory of finished runs, each a file named by a hash of task (its ``repr``), contestant, horizon and
            optimizee; what it holds is not run again.
        each: Goes over the optimizees: ``map``, or that of :class:`~meta_train.workers.Workers`.
        progress: Wraps the settings while tuning, to show how far it is.
        used: Collects the files of the finished runs that the judgement is made of.

    Returns:
        The judgement.
    """
    runs, judgement = _Runs(arena, cache, each, used), Judgement()
    settings = list(dict.fromkeys(arena.sweep))
    for setting in progress(settings):
        scores = {
            f"{criterion}_{end}": rounded(runs.score(setting, criterion, end, "tuning").mean())
            for end in arena.horizons
            for criterion in arena.criteria
        }
        hyperparameters: Row = {"lr": setting.lr, "momentum": setting.momentum}
        judgement.sweep.append({"optimizer": setting.optimizer, **hyperparameters, **scores, "n": arena.tuning})
    for end in arena.horizons:
        for criterion in arena.criteria:
            chosen = _tuned(runs, settings, criterion, end)
            judgement.summary.extend(_summary(runs, chosen, learned, criterion, end))
            if (criterion, end) == ("final", arena.horizons[0]):
                others = {setting.optimizer: setting for setting in arena.untuned if setting.optimizer not in chosen}
                judgement.curves.extend(_curves(runs, chosen | others, learned, end))
            for setting in arena.untuned:
                row: Row = {"horizon": end, "criterion": criterion, "optimizer": setting.optimizer, "setting": str(setting)}
                judgement.fixed.append({**row, **_statistics(runs.score(setting, criterion, end))})
    return judgement


def _tuned(runs: _Runs, settings: Sequence[Setting], criterion: str, end: int) -> dict[str, Setting]:
    """Choose each baseline's best setting, passing over any that diverges on a fresh optimizee: that can only help them."""
    chosen = {}
    for optimizer in dict.fromkeys(setting.optimizer for setting in settings):
        group = [setting for setting in settings if setting.optimizer == optimizer]
        scores = {str(setting): float(runs.score(setting, criterion, end, "tuning").mean()) for setting in group}
        while runs.diverges(best := best_setting(scores, group), end):
            scores[str(best)] = math.inf
        chosen[optimizer] = best
    return chosen


def _summary(
    runs: _Runs, chosen: Mapping[str, Setting], learned: Sequence[AnyWeights], criterion: str, end: int
) -> Iterator[Row]:
    results = {name: (str(setting), runs.score(setting, criterion, end)) for name, setting in chosen.items()}
    best = min(float(values.mean()) for _, values in results.values())
    ours = {f"{LEARNED} ({weights.name})": ("", runs.score(weights, criterion, end)) for weights in learned}
    for name, (text, values) in (results | ours).items():
        ratio = rounded(float(values.mean()) / best) if best > 0 else ""
        row: Row = {"horizon": end, "criterion": criterion, "optimizer": name, "setting": text}
        yield {**row, **_statistics(values), "ratio_to_best_baseline": ratio}


def _curves(runs: _Runs, chosen: Mapping[str, Setting], learned: Sequence[AnyWeights], end: int) -> Iterator[Row]:
    contestants: dict[str, Contestant] = {f"{LEARNED} ({weights.name})": weights for weights in learned}
    for name, contestant in (contestants | dict(chosen)).items():
        text = str(contestant) if isinstance(contestant, Setting) else ""
        for step, column in enumerate(runs.of(contestant, end, "evaluation").T):
            yield {"optimizer": name, "setting": text, "inner_step": step, **_statistics(column)}


def _statistics(values: Tensor) -> dict[str, float | int]:
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(0.0)
    return {"mean": rounded(values.mean()), "standard_error": rounded(error), "n": len(values)}


def size_table(places: Iterable[Path]) -> Rows:
    """Collect how good optimizers are on sigmoid nets of many sizes, at the first horizon.

    Args:
        places: Directories of evaluations; those of other arenas are passed over.

    Returns:
        A row for each net and optimizer.
    """
    table: Rows = []
    for place in places:
        name = read_environment(place / "environment.json", "task")["task"]
        arena = ARENAS.get(name)
        if arena is None or not isinstance(arena.task, Mnist) or arena.task.activation != "sigmoid":
            continue
        size: Row = {"units": arena.task.hidden[0], "layers": len(arena.task.hidden)}
        for row in read_rows(place / "summary.csv"):
            if (row["criterion"], row["horizon"]) == ("final", str(arena.horizons[0])):
                table.append({**size, **{key: row[key] for key in ("optimizer", "setting", "mean", "standard_error", "n")}})
    return table
