"""Tables of losses at the weights that a user ships: the last ones, and averaged ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from meta_train.judging.contestants import Contestant, Learned
from meta_train.judging.suites import SuiteRunner
from meta_train.judging.trial import early_loss, spike
from meta_train.rows import Row, Rows, is_learned, rounded

MEASURES = {"last": ("final_loss", "held_out"), "averaged": ("averaged_loss", "averaged_held_out")}
"""Names of training and held-out loss, by the weights that are shipped."""
DIGITS = 5


def shipped_rows(
    runner: SuiteRunner, named: Iterable[tuple[str, Contestant, str]], task: str, horizon: int, seeds: Sequence[int]
) -> Rows:
    """Return rows of the losses that contestants ship.

    Args:
        runner: Holds the contestants' runs.
        named: Names in tables, contestants, and the weights that they ship: a key of :data:`MEASURES`.
        task: Name of the task.
        horizon: Inner steps.
        seeds: Seeds of the runs.

    Returns:
        A row for each: losses, the highest spike of any seed, and the mean loss of steps 5 to 15 over the initial loss.
    """
    return [_shipped(runner, name, one, weights, task, horizon, seeds) for name, one, weights in named]


def _shipped(
    runner: SuiteRunner, name: str, contestant: Contestant, weights: str, task: str, horizon: int, seeds: Sequence[int]
) -> Row:
    outcomes = runner.outcomes(contestant, task, horizon, seeds)
    training, held_out = (runner.shipped(contestant, task, horizon, seeds, measure) for measure in MEASURES[weights])
    has_held_out = any(horizon in one.held_out for one in outcomes)
    early = torch.tensor([early_loss(one) for one in outcomes], dtype=torch.float64)
    return {
        "task": task,
        "horizon": horizon,
        "optimizer": name,
        "setting": contestant.text,
        "weights": weights,
        "loss": rounded(training.mean(), DIGITS),
        "standard_error": _standard_error(training),
        "held_out": rounded(held_out.mean(), DIGITS) if has_held_out else "",
        "spike": rounded(max(spike(one.losses, horizon) for one in outcomes), DIGITS),
        "early": rounded(early.mean(), DIGITS),
        "n": len(outcomes),
    }


def _standard_error(values: Tensor) -> float | str:
    if len(values) < 2 or not values.isfinite().all():
        return ""
    return rounded(values.std() / len(values) ** 0.5, DIGITS)


def shipped_summary(rows: Rows) -> Rows:
    """Compare each learned rule with each opponent, at both kinds of weights.

    Tasks on which the opponent diverged, or has a loss of zero, are left out.

    Args:
        rows: From :func:`shipped_rows`, of all tasks and horizons; as numbers or as read from a file.

    Returns:
        Geometric means of ratios over the tasks, below 1 where the rule is better; their ``spread``, the standard deviation
        of their logarithms; wins, the worst task, and on how many tasks the rule ``diverged``; the highest spike of either.
    """
    return list(_summarised(rows))


def _summarised(rows: Rows) -> Iterator[Row]:
    groups: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        key = (str(row["optimizer"]), str(row["weights"]), int(row["horizon"]))
        groups.setdefault(key, {})[str(row["task"])] = row
    learned = [key for key in groups if is_learned(groups[key][next(iter(groups[key]))])]
    for mine in learned:
        for theirs in groups:
            if theirs not in learned and theirs[2] == mine[2]:
                pairs = [(row, groups[theirs][task]) for task, row in groups[mine].items() if task in groups[theirs]]
                sides = {"rule": mine[0], "weights": mine[1], "against": theirs[0], "against_weights": theirs[1]}
                if pairs:
                    yield {**sides, "horizon": mine[2], **_compared(pairs)}


def _compared(pairs: Sequence[tuple[Row, Row]]) -> Row:
    usable = [(mine, theirs) for mine, theirs in pairs if 0 < float(theirs["loss"]) < math.inf]
    ratios = torch.tensor([_ratio(*pair, "loss") for pair in usable], dtype=torch.float64)
    both = [pair for pair in usable if pair[0]["held_out"] != "" and 0 < float(pair[1]["held_out"] or 0) < math.inf]
    held_out = torch.tensor([_ratio(*pair, "held_out") for pair in both], dtype=torch.float64)
    errors = [error for pair in usable if (error := _squared_error(*pair)) is not None]
    worst = int(ratios.argmax()) if len(ratios) else None
    return {
        "ratio": _mean(ratios),
        "standard_error": rounded(math.sqrt(sum(errors)) / len(errors), DIGITS) if len(errors) == len(usable) > 0 else "",
        "spread": rounded(ratios.log().std(), DIGITS) if len(ratios) > 1 and ratios.isfinite().all() else "",
        "held_out_ratio": _mean(held_out),
        "wins": int((ratios < 1).sum()),
        "tasks": len(usable),
        "worst": "" if worst is None else rounded(ratios[worst], DIGITS),
        "worst_task": "none" if worst is None else usable[worst][0]["task"],
        "diverged": sum(math.isinf(float(mine["loss"])) for mine, _ in pairs),
        "against_diverged": sum(math.isinf(float(theirs["loss"])) for _, theirs in pairs),
        "spike": max(float(mine["spike"]) for mine, _ in pairs),
        "against_spike": max(float(theirs["spike"]) for _, theirs in pairs),
        "n": min(int(mine["n"]) for mine, _ in pairs),
    }


def _ratio(mine: Row, theirs: Row, column: str) -> float:
    return float(mine[column]) / float(theirs[column])


def _mean(ratios: Tensor) -> float | str:
    return rounded(ratios.log().mean().exp(), DIGITS) if len(ratios) else ""


def _squared_error(mine: Row, theirs: Row) -> float | None:
    """Return the squared standard error of the logarithm of a ratio, where both sides have one."""
    if "" in (mine["standard_error"], theirs["standard_error"]) or float(mine["loss"]) == 0:
        return None
    return sum((float(row["standard_error"]) / float(row["loss"])) ** 2 for row in (mine, theirs))


def ships(contestant: Contestant) -> tuple[str, ...]:
    """Return the weights at which an untuned contestant is measured: both for a learned rule, which is tuned to neither."""
    return ("last", "averaged") if isinstance(contestant, Learned) else ("last",)
