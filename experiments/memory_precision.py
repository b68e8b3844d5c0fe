"""Does narrower memory change what an optimizer reaches?

python -m experiments.memory_precision [--data DIR] [--seeds N] [--out DIR]

Trains the paper's quadratics (weights ``quadratic``), digits and the held-out kinds (weights ``default``), and with
``--data`` three models on real data, with each way to store memory, from the same starts on the same minibatches. Prints for
each task the geometric mean over seeds of the final loss's ratio to float32's, and its range. The control is float32 from a
start moved by one part in a million: what it differs by, chance decides. Writes every run to a CSV beside the environment.
"""

import argparse
import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, state_bytes
from meta_train.judging.arenas import ARENAS
from meta_train.judging.real import real_tasks
from meta_train.judging.real_data import prepared
from meta_train.judging.trial import curves, train_case
from meta_train.provenance import environment
from meta_train.rows import Row, write_rows
from meta_train.tasks.case import JudgingTask
from meta_train.tasks.held_out import HELD_OUT_KINDS

FLOAT32, CONTROL = "float32", "float32, control"
STORAGES: dict[str, dict[str, Any]] = {
    FLOAT32: {},
    CONTROL: {},
    "bfloat16": {"state_dtype": "bfloat16"},
    "bfloat16, bfloat16 moments": {"state_dtype": "bfloat16", "moment_dtype": "bfloat16"},
    "int8, float32 moments": {"state_dtype": "int8", "moment_dtype": "float32"},
    "int8": {"state_dtype": "int8"},
}
REAL = ("mnist-sigmoid", "kin40k", "adult")
HORIZON = 1000
LAST = 50
"""Losses of minibatches averaged into a final one."""


def make_optimizer(storage: str, weights: str, params: Iterable[Tensor]) -> LearnedOptimizer:
    """Build the optimizer of one contestant."""
    params = list(params)
    if storage == CONTROL:
        with torch.no_grad():
            for param in params:
                param.mul_(1 + 1e-6)
    return LearnedOptimizer(params, weights=weights, **STORAGES[storage])


def of_arena(name: str, weights: str, horizon: int, count: int) -> Iterator[Row]:
    """Train ``count`` fresh optimizees of an arena with every storage that its rule knows."""
    for storage in STORAGES if weights == "default" else (name for name in STORAGES if "moments" not in name):
        make: Callable[..., Any] = functools.partial(make_optimizer, storage, weights)
        found = curves(ARENAS[name].task, make, horizon, "evaluation", count)
        finals = found[:, -max(ARENAS[name].last, 1) :].mean(1).tolist()
        for seed, final in enumerate(finals):
            yield row(name, weights, storage, horizon, seed, final)


def of_task(task: JudgingTask, seeds: int) -> Iterator[Row]:
    """Train a judging task with every storage."""
    for storage in STORAGES:
        for seed in range(seeds):
            outcome = train_case(task, functools.partial(make_optimizer, storage, "default"), HORIZON, seed)
            final = float(outcome.losses[-LAST:].double().mean())
            yield row(task.name, "default", storage, HORIZON, seed, final, outcome.held_out.get(HORIZON, ""))


def row(task: str, weights: str, storage: str, horizon: int, seed: int, final: float, held_out: float | str = "") -> Row:
    """Return one line of the CSV."""
    count = 1000
    size = state_bytes([nn.Parameter(torch.empty(count, device="meta"))], weights, **STORAGES[storage]) // count
    return {
        **{"task": task, "weights": weights, "storage": storage, "bytes_per_parameter": size, "horizon": horizon},
        **{"seed": seed, "final_loss": f"{final:.6g}", "held_out_loss": held_out and f"{held_out:.6g}"},
    }


def report(rows: list[Row]) -> list[str]:
    """Return a table: a line a task and storage, ratios to float32 on the same seed."""
    base = {(r["task"], r["seed"]): float(r["final_loss"]) for r in rows if r["storage"] == FLOAT32}
    ratios = defaultdict(list)
    for r in rows:
        ratios[r["task"], r["storage"], r["bytes_per_parameter"]].append(float(r["final_loss"]) / base[r["task"], r["seed"]])
    overall = defaultdict(list)
    lines = [f"{'task':<20}{'storage':<30}{'bytes':>6}{'ratio':>9}{'lowest':>9}{'highest':>9}{'seeds':>7}"]
    for (task, storage, size), values in ratios.items():
        if storage != FLOAT32:
            mean = math.exp(sum(map(math.log, values)) / len(values))
            overall[storage].append(mean)
            lines.append(
                f"{task:<20}{storage:<30}{size:>6}{mean:>9.4f}{min(values):>9.4f}{max(values):>9.4f}{len(values):>7}"
            )
    for storage, means in overall.items():
        mean = math.exp(sum(map(math.log, means)) / len(means))
        lines.append(f"{'all tasks':<20}{storage:<30}{'':>6}{mean:>9.4f}{min(means):>9.4f}{max(means):>9.4f}{len(means):>7}")
    return lines


def main() -> None:
    """Train everything, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of real data, as docs/judging.md describes it")
    parser.add_argument("--cache", type=Path, default=Path("runs/judging"), help="where decoded real data is kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results/memory"))
    parser.add_argument("--only", nargs="*", default=[], help="names of tasks")
    options = parser.parse_args()
    tasks = list(HELD_OUT_KINDS)
    if options.data:
        tasks += [task for task in real_tasks(*prepared(options.cache, options.data)) if task.name in REAL]
    runs = {
        "quadratic": lambda: of_arena("quadratic", "quadratic", 100, 10 * options.seeds),
        "digits": lambda: of_arena("digits", "default", 200, 10 * options.seeds),
        **{task.name: functools.partial(of_task, task, options.seeds) for task in tasks},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    rows: list[Row] = []
    for name in options.only or runs:
        rows += runs[name]()
        write_rows(options.out / "precision.csv", rows)  # Whatever is done stays if the rest is not.
    print("\n".join(report(rows)))


if __name__ == "__main__":
    main()
