"""Judge optimizers: every one, learned or not, runs through the same ``torch.optim`` path on optimizees it has never seen.

Baselines are tuned on optimizees of their own (purpose ``"tuning"``), then everything is reported on fresh ones (purpose
``"evaluation"``). A curve holds the losses ``f(theta_0) ... f(theta_T)``; its *sum* adds ``f(theta_0) ... f(theta_{T-1})``,
the losses an ordinary training loop prints, and its *final* loss is ``f(theta_T)``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from learned_optim import LearnedOptimizer
from learned_optim.weights import Weights
from meta_train.baselines import FIXED, QUADRATIC, MakeOptimizer, Setting, best_setting
from meta_train.outer_loop import derive_seed
from meta_train.run_dir import environment, write_atomically
from meta_train.tasks import Optimizee, Quadratic, Task

Rows = list[dict[str, str | int | float]]

LEARNED = "LSTM"
HORIZONS = (100, 200)
CRITERIA: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sum": lambda curves, horizon: curves[:, :horizon].sum(1),
    "final": lambda curves, horizon: curves[:, horizon],
}


def run(optimizee: Optimizee, make_optimizer: MakeOptimizer, horizon: int) -> list[float]:
    """Train one optimizee with a ``torch.optim`` optimizer.

    Args:
        optimizee: Freshly sampled, a single problem (P = 1).
        make_optimizer: From parameters to optimizer.
        horizon: Inner steps, T.

    Returns:
        T + 1 losses, before each step and after the last.

    Raises:
        ValueError: If the optimizee holds several problems, which would share what an optimizer knows of a tensor.
    """
    if optimizee.num_problems != 1:
        raise ValueError(f"evaluate one problem at a time, got {optimizee.num_problems} side by side")
    params = {name: nn.Parameter(value[0].clone()) for name, value in optimizee.params.items()}
    optimizer = make_optimizer(params.values())
    losses = []
    for step in range(horizon + 1):
        optimizer.zero_grad()
        loss = optimizee.losses({name: value.unsqueeze(0) for name, value in params.items()}).sum()
        losses.append(loss.item())
        if step < horizon:
            loss.backward()
            optimizer.step()
    return losses


def curves(task: Task, make_optimizer: MakeOptimizer, horizon: int, purpose: str, count: int) -> Tensor:
    """Train ``count`` fresh optimizees.

    Args:
        task: Where they come from.
        make_optimizer: From parameters to optimizer.
        horizon: Inner steps, T.
        purpose: ``"tuning"`` or ``"evaluation"``: their optimizees are disjoint.
        count: How many.

    Returns:
        Losses ``(count, T + 1)``.
    """
    seeds = [derive_seed(0, purpose, index) for index in range(count)]
    return torch.tensor([run(task.sample(seed), make_optimizer, horizon) for seed in seeds], dtype=torch.float64)


@dataclass(frozen=True)
class Judgement:
    """Everything one evaluation found, as rows of tables.

    Args:
        sweep: Every setting tried while tuning.
        curves: Mean loss and standard error at each inner step, for each optimizer as tuned for each criterion.
        summary: Each criterion at each horizon, and its ratio to the best baseline's.
        fixed: The same for untuned rates.
    """

    sweep: Rows
    curves: Rows
    summary: Rows
    fixed: Rows


def judge(
    learned: Sequence[Weights],
    task: Task | None = None,
    sweep: Sequence[Setting] = QUADRATIC,
    *,
    tuning: int = 5,
    fresh: int = 20,
    progress: Callable[[Iterable[Setting]], Iterable[Setting]] = iter,
) -> Judgement:
    """Compare learned rules with tuned baselines.

    Args:
        learned: Rules; they are not tuned.
        task: Where optimizees come from; the paper's quadratics by default.
        sweep: Every setting of every baseline.
        tuning: Optimizees to tune baselines on.
        fresh: Optimizees to report on.
        progress: Wraps the settings while tuning, to show how far it is.

    Returns:
        The judgement.
    """
    task = Quadratic() if task is None else task
    horizon = max(HORIZONS)
    tried = {setting: curves(task, setting.make, horizon, "tuning", tuning) for setting in progress(_unique(sweep))}
    chosen: dict[tuple[str, str, int], Setting] = {}
    for optimizer in dict.fromkeys(setting.optimizer for setting in sweep):
        group = [setting for setting in tried if setting.optimizer == optimizer]
        for criterion, measure in CRITERIA.items():
            for end in HORIZONS:
                scores = {str(setting): float(measure(tried[setting], end).mean()) for setting in group}
                chosen[optimizer, criterion, end] = best_setting(scores, group)
    reported = {
        setting: curves(task, setting.make, horizon, "evaluation", fresh)
        for setting in dict.fromkeys((*chosen.values(), *FIXED))
    }
    ours = {weights: curves(task, learned_with(weights), horizon, "evaluation", fresh) for weights in learned}
    return Judgement(
        sweep=list(_sweep_rows(tried)),
        curves=list(_curve_rows(chosen, reported, ours)),
        summary=list(_summary_rows(chosen, reported, ours)),
        fixed=[
            {"optimizer": s.optimizer, "setting": str(s), **_statistics(CRITERIA["sum"](reported[s], 100))} for s in FIXED
        ],
    )


def learned_with(weights: Weights) -> MakeOptimizer:
    """Return a maker of the shipped optimizer with the given weights."""

    def make(params: Iterable[Tensor]) -> Optimizer:
        return LearnedOptimizer(params, weights=weights)

    return make


def _unique(settings: Sequence[Setting]) -> list[Setting]:
    return list({str((s.optimizer, str(s))): s for s in settings}.values())


def _statistics(values: Tensor) -> dict[str, float | int]:
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(0.0)
    return {"mean": _rounded(values.mean()), "standard_error": _rounded(error), "n": len(values)}


def _rounded(value: Tensor | float) -> float:
    return float(f"{float(value):.6g}")


def _sweep_rows(tried: dict[Setting, Tensor]) -> Iterator[dict[str, str | int | float]]:
    for setting, losses in tried.items():
        scores = {
            f"{criterion}_{end}": _rounded(measure(losses, end).mean())
            for end in HORIZONS
            for criterion, measure in CRITERIA.items()
        }
        yield {"optimizer": setting.optimizer, "setting": str(setting), "lr": setting.lr, **scores, "n": len(losses)}


def _curve_rows(
    chosen: dict[tuple[str, str, int], Setting], reported: dict[Setting, Tensor], ours: dict[Weights, Tensor]
) -> Iterator[dict[str, str | int | float]]:
    named = [(f"{LEARNED} ({weights.name})", "", losses) for weights, losses in ours.items()]
    for optimizer in dict.fromkeys(key[0] for key in chosen):
        setting = chosen[optimizer, "final", HORIZONS[0]]
        named.append((optimizer, str(setting), reported[setting]))
    for optimizer, text, losses in named:
        for step, column in enumerate(losses.T):
            yield {"optimizer": optimizer, "setting": text, "inner_step": step, **_statistics(column)}


def _summary_rows(
    chosen: dict[tuple[str, str, int], Setting], reported: dict[Setting, Tensor], ours: dict[Weights, Tensor]
) -> Iterator[dict[str, str | int | float]]:
    for end in HORIZONS:
        for criterion, measure in CRITERIA.items():
            settings = {key[0]: setting for key, setting in chosen.items() if key[1:] == (criterion, end)}
            results = {name: (str(setting), measure(reported[setting], end)) for name, setting in settings.items()}
            best = min(float(values.mean()) for _, values in results.values())
            for weights, losses in ours.items():
                results[f"{LEARNED} ({weights.name})"] = ("", measure(losses, end))
            for name, (text, values) in results.items():
                ratio = _rounded(float(values.mean()) / best)
                row: dict[str, str | int | float] = {"horizon": end, "criterion": criterion, "optimizer": name}
                yield {**row, "setting": text, **_statistics(values), "ratio_to_best_baseline": ratio}


GRADIENTS: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1.0,
    "pulse": lambda step: 1.0 if step < 5 else 0.0,
    "alternating": lambda step: (-1.0) ** step,
    "decaying": lambda step: 0.95**step,
}


def probe(weights: Weights, scale: float = 1.0, adam_lr: float = 0.1, steps: int = 60) -> Rows:
    """Record what a rule does with simple gradients over time, beside Adam.

    Args:
        weights: The rule.
        scale: Size of the gradients.
        adam_lr: Adam's rate.
        steps: Inner steps.

    Returns:
        A row for each gradient and inner step, with both updates.
    """
    rows: Rows = []
    for name, gradient in GRADIENTS.items():
        ours, theirs = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        optimizers = (LearnedOptimizer([ours], weights=weights), Adam([theirs], lr=adam_lr))
        for step in range(steps):
            before = (ours.item(), theirs.item())
            for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
                parameter.grad = torch.full((1,), scale * gradient(step))
                optimizer.step()
            updates = {"learned": _rounded(ours.item() - before[0]), "adam": _rounded(theirs.item() - before[1])}
            rows.append({"gradient": name, "inner_step": step, "value": _rounded(scale * gradient(step)), **updates})
    return rows


def write_judgement(judgement: Judgement, out: Path) -> None:
    """Write the tables of a judgement and where they were made.

    Args:
        judgement: From :func:`judge`.
        out: Directory; created if missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in vars(judgement).items():
        write_rows(out / f"{name}.csv", rows)
    write_atomically(out / "environment.json", (json.dumps(environment(), indent=2) + "\n").encode())


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows as CSV, atomically.

    Args:
        path: The file.
        rows: At least one; all with the same columns.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV written by :func:`write_rows`.

    Args:
        path: The file.

    Returns:
        One dict a row, every value a string.
    """
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
