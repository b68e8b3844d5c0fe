"""Meta-train an update rule for a task of your own: any module, any loss, about 40 lines.

    python -m examples.own_task

A task is any object with `sample(seed)`; the same seed must give the same problem. Here: small nets that learn a sine of
random frequency from noisy points.
"""

import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, Weights
from meta_train.tasks import Optimizee, module_optimizee, seeded
from meta_train.training.outer_loop import MetaTraining
from meta_train.training.recipe import parse_recipe

RECIPE = """
seed = 0
rule = { family = "adam-modulation" }
task = { name = "mixture" }  # replaced by the task below
inner = { horizon = [20, 60], truncation = 20 }
outer = { steps = 60, lr = 1e-2, episodes = 4, objective = "log", loss_floor = 1e-3 }
validation = { every = 20, optimizees = 4, horizon = 60 }
"""


class Sines:
    """Regression on sines of random frequency, eight problems side by side."""

    def sample(self, seed: int) -> Optimizee:
        """Return the problems of a seed."""
        # Initial weights are drawn from the stream of seed, minibatches from that of seed + 1: data need one of their own.
        frequency = 1 + 3 * torch.rand(8, 1, 1, generator=seeded(seed + 2))

        def next_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            x = 2 * torch.rand(8, 32, 1, generator=generator) - 1
            return x, torch.sin(frequency * x) + 0.05 * torch.randn(x.shape, generator=generator)

        return module_optimizee(
            lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)),
            lambda module, batch: (module(batch[0]) - batch[1]).square().mean(),
            next_batch,
            seed,
            num_problems=8,
        )


if __name__ == "__main__":
    run = MetaTraining(parse_recipe(RECIPE), Sines())
    for record in run:
        if record.validation is not None:
            print(f"outer step {record.step}: validation {record.validation:.3f} (mean log of loss / first loss)")
    weights = Weights(run.best.rule, "sines")
    optimizer = LearnedOptimizer(
        nn.Linear(1, 1).parameters(), weights=weights
    )  # use it, or weights.save("sines.safetensors")
    print(weights, "in", type(optimizer).__name__)
