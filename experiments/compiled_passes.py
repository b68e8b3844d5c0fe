"""What compiling the mixture's own forward and backward passes would gain, and what it would cost.

    python -m experiments.compiled_passes [SEED ...]

An episode of the default recipe draws its own architectures. One pass of each is timed as it is and compiled by
TorchInductor, beside what tracing and compiling take. Set TORCHINDUCTOR_CACHE_DIR to an empty folder, or what was
compiled before is found again.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.timing import side_by_side, write_table
from learned_optim.backends.compiled import compile_graph
from meta_train.rows import Row
from meta_train.tasks.task import Optimizee
from meta_train.training.publish import WEIGHTS_DIR
from meta_train.training.recipe import Recipe, read_recipe
from meta_train.training.roll_out import start_episode

SEEDS = (3, 4, 7, 8, 9)
"""Problems whose loss can be traced; that of seed 0 cannot, as it reads a number out of a tensor."""


def pass_of(optimizee: Optimizee) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return the function that gives a problem's losses and their gradient at parameters ``(P, D)``."""

    def run(params: Tensor) -> tuple[Tensor, Tensor]:
        leaf = params.detach().requires_grad_()
        losses = optimizee.losses(optimizee.unflatten(leaf))
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    return run


def measure(recipe: Recipe, seed: int) -> Row:
    """Time a pass both ways side by side, and compare the time to compile it with the passes of a mean episode."""
    optimizee = recipe.task.sample(seed)
    run, params = pass_of(optimizee), start_episode(recipe.build_rule(), optimizee).params
    start = time.perf_counter()
    compiled = compile_graph(make_fx(run)(params), [params])
    compiled(params)
    spent = time.perf_counter() - start
    eager, fused = side_by_side({"as it is": lambda: run(params), "compiled": lambda: compiled(params)}, repeats=12).values()
    shortest, longest = recipe.inner.horizon
    episode = eager * (longest - shortest) / math.log(longest / shortest)
    return {
        "problem": seed,
        "times_as_it_is": f"{fused / eager:.2f}",
        "compiling_over_passes_of_mean_episode": f"{spent / episode:.1f}",
    }


def main() -> None:
    """Measure each problem, print ratios, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=SEEDS, help="problems of the mixture; default: %(default)s")
    recipe = read_recipe(WEIGHTS_DIR / "default.toml")
    rows = [measure(recipe, seed) for seed in parser.parse_args().seeds]
    for row in rows:
        print(
            f"problem {row['problem']}: a compiled pass takes {row['times_as_it_is']} x; "
            f"compiling it {row['compiling_over_passes_of_mean_episode']} x all passes of a mean episode"
        )
    write_table("compiled_passes", rows, Path(__file__).parent)


if __name__ == "__main__":
    main()
