"""What other options of the default rule would do in use, with the meta-parameters as they are.

    python -m experiments.options_in_use '{"fast_decay": 0.9}' '{"anneal_power": 0.1}' [--horizon 5000] [--seeds 7 8]

Options that do not change the shape of the meta-parameters (``[use]`` of a recipe) can be chosen without meta-training. Each
kind of model that the mixture does not hold is trained with the published options and with each variation, from the same
start and on the same minibatches. Adds to ``options_in_use.csv``; what stands there is not run again.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from learned_optim import LearnedOptimizer, Weights
from learned_optim.rules import build_rule
from learned_optim.weights import resolve_weights
from meta_train.judging.trial import smoothed_final, train_case
from meta_train.provenance import environment
from meta_train.rows import Rows, read_rows, write_rows
from meta_train.tasks.held_out import HELD_OUT_KINDS, LONG_KINDS

TABLE = Path(__file__).parent / "options_in_use.csv"
HORIZONS = (200, 500, 1000, 2000, 3500, 5000, 10_000, 20_000)
KINDS = HELD_OUT_KINDS + LONG_KINDS
SOLVED = 0.01
"""Losses below this count as this: what is solved should not decide."""


def with_options(weights: Weights, options: Mapping[str, Any]) -> Weights:
    """Return the same meta-parameters under a rule with other options."""
    rule = build_rule(weights.rule.family, **{**dataclasses.asdict(weights.rule.config), **options})
    rule.load_state_dict(weights.rule.state_dict())
    return Weights(rule, weights.name)


def compare(rows: Rows, options: str, against: str) -> str:
    """Return the geometric mean over kinds and seeds of the ratio of two variations at each horizon."""
    finals = {(row["options"], row["kind"], row["seed"], row["horizon"]): max(float(row["final"]), SOLVED) for row in rows}
    cells = []
    for horizon in HORIZONS:
        pairs = [
            math.log(final / finals[(against, *key[1:])])
            for key, final in finals.items()
            if key[0] == options and key[3] == str(horizon) and (against, *key[1:]) in finals
        ]
        cells.append(f"{math.exp(sum(pairs) / len(pairs)):.3f}" if pairs else "-")
    return "  ".join(cells)


def main() -> None:
    """Run what is asked for and print ratios to the published options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variations", nargs="*", type=json.loads, help="options as JSON")
    parser.add_argument("--horizon", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7])
    parser.add_argument("--only", nargs="+", choices=[task.name for task in KINDS], help="kinds; default: all")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    weights = resolve_weights("default")
    published = weights.fingerprint[:12]
    variations = [(published, weights)]
    for options in asked.variations:
        variations.append((f"{published} {json.dumps(options)}", with_options(weights, options)))
    rows: Rows = [{**row} for row in read_rows(TABLE)] if TABLE.exists() else []
    finished = {(row["options"], row["kind"], int(row["seed"]), int(row["horizon"])) for row in rows}
    horizons = [end for end in HORIZONS if end <= asked.horizon]
    commit, processor = (environment()[key] for key in ("commit", "processor"))
    for name, variant in variations:
        for task in tqdm([task for task in KINDS if not asked.only or task.name in asked.only], desc=name, unit="kind"):
            for seed in asked.seeds:
                if (name, task.name, seed, horizons[-1]) in finished:
                    continue
                chosen = dataclasses.replace(task, horizons=(horizons[-1],))
                losses = train_case(
                    chosen, lambda params, variant=variant: LearnedOptimizer(params, weights=variant), horizons[-1], seed
                ).losses
                rows += [
                    {
                        "options": name,
                        "kind": task.name,
                        "seed": str(seed),
                        "horizon": str(end),
                        "final": f"{float(smoothed_final(losses, end)):.5g}",
                        "commit": commit,
                        "processor": processor,
                    }
                    for end in horizons
                ]
                write_rows(TABLE, rows)
    print(f"final loss relative to the published options at {', '.join(map(str, HORIZONS))} steps:")
    for name, _ in variations:
        print(f"{compare(rows, name, published)}  {name}")


if __name__ == "__main__":
    main()
