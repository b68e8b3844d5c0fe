"""Hand-designed optimizers and the settings each is tried with, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


@dataclass(frozen=True)
class Setting:
    """One optimizer with all of its hyperparameters.

    Args:
        optimizer: The baseline it belongs to.
        lr: Rate.
        momentum: Nesterov momentum; only NAG has one.
    """

    optimizer: str
    lr: float
    momentum: float = 0.0

    def make(self, params: Iterable[Tensor]) -> Optimizer:
        """Build the torch optimizer.

        Args:
            params: What it will optimize.

        Returns:
            The optimizer.
        """
        options = {"momentum": self.momentum, "nesterov": True} if self.momentum else {}
        return _CLASSES[self.optimizer](params, lr=self.lr, **options)

    def __str__(self) -> str:
        """Name the hyperparameters, for tables."""
        return f"lr={self.lr:g}" + (f" momentum={self.momentum:g}" if self.momentum else "")


_CLASSES: dict[str, Callable[..., Optimizer]] = {"SGD": SGD, "NAG": SGD, "RMSprop": RMSprop, "Adam": Adam}
MOMENTA = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Nesterov momenta; each is tried with every rate."""


def rates(lowest: float, highest: float, per_decade: int = 2) -> list[float]:
    """Return a logarithmic grid, both ends included.

    Args:
        lowest: First rate.
        highest: Last rate.
        per_decade: Rates in a factor of ten.

    Returns:
        The rates, rounded to three significant digits.
    """
    decades = torch.log10(torch.tensor(highest / lowest)).item()
    count = round(decades * per_decade) + 1
    return [float(f"{lowest * 10 ** (i / per_decade):.3g}") for i in range(count)]


def settings(optimizer: str, grid: Iterable[float]) -> list[Setting]:
    """Return every setting a baseline is tried with.

    Args:
        optimizer: ``"SGD"``, ``"NAG"`` (Nesterov momentum), ``"RMSprop"`` or ``"Adam"``.
        grid: Rates.

    Returns:
        One setting for each rate, and for NAG each momentum.

    Raises:
        ValueError: If the optimizer is unknown.
    """
    if optimizer not in _CLASSES:
        raise ValueError(f"unknown baseline {optimizer!r}; choose one of {', '.join(_CLASSES)}")
    momenta = MOMENTA if optimizer == "NAG" else (0.0,)
    return [Setting(optimizer, lr, momentum) for momentum in momenta for lr in grid]


QUADRATIC = [
    *settings("SGD", rates(0.1, 31.6, 4)),
    *settings("NAG", rates(0.1, 10.0, 4)),
    *settings("RMSprop", rates(1e-3, 1.0, 4)),
    *settings("Adam", rates(1e-2, 3.16, 4)),
]
"""The sweep for quadratic problems whose loss is a mean over many functions: gradients are small, rates are large."""

FIXED = [Setting("SGD", 0.001), Setting("RMSprop", 0.01), Setting("Adam", 0.1)]
"""The untuned rates that a small PyTorch re-implementation of the paper compares with."""


def best_setting(scores: dict[str, float], group: list[Setting]) -> Setting:
    """Choose the setting with the lowest score; an optimum at the edge of the rates is an error.

    Args:
        scores: Score of each setting, by its text; NaN or Inf where it diverged.
        group: The settings of one baseline.

    Returns:
        The best setting.

    Raises:
        ValueError: If every setting diverged, or the best rate is the lowest or highest that was tried.
    """
    finite = [setting for setting in group if torch.tensor(scores[str(setting)]).isfinite()]
    if not finite:
        raise ValueError(f"every setting of {group[0].optimizer} diverged; extend its grid to lower rates")
    best = min(finite, key=lambda setting: scores[str(setting)])
    grid = sorted({setting.lr for setting in group})
    if best.lr in (grid[0], grid[-1]):
        raise ValueError(f"the best rate of {best.optimizer} is {best.lr}, at the edge of its grid; extend the grid")
    return best
