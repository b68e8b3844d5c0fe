"""Tables of a judgement: each contestant's results, and learned rules against every baseline."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from meta_train.judging.baselines import Setting
from meta_train.judging.contestants import Contestant, Learned
from meta_train.judging.request import Request
from meta_train.judging.shipped import shipped_rows, shipped_summary, ships
from meta_train.judging.suites import SEEDS, SUITES, TUNING_SEED, SuiteRunner
from meta_train.judging.trial import Outcome, smoothed_final
from meta_train.rows import Row, Rows, is_learned, read_rows, rounded, write_judgement

CURVE_POINTS = 60
"""Points of each drawn curve, at logarithmically spaced inner steps."""

_rounded = functools.partial(rounded, digits=5)


@dataclass(frozen=True)
class Report:
    """Everything one judgement found, as rows of tables.

    Args:
        results: Each contestant on each task at each horizon; losses, held-out ones too, are infinite where a seed diverged.
        ratios: Each learned rule against each baseline on each task at each horizon; below 1 the rule is better. NaN where
            the baseline diverged.
        summary: Geometric means of the ratios over the tasks, wins and the worst task; and on how many tasks the rule
            ``diverged``. Tasks on which the baseline diverged are left out of all else; ``baseline_diverged`` counts
            them, if there are any.
        sweep: Every setting tried while tuning.
        curves: Training loss over inner steps, for figures.
        shipped: What each contestant ships on each task at each horizon (:mod:`meta_train.judging.shipped`).
        shipped_summary: Learned rules against every opponent, by ``shipped``.
    """

    results: Rows = field(default_factory=list)
    ratios: Rows = field(default_factory=list)
    summary: Rows = field(default_factory=list)
    sweep: Rows = field(default_factory=list)
    curves: Rows = field(default_factory=list)
    shipped: Rows = field(default_factory=list)
    shipped_summary: Rows = field(default_factory=list)


def judge_suite(
    runner: SuiteRunner, rules: Sequence[Learned], seeds: Sequence[int] = SEEDS, baselines: Report | None = None
) -> Report:
    """Tune the baselines, run everything that has not been run before, and compare.

    Args:
        runner: Holds suite, cache and workers.
        rules: Learned contestants; none is tuned.
        seeds: Seeds of the runs that are reported.
        baselines: Take the baselines' rows from here (:func:`read_baselines`) and run the learned rules alone.

    Returns:
        The tables.

    Raises:
        ValueError: If ``baselines`` lack a task or a horizon that is judged, or a baseline's package is not installed.
    """
    fixed: list[Contestant] = [*rules] if baselines else [*rules, *runner.suite.untuned]
    for one in fixed:
        if isinstance(one, Setting):  # A missing package is an error here, before hours of tuning.
            one.make([torch.nn.Parameter(torch.zeros(1))])
    tuned = {} if baselines else runner.tune()
    runner.complete(run for task in runner.tasks.values() for one in fixed for run in runner.runs_of(one, task, seeds))
    settings = [*tuned.items(), *runner.best_averaged.items()]
    runner.complete(run for (task, _, _), one in settings for run in runner.runs_of(one, runner.tasks[task], seeds))
    report = Report()
    report.sweep.extend(baselines.sweep if baselines else _sweep(runner))
    for task in runner.tasks.values():
        for horizon in task.horizons:
            contestants = dict(_contestants(fixed, runner, tuned, task.name, horizon))
            outcomes = {name: runner.outcomes(one, task.name, horizon, seeds) for name, one in contestants.items()}
            taken = _taken(baselines.results, task.name, horizon) if baselines else []
            rows = [
                *_results(contestants, outcomes, task.name, horizon, any(row["held_out"] != "" for row in taken)),
                *taken,
            ]
            report.results.extend(rows)
            report.ratios.extend(_ratios(rows))
            named = [(name, one, weights) for name, one in contestants.items() for weights in ships(one)]
            named += _averaged(runner, task.name, horizon)
            report.shipped.extend(shipped_rows(runner, named, task.name, horizon, seeds))
            report.shipped.extend(_taken(baselines.shipped, task.name, horizon) if baselines else [])
        longest = task.horizons[-1]
        report.curves.extend(
            _curves(runner, dict(_contestants(fixed, runner, tuned, task.name, longest)), task.name, longest, seeds)
        )
        if baselines:
            report.curves.extend(row for row in baselines.curves if row["task"] == task.name)
    report.summary.extend(_summary(report.ratios, report.results))
    report.shipped_summary.extend(shipped_summary(report.shipped))
    return report


def evaluate(request: Request, out: Path) -> Iterator[str]:
    """Judge on a suite and write the tables.

    Args:
        request: What to judge.
        out: Directory for the tables.

    Yields:
        Lines for the screen.
    """
    suite = SUITES[request.name]
    runner = SuiteRunner(suite, request.cache, request.data, request.horizon, request.each, request.progress, request.tasks)
    request.check_baselines()
    baselines = read_baselines(request.baselines) if request.baselines else None
    report = judge_suite(runner, request.rules, baselines=baselines)
    seeds = {"tuning": [TUNING_SEED], "evaluation": list(SEEDS)}
    write_judgement(report, out, {**request.about(runner.used), "seeds": seeds})
    for row in report.shipped_summary:
        yield (
            f"{row['horizon']:>6} steps  {row['rule']:<16} {row['weights']:<8} against {row['against']:<22} "
            f"{row['against_weights']:<8} {row['ratio']:>6} x  wins {row['wins']:>2} of {row['tasks']:<2}  "
            f"worst {row['worst']} ({row['worst_task']})"
        )


def read_baselines(results: Path) -> Report:
    """Read an earlier judgement's rows of the optimizers that are not learned.

    Args:
        results: Directory of its tables.

    Returns:
        Their results, sweep and curves.

    Raises:
        ValueError: If there are none.
    """
    if not (results / "results.csv").exists():
        raise ValueError(f"there are no baselines in {results}: results.csv is missing; leave --baselines out to run them")
    if not (results / "shipped.csv").exists():
        raise ValueError(
            f"the baselines in {results} were judged before losses of shipped weights were measured, on other streams of "
            "random numbers; leave --baselines out to run them"
        )
    read = {name: read_rows(results / f"{name}.csv") for name in ("results", "curves", "sweep", "shipped")}
    hand_designed: dict[str, Rows] = {
        name: [{**row} for row in read[name] if not is_learned(row)] for name in ("results", "shipped")
    }
    names = {row["optimizer"] for row in hand_designed["results"]}
    curves: Rows = [{**row} for row in read["curves"] if row["optimizer"] in names]
    return Report(sweep=[{**row} for row in read["sweep"]], curves=curves, **hand_designed)


def _taken(results: Rows, task: str, horizon: int) -> Rows:
    rows = [row for row in results if (row["task"], int(row["horizon"])) == (task, horizon)]
    if not rows:
        raise ValueError(f"the baselines have no {task} at {horizon} steps; leave --baselines out to run them")
    return rows


def _contestants(
    fixed: Sequence[Contestant], runner: SuiteRunner, tuned: dict[tuple[str, str, int], Setting], task: str, horizon: int
) -> Iterable[tuple[str, Contestant]]:
    for one in fixed:
        if horizon in runner.horizons_of(one, runner.tasks[task]):
            yield one.label, one
    for name in runner.suite.grids:
        if (task, name, horizon) in tuned:
            yield f"{name}, tuned", tuned[task, name, horizon]


def _averaged(runner: SuiteRunner, task: str, horizon: int) -> list[tuple[str, Contestant, str]]:
    best = runner.best_averaged
    return [
        (f"{name}, tuned", best[key], "averaged") for name in runner.suite.grids if (key := (task, name, horizon)) in best
    ]


def _results(
    contestants: dict[str, Contestant], outcomes: dict[str, list[Outcome]], task: str, horizon: int, has_held_out: bool
) -> Iterable[Row]:
    """Return a row for each contestant; held-out losses have a column where any contestant is known to have one."""
    has_held_out |= any(horizon in one.held_out for of_one in outcomes.values() for one in of_one)
    for name, contestant in contestants.items():
        finals = torch.stack([smoothed_final(one.losses, horizon) for one in outcomes[name]])
        areas = torch.stack([one.losses[:horizon].double().mean() for one in outcomes[name]])
        # A run that diverged never reached its held-out examples: the mean of the other runs would hide it.
        held_out = [one.held_out.get(horizon, math.inf) for one in outcomes[name]]
        held_out = [value if math.isfinite(value) else math.inf for value in held_out]
        yield {
            "task": task,
            "horizon": horizon,
            "optimizer": name,
            "setting": contestant.text,
            "final": _rounded(finals.mean()),
            "standard_error": _rounded(finals.std() / len(finals) ** 0.5)
            if len(finals) > 1 and finals.isfinite().all()
            else "",
            "mean_over_run": _rounded(areas.mean()),
            "held_out": _rounded(sum(held_out) / len(held_out)) if has_held_out else "",
            "n": len(finals),
        }


def _ratios(results: Rows) -> Iterable[Row]:
    """Compare each learned rule with each baseline in the results of one task and horizon."""
    for rule in (row for row in results if is_learned(row)):
        for baseline in (row for row in results if not is_learned(row)):
            held_out = [row["held_out"] for row in (rule, baseline)]
            yield {
                "task": rule["task"],
                "horizon": rule["horizon"],
                "rule": rule["optimizer"],
                "against": baseline["optimizer"],
                "ratio": _over(float(rule["final"]), float(baseline["final"])),
                "log_standard_error": _root_sum_square([_relative_error(row) for row in (rule, baseline)]),
                "held_out_ratio": "" if "" in held_out else _over(float(held_out[0]), float(held_out[1])),
                "n": rule["n"],
            }


def _over(ours: float, theirs: float) -> float:
    """Return a ratio of losses, or NaN where the opponent's loss allows no comparison."""
    if not math.isfinite(theirs):
        return math.nan
    if theirs == 0:
        return math.inf if ours else 1.0
    return _rounded(ours / theirs)


def _relative_error(row: Row) -> float:
    known = row["standard_error"] != "" and float(row["final"]) != 0
    return float(row["standard_error"]) / float(row["final"]) if known else math.nan


def _root_sum_square(errors: Sequence[float]) -> float | str:
    total = math.hypot(*errors)
    return "" if math.isnan(total) else _rounded(total)


def _summary(ratios: Rows, results: Rows) -> Rows:
    rows = list(_summarised(ratios, results))
    counted = any(row["baseline_diverged"] for row in rows)
    return [{key: value for key, value in row.items() if counted or key != "baseline_diverged"} for row in rows]


def _summarised(ratios: Rows, results: Rows) -> Iterable[Row]:
    broken = [row for row in results if not math.isfinite(float(row["final"]))]
    diverged = {(row["task"], int(row["horizon"]), row["optimizer"]) for row in broken}
    groups = dict.fromkeys((row["rule"], row["against"], row["horizon"]) for row in ratios)
    for rule, against, horizon in groups:
        every = [r for r in ratios if (r["rule"], r["against"], r["horizon"]) == (rule, against, horizon)]
        sides = [sum((row["task"], int(horizon), row[side]) in diverged for row in every) for side in ("rule", "against")]
        chosen = [row for row in every if not math.isnan(float(row["ratio"]))]
        values = torch.tensor([float(row["ratio"]) for row in chosen], dtype=torch.float64)
        of_both = [float(row["held_out_ratio"]) for row in every if row["held_out_ratio"] != ""]
        held = torch.tensor([value for value in of_both if not math.isnan(value)])
        worst: Row = chosen[int(values.argmax())] if chosen else {"ratio": math.nan, "task": "none"}
        yield {
            "rule": rule,
            "against": against,
            "horizon": horizon,
            "ratio": _rounded(values.log().mean().exp()),
            "held_out_ratio": _rounded(held.log().mean().exp()) if len(held) else "",
            "wins": int((values < 1).sum()),
            "tasks": len(chosen),
            "worst": worst["ratio"],
            "worst_task": worst["task"],
            "diverged": sides[0],
            "baseline_diverged": sides[1],
        }


def _sweep(runner: SuiteRunner) -> Iterable[Row]:
    for (task, name), group in runner.tried.items():
        for setting in group:
            for horizon in runner.horizons_of(setting, runner.tasks[task]):
                row: Row = {"task": task, "horizon": horizon, "optimizer": name, "lr": setting.lr}
                smoothed = runner.final(setting, task, horizon, (TUNING_SEED,))
                shipped = {
                    measure: _rounded(runner.shipped(setting, task, horizon, (TUNING_SEED,), measure).mean())
                    for measure in ("final_loss", "averaged_loss")
                }
                yield {**row, "momentum": setting.momentum, "final": _rounded(smoothed.mean()), **shipped, "n": 1}


def _curves(
    runner: SuiteRunner, contestants: dict[str, Contestant], task: str, horizon: int, seeds: Sequence[int]
) -> Iterable[Row]:
    ends = sorted({round(horizon ** (0.25 + 0.75 * i / CURVE_POINTS)) for i in range(CURVE_POINTS + 1)})
    for name, contestant in contestants.items():
        losses = torch.stack([one.losses[:horizon] for one in runner.outcomes(contestant, task, horizon, seeds)])
        for end in ends:
            row: Row = {"task": task, "optimizer": name, "inner_step": end}
            yield {**row, "loss": _rounded(torch.stack([smoothed_final(one, end) for one in losses]).mean())}
