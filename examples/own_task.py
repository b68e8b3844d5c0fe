"""A task of your own: any module, any loss. The recipe beside it meta-trains a rule for it in two minutes.

    python -m meta_train train examples/own_task.toml --out runs/sines

A task is any object with `sample(seed)`; the same seed must give the same problem. Here: small nets that learn a sine of
random frequency from noisy points.
"""

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
