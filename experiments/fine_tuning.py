"""What `lr` and a warm-up do to the learned rule on pretrained nets, beside Adam at the best of four rates.

    python -m experiments.fine_tuning --data DIR

Two nets pretrained on real data and two on synthetic data, as the judging suites have them. The table of docs/fine-tuning.md
is made from what this writes.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from learned_optim import LearnedOptimizer
from meta_train.files import write_atomically
from meta_train.judging.real_data import prepared
from meta_train.judging.real_further import judging_tasks
from meta_train.judging.trial import early_loss, train_case
from meta_train.provenance import environment
from meta_train.rows import Row, read_rows, rounded, write_rows
from meta_train.tasks.case import JudgingTask
from meta_train.tasks.held_out import SHIPPED_KINDS

SEEDS = (0, 1, 2)
HORIZON = 100
"""Inner steps: fine-tuning is short, and the first steps decide."""

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
LEARNED = tuple((lr, warm_up) for lr in (1.0, 0.3, 0.1) for warm_up in (0, 50))
RESULTS = Path(__file__).parent.parent / "docs" / "results" / "fine-tuning"


def contestants() -> Iterator[tuple[Row, object, object]]:
    """Every optimizer: how tables call it, its maker and its schedule."""
    for lr, warm_up in LEARNED:

        def schedule(optimizer: Optimizer, horizon: int, warm_up: int = warm_up) -> LambdaLR:
            return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up) if warm_up else 1.0)

        row: Row = {"optimizer": "default", "lr": lr, "warm_up": warm_up}
        yield row, lambda params, lr=lr: LearnedOptimizer(params, lr=lr), schedule
    for lr in RATES:
        yield {"optimizer": "Adam", "lr": lr, "warm_up": 0}, lambda params, lr=lr: Adam(params, lr=lr), None


def rows_of(task: JudgingTask) -> Iterator[Row]:
    """Train every contestant on a task, and give its means over the seeds."""
    for about, make, schedule in contestants():
        runs = [train_case(task, make, HORIZON, seed, schedule) for seed in SEEDS]  # type: ignore[arg-type]
        first = sum(map(early_loss, runs)) / len(runs)
        row: Row = {"task": task.name, **about, "horizon": HORIZON, "first_steps": rounded(first, 4)}
        for measure in ("final_loss", "held_out"):
            values = torch.tensor([getattr(run, measure).get(HORIZON, torch.inf) for run in runs])
            row[measure] = rounded(values.mean(), 4)
        start = sum(run.final_loss[0] for run in runs) / len(runs)
        yield {**row, "start": rounded(start, 4), "n": len(runs)}


def main() -> None:
    """Run everything and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="directory of the real data (docs/judging.md); without, synthetic nets alone"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/judging"))
    parser.add_argument("--tasks", nargs="*", help="run these alone, and keep what the table says of others")
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = judging_tasks(*prepared(options.cache, options.data)) if options.data else ()
    tasks = [task for task in (*real, *SHIPPED_KINDS) if task.name.startswith("fine-tuned")]
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "results.csv"
    for task in tasks:
        if options.tasks and task.name not in options.tasks:
            continue
        found = list(rows_of(replace(task, horizons=(HORIZON,))))
        kept = [row for row in read_rows(path) if row["task"] != task.name] if path.exists() else []
        order = {one.name: index for index, one in enumerate(tasks)}
        write_rows(path, sorted([*kept, *found], key=lambda row: order[str(row["task"])]))
        print(f"{task.name} is done", flush=True)
    command = f"python -m experiments.fine_tuning{' --data DIR' if options.data else ''}"
    about = {**environment(), "command": command}
    write_atomically(RESULTS / "environment.json", (json.dumps(about, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
