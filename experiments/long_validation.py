"""Whether seeds of the default recipe rank at long horizons as they do where they are validated.

    python -m experiments.long_validation default runs/default-1.safetensors runs/default-2.safetensors

Validation on the way follows held-out kinds for 600 steps, so that it costs minutes. Here the weights of each seed, with the
options they have in use, are validated on the first of these optimizees for 600 and for 4,000 steps. Adds to
``docs/results/default/long.csv``; what stands there is not run again.
"""

import argparse
from pathlib import Path

import msgspec
import torch
from tqdm import tqdm

from learned_optim.weights import resolve_weights
from meta_train.provenance import environment
from meta_train.rows import Rows, read_rows, write_rows
from meta_train.training.outer_loop import validate
from meta_train.training.parts import Parts
from meta_train.training.publish import WEIGHTS_DIR
from meta_train.training.recipe import parse_recipe, read_recipe

TABLE = Path(__file__).parents[1] / "docs" / "results" / "default" / "long.csv"
OPTIMIZEES = 10
HORIZONS = (600, 4000)


def main() -> None:
    """Validate what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", help="bundled names or files")
    torch.set_num_threads(1)
    recipe = read_recipe(WEIGHTS_DIR / "default.toml")
    task, commit = recipe.validation.task, environment()["commit"]
    assert task is not None
    rows: Rows = [{**row} for row in read_rows(TABLE)] if TABLE.exists() else []
    done = {(row["fingerprint"], str(row["horizon"])) for row in rows}
    for name in tqdm(parser.parse_args().weights, unit="weights"):
        weights = resolve_weights(name)
        fingerprint = weights.fingerprint[:12]
        for horizon in HORIZONS:
            if (fingerprint, str(horizon)) in done:
                continue
            validation = msgspec.structs.replace(recipe.validation, optimizees=OPTIMIZEES, horizon=horizon)
            found = validate(Parts.whole(weights.rule), task, msgspec.structs.replace(recipe, validation=validation))
            row = {"seed": parse_recipe(weights.recipe).seed, "horizon": horizon, "validation": f"{found:.4f}"}
            rows.append({**row, "n": OPTIMIZEES, "fingerprint": fingerprint, "commit": commit})
            write_rows(TABLE, rows)
    for row in rows:
        print(f"seed {row['seed']}  {row['horizon']:>5} steps  {row['validation']}")


if __name__ == "__main__":
    main()
