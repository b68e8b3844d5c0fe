"""Tables of an arena: every optimizer, learned or not, on optimizees that it has never seen.

Baselines are tuned on optimizees of their own (purpose ``"tuning"``), then everything is reported on fresh ones (purpose
``"evaluation"``). A curve holds the losses ``f(theta_0) ... f(theta_T)``; its *sum* adds ``f(theta_0) ... f(theta_{T-1})``,
the losses an ordinary training loop prints. Its *final* loss is ``f(theta_T)``, or the mean of the last few losses where
they come from minibatches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from meta_train.judging.arena_choice import choose_arena
from meta_train.judging.arenas import ARENAS, Arena
from meta_train.judging.baselines import Setting
from meta_train.judging.contestants import Contestant, Learned
from meta_train.judging.request import Request
from meta_train.judging.runner import OptimizeeTrials, Run, Runner, extend_edge, refuse_edge, stacked, tune
from meta_train.judging.trial import measure
from meta_train.provenance import read_environment
from meta_train.rows import Row, Rows, is_learned, read_rows, rounded, write_judgement
from meta_train.tasks import Mnist
from meta_train.training.recipe import parse_recipe

Look = tuple[str, int]
"""A criterion and a horizon."""

CACHE = "arenas"
"""The folder of the cache that holds the runs of arenas; the runs of a suite lie in a folder with the suite's name."""


@dataclass(frozen=True)
class Judgement:
    """Everything one evaluation found, as rows of tables.

    Args:
        sweep: Every setting tried while tuning.
        curves: Mean loss and standard error at each inner step, for baselines as tuned for the final loss of the first
            horizon, and for untuned optimizers that are no baseline.
        summary: Each criterion at each horizon, and its ratio to the best baseline.
        fixed: The same for untuned settings.
    """

    sweep: Rows = field(default_factory=list)
    curves: Rows = field(default_factory=list)
    summary: Rows = field(default_factory=list)
    fixed: Rows = field(default_factory=list)


class ArenaRuns:
    """The curves of an arena's contestants.

    Args:
        arena: What optimizers are judged on.
        runner: Makes the runs.
    """

    def __init__(self, arena: Arena, runner: Runner) -> None:
        self.arena, self.runner = arena, runner
        tasks = {"tuning": arena.tuning_task or arena.task, "evaluation": arena.task}
        self.trials = {purpose: OptimizeeTrials(task, purpose) for purpose, task in tasks.items()}
        self.counts = {"tuning": arena.tuning, "evaluation": arena.fresh}
        self.longest, self.long = max(arena.horizons), set[tuple[Contestant, str]]()

    def runs_of(self, contestant: Contestant, end: int, purpose: str) -> list[Run]:
        """Return the runs for a horizon: where no schedule depends on it, longer runs serve shorter horizons too."""
        key = (contestant, purpose)
        shared = purpose == "tuning" or end in (self.arena.horizons[0], self.longest) or key in self.long
        horizon = self.longest if shared and not contestant.schedule else end
        if horizon == self.longest:
            self.long.add(key)
        return [Run(self.trials[purpose], contestant, horizon, index) for index in range(self.counts[purpose])]

    def of(self, contestant: Contestant, end: int, purpose: str) -> Tensor:
        """Return a contestant's curves, with a row for each optimizee."""
        runs = self.runs_of(contestant, end, purpose)
        self.runner.complete(runs)
        return stacked(map(self.runner.outcome, runs))

    def score(self, contestant: Contestant, criterion: str, end: int, purpose: str = "evaluation") -> Tensor:
        """Return one number for each optimizee."""
        return measure(criterion, self.of(contestant, end, purpose), end, self.arena.last)

    def tuning_score(self, setting: Setting, look: Look) -> float:
        """Return the mean over the optimizees for tuning."""
        return float(self.score(setting, *look, "tuning").mean())

    def stays(self, contestant: Contestant, look: Look) -> bool:
        """Return whether no fresh optimizee ends above where they all start."""
        losses = self.of(contestant, look[1], "evaluation")
        return not bool(losses[:, look[1]].max() > losses[:, 0].max())


def judge(
    rules: Sequence[Learned], arena: Arena, runner: Runner | None = None, baselines: Judgement | None = None
) -> Judgement:
    """Compare learned rules with tuned baselines.

    Each baseline gets, for each criterion and horizon, its best setting. A best setting at the edge of its grid is
    an error. A setting that diverges on a fresh optimizee is passed over, which can only help the baseline.

    Args:
        rules: Learned contestants of different names; they are not tuned.
        arena: The arena that judges them.
        runner: Makes the runs; the default works in this process and without files.
        baselines: Take the baselines' rows from here (:func:`read_baselines`) and run the learned rules alone.

    Returns:
        The judgement.

    Raises:
        ValueError: If a best setting lies at the edge of its grid, or ``baselines`` lack a criterion or horizon.
    """
    runs, judgement = ArenaRuns(arena, runner or Runner()), Judgement()
    settings = [] if baselines else _settings(runs)
    untuned = [] if baselines else arena.untuned
    judgement.sweep.extend(baselines.sweep if baselines else (_sweep_row(runs, setting) for setting in settings))
    judgement.fixed.extend(_of_horizons(baselines.fixed, arena.horizons) if baselines else ())
    for end in arena.horizons:
        for criterion in arena.criteria:
            look = (criterion, end)
            chosen = _tuned(runs, settings, look)
            taken = _taken(baselines.summary, look) if baselines else ()
            judgement.summary.extend(_summary(runs, chosen, rules, look, taken))
            if look == ("final", arena.horizons[0]):
                others = {setting.optimizer: setting for setting in untuned if setting.optimizer not in chosen}
                judgement.curves.extend(_curves(runs, {rule.label: rule for rule in rules} | chosen | others, end))
                judgement.curves.extend(baselines.curves if baselines else ())
            for setting in untuned:
                row: Row = {"horizon": end, "criterion": criterion, "optimizer": setting.optimizer, "setting": setting.text}
                judgement.fixed.append({**row, **_statistics(runs.score(setting, *look))})
    return judgement


def read_baselines(results: Path) -> Judgement:
    """Read an earlier judgement's rows of the optimizers that are not learned.

    Args:
        results: Directory of its tables.

    Returns:
        Their rows.

    Raises:
        ValueError: If there are none.
    """
    if not (results / "sweep.csv").exists():
        raise ValueError(f"there are no baselines in {results}: sweep.csv is missing; leave --baselines out to run them")
    tables = {name: results / f"{name}.csv" for name in ("sweep", "curves", "summary", "fixed")}
    read = {name: read_rows(path) if path.exists() else [] for name, path in tables.items()}
    kept: dict[str, Rows] = {name: [{**row} for row in rows if not is_learned(row)] for name, rows in read.items()}
    return Judgement(**kept)


def evaluate(request: Request, out: Path) -> Iterator[str]:
    """Judge on an arena and write the tables.

    Args:
        request: What to judge.
        out: Directory for the tables.

    Yields:
        Lines for the screen.

    Raises:
        ValueError: If there is no such arena, or it has no such task, or no horizon that is short enough.
    """
    name, arena = choose_arena(request.name, request.rules)
    request, arena = replace(request, name=name), arena.on(request.data)
    if unknown := [name for name in request.tasks if name != request.name]:
        raise ValueError(f"the arena {request.name} has no task {unknown[0]!r}; it has {request.name}")
    if request.horizon is not None and arena.grids_grow:
        arena = replace(arena, horizons=(request.horizon,), last=max(request.horizon // 10, 1))
    elif request.horizon is not None:
        horizons = [end for end in arena.horizons if end <= request.horizon]
        if not horizons:
            least = min(arena.horizons)
            raise ValueError(
                f"a longest horizon of {request.horizon} leaves nothing of {request.name}; its shortest is {least}"
            )
        arena = replace(arena, horizons=horizons)
    request.check_baselines()
    baselines = read_baselines(request.baselines) if request.baselines else None
    runner = Runner(request.cache / CACHE, request.each, request.progress)
    judgement = judge(request.rules, arena, runner, baselines)
    recipe = request.rules[0].first.recipe
    about = {
        "trained_to": parse_recipe(recipe).inner.horizon[1] if recipe else None,
        "optimizees": {"tuning": arena.tuning, "evaluation": arena.fresh, "seed": 0},
        "last": arena.last,
    }
    write_judgement(judgement, out, {**request.about(runner.used), **about})
    for row in judgement.summary:
        ratio = f"{float(row['ratio_to_best_baseline']):.3f} x best baseline" if row["ratio_to_best_baseline"] != "" else ""
        yield (
            f"{row['horizon']:>4} steps  {row['criterion']:<6} {row['optimizer']:<24} {float(row['mean']):>9.4g} "
            f"+- {float(row['standard_error']):<9.2g} {ratio:>21}  {row['setting']}"
        )


def _sweep_row(runs: ArenaRuns, setting: Setting) -> Row:
    scores = {
        f"{criterion}_{end}": rounded(runs.tuning_score(setting, (criterion, end)))
        for end in runs.arena.horizons
        for criterion in runs.arena.criteria
    }
    hyperparameters: Row = {"lr": setting.lr, "momentum": setting.momentum}
    return {"optimizer": setting.optimizer, **hyperparameters, **scores, "n": runs.arena.tuning}


def _settings(runs: ArenaRuns) -> list[Setting]:
    """Run every setting of every baseline on the optimizees for tuning, and further settings where grids grow."""
    arena = runs.arena
    settings, missing = [], list(dict.fromkeys(arena.sweep))
    looks = [(criterion, end) for end in arena.horizons for criterion in arena.criteria]
    while missing:
        runs.runner.complete(run for one in missing for end in arena.horizons for run in runs.runs_of(one, end, "tuning"))
        settings += missing
        missing = []
        for group in _groups(settings) if arena.grids_grow else ():
            missing += tune(group, looks, runs.tuning_score, extend_edge)[1]
    return sorted(settings, key=lambda one: (one.optimizer, one.momentum, one.lr)) if arena.grids_grow else settings


def _groups(settings: Sequence[Setting]) -> Iterator[list[Setting]]:
    for optimizer in dict.fromkeys(setting.optimizer for setting in settings):
        yield [setting for setting in settings if setting.optimizer == optimizer]


def _tuned(runs: ArenaRuns, settings: Sequence[Setting], look: Look) -> dict[str, Setting]:
    chosen = {}
    for group in _groups(settings):
        if runs.arena.grids_grow:  # Grids have grown, and a loss of any kind may rise without a divergence.
            ranked = sorted(group, key=lambda one: runs.tuning_score(one, look))
            kept = (one for one in ranked if runs.score(one, *look).isfinite().all())
            chosen[group[0].optimizer] = next(kept, ranked[0])
        else:
            chosen[group[0].optimizer] = tune(group, [look], runs.tuning_score, refuse_edge, runs.stays)[0][look]
    return chosen


def _of_horizons(rows: Rows, horizons: Sequence[int]) -> Rows:
    return [row for row in rows if int(row["horizon"]) in horizons]


def _taken(rows: Rows, look: Look) -> Rows:
    taken = [row for row in rows if (row["criterion"], int(row["horizon"])) == look]
    if not taken:
        raise ValueError(f"the baselines have no {look[0]} loss at {look[1]} steps; leave --baselines out to run them")
    return taken


def _summary(
    runs: ArenaRuns, chosen: Mapping[str, Setting], rules: Sequence[Learned], look: Look, taken: Iterable[Row]
) -> Iterator[Row]:
    taken = list(taken)
    criterion, end = look
    results = {name: (setting.text, runs.score(setting, *look)) for name, setting in chosen.items()}
    best = min([float(values.mean()) for _, values in results.values()] + [float(row["mean"]) for row in taken])
    yield from taken
    ours = {rule.label: ("", runs.score(rule, *look)) for rule in rules}
    for name, (text, values) in (results | ours).items():
        ratio = rounded(float(values.mean()) / best) if best > 0 else ""
        row: Row = {"horizon": end, "criterion": criterion, "optimizer": name, "setting": text}
        yield {**row, **_statistics(values), "ratio_to_best_baseline": ratio}


def _curves(runs: ArenaRuns, contestants: Mapping[str, Contestant], end: int) -> Iterator[Row]:
    for name, contestant in contestants.items():
        for step, column in enumerate(runs.of(contestant, end, "evaluation").T):
            yield {"optimizer": name, "setting": contestant.text, "inner_step": step, **_statistics(column)}


def _statistics(values: Tensor) -> dict[str, float | int]:
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(0.0)
    return {"mean": rounded(values.mean()), "standard_error": rounded(error), "n": len(values)}


def size_table(places: Iterable[Path]) -> Rows:
    """Collect how good optimizers are on sigmoid nets of many sizes, at the first horizon.

    Args:
        places: Directories of evaluations; evaluations of other arenas are skipped.

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
