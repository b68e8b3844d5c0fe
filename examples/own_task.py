"""A task of your own: any module, any loss. The recipe beside it meta-trains a rule for it in two minutes.

    python -m meta_train train examples/own_task.toml --out runs/sines

The same from Python, with as many outer steps as you say:

    python -m examples.own_task 60

A task is any object with `sample(seed)`; the same seed must give the same problem. Here: small nets that learn a sine of
random frequency from noisy points.
"""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from meta_train.tasks import Optimizee, module_optimizee, seeded


class Sines:
    """Regression on sines of random frequency, several problems side by side.

    Args:
        problems: Nets in one optimizee, each with a sine of its own.
    """

    def __init__(self, problems: int = 8) -> None:
        self.problems = problems

    def sample(self, seed: int) -> Optimizee:
        """Return the problems of a seed."""
        # Initial weights are drawn from the stream of seed, minibatches from that of seed + 1: data need one of their own.
        frequency = 1 + 3 * torch.rand(self.problems, 1, 1, generator=seeded(seed + 2))

        def next_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            x = 2 * torch.rand(self.problems, 32, 1, generator=generator) - 1
            return x, torch.sin(frequency * x) + 0.05 * torch.randn(x.shape, generator=generator)

        return module_optimizee(
            lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)),
            lambda module, batch: (module(batch[0]) - batch[1]).square().mean(),
            next_batch,
            seed,
            num_problems=self.problems,
        )


def main(steps: int) -> None:
    """Meta-train by the recipe in the file beside this one."""
    from meta_train.training.outer_loop import MetaTraining
    from meta_train.training.recipe import read_recipe

    recipe = read_recipe(Path(__file__).with_suffix(".toml"))
    run = MetaTraining(recipe.importing(recipe.own_tasks))
    before = run.validation_figure(run.rule)
    for record in run:
        if record.step == steps:
            break
    after = run.validation_figure(run.average)
    share = "of what nets start with, after 100 steps on validation problems"
    print(f"loss {math.exp(before):.4f} at the start, which is `default`, {math.exp(after):.4f} at the end: {share}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
