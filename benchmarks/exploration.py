"""Which choices of the default recipe matter: short meta-training runs that differ from it in one of them.

    python -m benchmarks.exploration [--steps 450] [VARIATION ...]

Each run is judged on the synthetic kinds that the mixture does not hold, so nothing here spends the data that judge the
published weights. A finished run is a file in ``runs/exploration`` and is not made again; the table is made of all of them.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from tqdm import tqdm

from learned_optim import LearnedOptimizer, Weights
from meta_train.evaluate import Rows, write_rows
from meta_train.judging.held_out_kinds import HELD_OUT_KINDS
from meta_train.judging.suite import smoothed_final
from meta_train.judging.task import train_case
from meta_train.outer_loop import MetaTraining
from meta_train.publish import WEIGHTS_DIR
from meta_train.recipe import Recipe, read_recipe
from meta_train.run_dir import environment, write_atomically
from meta_train.tasks.mixture import KINDS

RUNS = Path("runs/exploration")
TABLE = Path(__file__).parent / "exploration.csv"
HORIZONS = (200, 500)

VARIATIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "LSTM 1x4": {"rule": {"hidden_size": 4}},
    "LSTM 1x16": {"rule": {"hidden_size": 16}},
    "LSTM 2x20": {"rule": {"hidden_size": 20, "num_layers": 2}},
    "no annealing": {"rule": {"anneal_power": 0.0}},
    "annealing 0.5": {"rule": {"anneal_power": 0.5}},
    "no time": {"rule": {"time_scales": []}},
    "one momentum": {"rule": {"slow_decay": 0.9}},
    "slow momentum 0.999": {"rule": {"slow_decay": 0.999}},
    "scale floor 0.01": {"rule": {"min_scale": 0.01}},
    "no scale": {"rule": {"min_scale": 0.1, "max_scale": 0.1}},
    "mean objective": {"outer": {"objective": "mean"}},
    "log objective": {"outer": {"objective": "log"}},
    "truncation 16": {"inner": {"truncation": 16}, "outer": {"episodes": 16}},
    "truncation 64": {"inner": {"truncation": 64}, "outer": {"episodes": 4}},
    "discount 0.97": {"outer": {"discount": 0.97}},
    "horizons to 1,000": {"inner": {"horizon": [100, 1000]}},
    "outer rate 2e-3": {"outer": {"lr": 2e-3}},
    "outer rate 8e-3": {"outer": {"lr": 8e-3}},
    "averaging 0.99": {"outer": {"averaging": 0.99}},
    "every coordinate": {"outer": {"coordinates": 0}},
    "reparametrised 10 x": {"task": {"reparametrise": 10.0}},
    **{f"without {kind}": {"task": {"kinds": [other for other in KINDS if other != kind]}} for kind in KINDS},
}
"""What each variation changes in the recipe. The last ones leave one kind of problem out of the mixture."""


def main() -> None:
    """Make the runs that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variations", nargs="*", help=", ".join(VARIATIONS))
    parser.add_argument("--steps", type=int, default=450, help="outer steps; default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := set(options.variations) - set(VARIATIONS):
        parser.error(f"there is no variation {', '.join(sorted(unknown))}")
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in options.variations or VARIATIONS:
        recipe = vary(VARIATIONS[name], options.steps)
        file = RUNS / f"{name.replace(' ', '-')}-{options.steps}.json"
        if not file.exists():
            losses = {task: values for task, values in tqdm(judge(meta_train(recipe, name)), name, len(HELD_OUT_KINDS))}
            about = {"variation": name, "steps": options.steps, "commit": environment()["commit"], "losses": losses}
            write_atomically(file, json.dumps(about).encode())
    table = rows([json.loads(file.read_text()) for file in sorted(RUNS.glob(f"*-{options.steps}.json"))])
    write_rows(TABLE, table)
    for row in table:
        worst = f"worst {row['worst_500']} ({row['worst_kind']})"
        print(f"{row['variation']:<28}{row['ratio_200']:>8}{row['ratio_500']:>8}  {worst}")


def vary(changes: Mapping[str, Any], steps: int) -> Recipe:
    """Return the default recipe with changes, as many outer steps, and no validation on the way."""
    recipe = msgspec.to_builtins(read_recipe(WEIGHTS_DIR / "default.toml"))
    once = {"every": steps, "optimizees": 1, "horizon": 1}
    for name, change in {**changes, "validation": once}.items():
        recipe[name] = {**recipe[name], **change} if isinstance(change, Mapping) else change
    recipe["outer"]["steps"] = steps
    return msgspec.convert(recipe, Recipe)


def meta_train(recipe: Recipe, name: str) -> Weights:
    """Return the weights at the end of a run."""
    run = MetaTraining(recipe)
    for _ in tqdm(run, name, recipe.outer.steps):
        pass
    return Weights(run.average)


def judge(weights: Weights) -> Iterator[tuple[str, dict[int, float]]]:
    """Yield the smoothed final loss at each horizon on each held-out kind, one seed."""
    for task in HELD_OUT_KINDS:
        losses = train_case(task, lambda params: LearnedOptimizer(params, weights=weights), HORIZONS[-1], 0).losses
        yield task.name, {horizon: float(smoothed_final(losses, horizon)) for horizon in HORIZONS}


def rows(runs: list[dict[str, Any]]) -> Rows:
    """Return one row a variation: geometric means over kinds of the loss relative to the recipe as published."""
    losses = {run["variation"]: run["losses"] for run in runs}
    base = losses["as published"]
    table = []
    for run in runs:
        ratios = {h: {kind: run["losses"][kind][str(h)] / base[kind][str(h)] for kind in base} for h in HORIZONS}
        worst = max(ratios[500], key=ratios[500].__getitem__)
        table.append(
            {
                "variation": run["variation"],
                "outer_steps": run["steps"],
                **{f"ratio_{h}": f"{math.exp(sum(map(math.log, ratios[h].values())) / len(base)):.3f}" for h in HORIZONS},
                "worst_500": f"{ratios[500][worst]:.2f}",
                "worst_kind": worst,
                "n": 1,
                "commit": run["commit"],
            }
        )
    return sorted(table, key=lambda row: row["ratio_500"])


if __name__ == "__main__":
    main()
