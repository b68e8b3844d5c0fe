"""Which choices of the default recipe matter: short meta-training runs that differ from it in one of them.

    python -m experiments.exploration [--steps 150] [--seeds 0] [VARIATION ...]

Each run is the first phase of the recipe, cut short, and is judged on the synthetic kinds that the mixture does not hold, so
nothing here spends the data that judge the published weights. Rules are judged as they were meta-trained, without the
recipe's ``[use]``. A finished run is a file in ``runs/exploration``, and its losses stand in the table ``kinds.csv``; what
either holds is not made again, and the tables are made of all. Runs of other numbers of outer steps do not share a table.
"""

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import geometric_mean, stdev
from typing import Any
from unittest import mock

import msgspec
import torch
from tqdm import tqdm

from experiments.wider_rules import NotingSteps, TensorRule, ValueRule, WiderOptimizer, WiderRule, build_wider_rule
from learned_optim import LearnedOptimizer
from learned_optim.rules import UpdateRule
from meta_train.files import write_atomically
from meta_train.judging.trial import smoothed_final, train_case
from meta_train.provenance import environment
from meta_train.rows import Rows, read_rows, write_rows
from meta_train.tasks.data import digit_stream
from meta_train.tasks.held_out import HELD_OUT_KINDS
from meta_train.tasks.mixture import KINDS
from meta_train.training.outer_loop import MetaTraining
from meta_train.training.publish import WEIGHTS_DIR
from meta_train.training.recipe import Evolution, Recipe, read_recipe

RUNS = Path("runs/exploration")
TABLES = Path(__file__).parents[1] / "docs" / "results" / "exploration"
HORIZONS = (200, 500)
BASE = "as in the recipe"
EVOLUTION = "then evolution strategies"
TWICE = "twice the outer steps"
GENERATIONS = 20
PAIRS = 4
NOISE = 0.01
WHOLE = (100, 400)
"""Inner steps of the whole episodes that evolution strategies look at, shortest and longest."""

REPLACED: dict[str, dict[str, Any]] = {
    "one batch size": {"tasks.mixture._batch_size": lambda rng, high=256: round(math.sqrt(8 * high))},
    "one width and depth": {"tasks.mixture._hidden": lambda rng: [20, 20]},
    "initial weights as they come": {"tasks.mixture._gain": lambda rng: 1.0},
    "no label noise": {"tasks.mixture.digit_stream": lambda *args, **how: digit_stream(*args, **how | {"label_noise": 0.0})},
    "the parameter's value": {
        "recipe.build_rule": partial(build_wider_rule, ValueRule),
        "roll_out.inner_steps": NotingSteps,
    },
    "the tensor's signal": {
        "recipe.build_rule": partial(build_wider_rule, TensorRule),
        "roll_out.inner_steps": NotingSteps,
    },
}
"""What of ``meta_train`` a variation replaces: a draw of the mixture, or the rule and its inner steps."""

VARIATIONS: dict[str, dict[str, Any]] = {
    BASE: {},
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
    "last objective": {"outer": {"objective": "last"}},
    "Adam(0.01) imitated first": {"imitation": {"teacher": 0.01, "steps": 50, "lr": 4e-3}},
    "truncation 16, 16 episodes": {"inner": {"truncation": 16}, "outer": {"episodes": 16}},
    "truncation 128, 2 episodes": {"inner": {"truncation": 128}, "outer": {"episodes": 2}},
    "discount 0.97": {"outer": {"discount": 0.97}},
    "horizons to 1,000": {"inner": {"horizon": [100, 1000]}},
    "horizons to 400, then to 4,000": {"inner": {"horizon": [100, 400]}, "then": {"horizon": [100, 4000], "lr": 4e-3}},
    "outer rate 2e-3": {"outer": {"lr": 2e-3}},
    "outer rate 8e-3": {"outer": {"lr": 8e-3}},
    "8 problems, 2,048 coordinates": {"task": {"problems": 8}, "outer": {"coordinates": 2048}},
    "8 problems, 2,048 coordinates, outer rate 8e-3": {"task": {"problems": 8}, "outer": {"lr": 8e-3, "coordinates": 2048}},
    "averaging 0.98": {"outer": {"averaging": 0.98}},
    "every coordinate": {"outer": {"coordinates": 0}},
    "coordinates by tensor": {"outer": {"sampling": "tensors"}},
    "weight decay 0.1": {"outer": {"weight_decay": 0.1}},
    EVOLUTION: {},
    TWICE: {},
    "reparametrised 10 x": {"task": {"reparametrise": 10.0}},
    **{f"without {kind}": {"task": {"kinds": [other for other in KINDS if other != kind]}} for kind in KINDS},
    **{name: {} for name in REPLACED},
}
"""What each variation changes in the recipe. The last ones leave one kind of problem out of the mixture, or change what no
recipe can. With ``then`` the second half of the outer steps is a stage of its own.

Evolution strategies go on from the base for about as long as it took, and are to be compared with twice the outer steps.
"""


def main() -> None:
    """Make the runs that are missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variations", nargs="*", help=", ".join(VARIATIONS))
    parser.add_argument("--steps", type=int, default=150, help="outer steps; default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of meta-training; default: 0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := set(options.variations) - set(VARIATIONS):
        parser.error(f"there is no variation {', '.join(sorted(unknown))}")
    if others := steps_of_the_table() - {options.steps}:
        parser.error(
            f"{TABLES / 'kinds.csv'} holds runs of {', '.join(map(str, sorted(others)))} outer steps, which --steps "
            f"{options.steps} would replace; give those, or move the tables away"
        )
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in options.variations or VARIATIONS:
        for seed in options.seeds:
            file = RUNS / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}-{seed}-{options.steps}.json"
            if not file.exists() and (name, seed) not in committed(options.steps):
                steps = options.steps * (2 if name == TWICE else 1)
                with ExitStack() as replaced:
                    for what, by in REPLACED.get(name, {}).items():
                        replaced.enter_context(mock.patch(f"meta_train.{what}", by))
                    run = meta_train(vary(VARIATIONS[name], steps, seed), f"{name}, seed {seed}")
                rule = evolve(run) if name == EVOLUTION else run.average.shared
                losses = {task: values for task, values in tqdm(judge(rule), name, len(HELD_OUT_KINDS))}
                about = {"variation": name, "seed": seed, "steps": options.steps, "commit": environment()["commit"]}
                write_atomically(file, json.dumps({**about, "losses": losses}).encode())
    made = [json.loads(file.read_text()) for file in sorted(RUNS.glob(f"*-{options.steps}.json"))]
    every = committed(options.steps) | {(run["variation"], run["seed"]): run for run in made}
    runs = [run for _, run in sorted(every.items())]
    TABLES.mkdir(parents=True, exist_ok=True)
    write_rows(TABLES / "kinds.csv", kinds(runs))
    write_rows(TABLES / "variations.csv", table := variations(runs))
    for row in table:
        spread = f"+- {row['spread_500']}" if row["n"] > 1 else ""
        worst = f"worst {row['worst_500']} ({row['worst_kind']})"
        print(f"{row['variation']:<28}{row['ratio_200']:>8}{row['ratio_500']:>8} {spread:<9} n={row['n']}  {worst}")


def steps_of_the_table() -> set[int]:
    """Return the numbers of outer steps of the runs in the table; it should be one at most."""
    return {int(row["outer_steps"]) for row in _rows()}


def _rows() -> list[dict[str, str]]:
    return read_rows(TABLES / "kinds.csv") if (TABLES / "kinds.csv").exists() else []


def committed(steps: int) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the runs of so many outer steps whose losses are in the table, by variation and seed."""
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for row in _rows():
        if row["outer_steps"] == str(steps):
            about = {"variation": row["variation"], "seed": int(row["seed"]), "steps": steps, "commit": row["commit"]}
            run = runs.setdefault((row["variation"], int(row["seed"])), {**about, "losses": defaultdict(dict)})
            run["losses"][row["kind"]][row["horizon"]] = float(row["loss"])
    return runs


def vary(changes: Mapping[str, Any], steps: int, seed: int) -> Recipe:
    """Return the first phase of the default recipe with changes, so many outer steps of it, and no validation on the way."""
    recipe = msgspec.to_builtins(read_recipe(WEIGHTS_DIR / "default.toml"))
    once = {"every": steps, "optimizees": 1, "horizon": 1}
    changes = {**changes, "validation": once}
    then = changes.pop("then", None)
    for name, change in changes.items():
        recipe[name] = {**(recipe[name] or {}), **change}
    recipe["outer"]["steps"] = steps // 2 if then else steps
    stages = [{**then, "steps": steps - steps // 2}] if then else []
    return msgspec.convert({**recipe, "stages": stages, "use": {}, "seed": seed}, Recipe)


def meta_train(recipe: Recipe, name: str) -> MetaTraining:
    """Return a finished run."""
    run = MetaTraining(recipe)
    for _ in tqdm(run, name, recipe.steps):
        pass
    return run


def evolve(run: MetaTraining) -> UpdateRule:
    """Return the rule of a run after evolution strategies on whole episodes."""
    evolution = Evolution(noise=NOISE, pairs=PAIRS)
    outer = msgspec.structs.replace(
        run.recipe.outer, steps=GENERATIONS, lr=1e-3, final_lr=1.0, clip=1e9, evolution=evolution
    )
    inner = msgspec.structs.replace(run.recipe.inner, horizon=WHOLE)
    further = MetaTraining(msgspec.structs.replace(run.recipe, inner=inner, outer=outer))
    further.rule.load_state_dict(run.average.state_dict())
    for _ in tqdm(further, f"{EVOLUTION}, seed {run.recipe.seed}", GENERATIONS):
        pass
    return further.rule.shared


def judge(rule: UpdateRule) -> Iterator[tuple[str, dict[int, float]]]:
    """Yield the smoothed final loss at each horizon on each held-out kind, one seed."""

    def make(params: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        return WiderOptimizer(params, rule) if isinstance(rule, WiderRule) else LearnedOptimizer(params, weights=rule)

    for task in HELD_OUT_KINDS:
        losses = train_case(task, make, HORIZONS[-1], 0).losses
        yield task.name, {horizon: float(smoothed_final(losses, horizon)) for horizon in HORIZONS}


def ratios(runs: list[dict[str, Any]]) -> dict[tuple[str, int], dict[tuple[str, int], float]]:
    """Return by variation and seed, then kind and horizon, the loss relative to the geometric mean of the base."""
    keys = [(kind, horizon) for kind in runs[0]["losses"] for horizon in HORIZONS]
    base = [run["losses"] for run in runs if run["variation"] == BASE]
    if not base:
        raise SystemExit(f"run {BASE!r} first: the others are relative to it")
    level = {(kind, h): geometric_mean([losses[kind][str(h)] for losses in base]) for kind, h in keys}
    return {
        (run["variation"], run["seed"]): {(kind, h): run["losses"][kind][str(h)] / level[kind, h] for kind, h in keys}
        for run in runs
    }


def variations(runs: list[dict[str, Any]]) -> Rows:
    """Return one row a variation: geometric means over kinds and seeds, and their spread between seeds."""
    table, found = [], ratios(runs)
    for name in dict.fromkeys(name for name, _ in found):
        seeds = [of_kind for (variation, _), of_kind in found.items() if variation == name]
        means = {h: [geometric_mean([x for (_, end), x in one.items() if end == h]) for one in seeds] for h in HORIZONS}
        by_kind = {kind: geometric_mean([one[kind, h] for one in seeds]) for kind, h in seeds[0] if h == HORIZONS[-1]}
        worst = max(by_kind, key=by_kind.__getitem__)
        commits = {run["commit"] for run in runs if run["variation"] == name}
        row: dict[str, Any] = {"variation": name, "n": len(seeds), "outer_steps": runs[0]["steps"]}
        for h in HORIZONS:
            row[f"ratio_{h}"] = f"{geometric_mean(means[h]):.3f}"
            row[f"spread_{h}"] = f"{stdev(map(math.log, means[h])):.3f}" if len(seeds) > 1 else ""
        table.append({**row, "worst_500": f"{by_kind[worst]:.2f}", "worst_kind": worst, "commit": " ".join(sorted(commits))})
    return sorted(table, key=lambda row: row["ratio_500"])


def kinds(runs: list[dict[str, Any]]) -> Rows:
    """Return one row for each run, kind and horizon."""
    relative = ratios(runs)
    return [
        {
            "variation": run["variation"],
            "seed": run["seed"],
            "kind": kind,
            "horizon": horizon,
            "loss": f"{run['losses'][kind][str(horizon)]:.6g}",
            "ratio": f"{ratio:.4g}",
            "outer_steps": run["steps"],
            "commit": run["commit"],
        }
        for run in runs
        for (kind, horizon), ratio in relative[run["variation"], run["seed"]].items()
    ]


if __name__ == "__main__":
    main()
