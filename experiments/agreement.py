"""Whether steps should be longer where gradients agree, on held-out kinds: yes; a gain of 6 and a limit of 3.

    nice -n 10 python -m experiments.agreement run --seeds 0 1
    python -m experiments.agreement table

Contestants are ``default`` with other values of ``agreement_gain`` and ``agreement_floor``. They train the models of
``experiments.orthogonal_updates`` and those of small nets with sigmoids, on the same minibatches, and are judged in the same
way. A run is a file in ``runs/orthogonal-updates/``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from experiments import orthogonal_updates as study
from learned_optim import LearnedOptimizer
from learned_optim.weights.weights import Weights, resolve_weights
from meta_train.tasks.held_out import SHIPPED_KINDS

SIGMOIDS = ("sigmoid-table", "sigmoid-classes")
study.KINDS.update({kind.name: kind for kind in SHIPPED_KINDS if kind.name in SIGMOIDS})
VARIANTS = {
    "no agreement": {"agreement_gain": 0.0},
    "gain 3": {"agreement_gain": 3.0, "agreement_limit": 8.0},
    "gain 6": {"agreement_gain": 6.0, "agreement_limit": 8.0},
    "gain 12": {"agreement_gain": 12.0, "agreement_limit": 8.0},
    "gain 6, floor 1.5": {"agreement_gain": 6.0, "agreement_floor": 1.5, "agreement_limit": 8.0},
    "gain 6, limit 3": {"agreement_gain": 6.0, "agreement_limit": 3.0},
}
BASE = "no agreement"


def maker(options: dict[str, float]) -> Callable[[nn.Module], LearnedOptimizer]:
    """Return what makes ``default`` with other options."""
    weights = resolve_weights("default")
    rule = copy.deepcopy(weights.rule)
    rule.config = dataclasses.replace(rule.config, **options)
    changed = Weights(rule, weights.title)
    return lambda module: LearnedOptimizer(module.parameters(), weights=changed)


def losses(name: str, kind: str, seed: int) -> study.Losses:
    """Return the losses of one run."""
    return study.cached(f"agreement: {name}", kind, seed, maker(VARIANTS[name]))


def table(seeds: list[int]) -> None:
    """Write all losses as a csv, and ratios to the rule without agreement as markdown."""
    rows = [
        {"contestant": name, "kind": kind, "seed": seed, "horizon": horizon, "last": last, "averaged": averaged}
        for name in VARIANTS
        for kind in study.KINDS
        for seed in seeds
        for horizon, (last, averaged) in losses(name, kind, seed).items()
    ]
    with (study.RESULTS / "agreement.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    found = {(row["contestant"], row["kind"], row["seed"], row["horizon"]): row for row in rows}

    def ratio(name: str, kind: str, horizon: int, at: str) -> float:
        logs = [
            math.log(found[name, kind, seed, str(horizon)][at] / found[BASE, kind, seed, str(horizon)][at]) for seed in seeds
        ]
        return sum(logs) / len(logs)

    text = (
        "Made by `python -m experiments.agreement run` and `table`. Training losses of 20 fresh minibatches relative to the "
        f"same rule without agreement; seeds {seeds}; geometric means.\n"
    )
    for horizon in study.HORIZONS:
        for at in study.WEIGHTS:
            cells = []
            for name in VARIANTS:
                logs = [ratio(name, kind, horizon, at) for kind in study.KINDS]
                means = [sum(logs) / len(logs), *logs]
                cells.append([name, *(f"{math.exp(value):.3f}" for value in means)])
            text += f"\nAt {horizon} steps, {at} weights:\n\n" + study.markdown(["contestant", "mean", *study.KINDS], cells)
    (study.RESULTS / "agreement.md").write_text(text)


def main() -> None:
    """Parse and call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.verb == "table":
        table(options.seeds)
        return
    for seed in options.seeds:
        for name in VARIANTS:
            for kind in study.KINDS:
                losses(name, kind, seed)


if __name__ == "__main__":
    main()
