"""Averaged weights as a readout: they follow any optimizer and never change what it does."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SHARE = 0.05
"""Half-life of the average, as a share of the steps taken: such an average needs no horizon."""


class AveragedWeights:
    """An exponential average of weights whose half-life grows with the run.

    After step ``t`` the half-life is ``h = max(1, 0.05 t)`` steps: ``average += (weight - average) * (1 - 2**(-1 / h))``.

    Args:
        weights: The weights to average. They are read, never written; the average starts at their values.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = [weight.detach() for weight in weights]
        self.values = [weight.clone() for weight in self._weights]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights after one more step."""
        self.steps += 1
        half_life = max(1.0, SHARE * self.steps)
        torch._foreach_lerp_(self.values, self._weights, 1 - 2 ** (-1 / half_life))
