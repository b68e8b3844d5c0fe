"""Hand-designed optimizers, and the settings to try for each, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.optim.optimizer import ParamsT

from meta_train.judging.opponents import MuonAndAdamW, nominal, nominal_rule

MakeOptimizer = Callable[[ParamsT], Optimizer]
"""From parameters, or named parameters, to an optimizer."""

MakeSchedule = Callable[[Optimizer, int], LRScheduler]
"""From optimizer and horizon to a schedule of the rate."""

COSINE = "+cosine"
"""End of the name of a baseline whose rate decays over the horizon."""
NOMINAL = "Nominal"
"""Our own rule without its LSTM."""


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

    def make(self, params: ParamsT) -> Optimizer:
        """Build the torch optimizer.

        Args:
            params: The parameters to optimize.

        Returns:
            The optimizer.
        """
        options = {"momentum": self.momentum, "nesterov": True} if self.momentum else {}
        return _CLASSES[self.optimizer](params, lr=self.lr, **options)

    @property
    def schedule(self) -> MakeSchedule | None:
        """From optimizer and horizon to a schedule; None for a constant rate, which needs no horizon."""
        return CosineAnnealingLR if self.optimizer.endswith(COSINE) else None

    @property
    def identity(self) -> str:
        """Everything that decides the runs of this setting."""
        rule = f" {nominal_rule().fingerprint}" if self.optimizer == NOMINAL else ""
        return f"{self.optimizer} {self}{rule}"

    @property
    def label(self) -> str:
        """Name in tables, where the setting is not tuned."""
        return f"{self.optimizer}({self.lr:g})"

    @property
    def text(self) -> str:
        """Hyperparameters, for tables."""
        return str(self)

    def __str__(self) -> str:
        """Name the hyperparameters, for tables."""
        return f"lr={self.lr:g}" + (f" momentum={self.momentum:g}" if self.momentum else "")


def _missing(optimizer: str, error: ImportError) -> ValueError:
    return ValueError(f"the baseline {optimizer} needs {error.name}: pip install -e '.[judge]' in the clone")


def _prodigy(params: ParamsT, lr: float) -> Optimizer:
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise _missing("Prodigy", error) from error
    return Prodigy(params, lr=lr)


def _schedule_free(params: ParamsT, lr: float) -> Optimizer:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise _missing("ScheduleFree", error) from error
    optimizer = AdamWScheduleFree(params, lr=lr)
    optimizer.train()
    return optimizer


def _lbfgs(params: ParamsT, lr: float) -> Optimizer:
    return LBFGS(params, lr=lr, max_iter=1, max_eval=25, history_size=20, line_search_fn="strong_wolfe")


_CLASSES: dict[str, Callable[..., Optimizer]] = {
    "SGD": SGD,
    "NAG": SGD,
    "RMSprop": RMSprop,
    "Adam": Adam,
    "AdamW+cosine": AdamW,
    "Muon": MuonAndAdamW,
    "Muon+cosine": MuonAndAdamW,
    NOMINAL: nominal,
    "Prodigy": _prodigy,
    "ScheduleFree": _schedule_free,
    "L-BFGS": _lbfgs,
}
MOMENTA = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Nesterov momenta to try with every rate."""

HIGH_MOMENTA = (0.97, 0.98, 0.99)
"""Further momenta where the loss has no noise: there 0.98 is best for 200 steps."""


def rates(lowest: float, highest: float, per_decade: int = 2) -> list[float]:
    """Return a logarithmic grid, both ends included.

    Args:
        lowest: First rate.
        highest: Last rate.
        per_decade: Rates in a factor of ten.

    Returns:
        The rates, rounded to three significant digits.
    """
    count = round(math.log10(highest / lowest) * per_decade) + 1
    return [float(f"{lowest * 10 ** (i / per_decade):.3g}") for i in range(count)]


def settings(optimizer: str, grid: Iterable[float], momenta: Sequence[float] = MOMENTA) -> list[Setting]:
    """Return every setting to try for a baseline.

    Args:
        optimizer: ``"SGD"``, ``"NAG"`` (Nesterov momentum), ``"RMSprop"``, ``"Adam"`` or ``"AdamW+cosine"``.
        grid: Rates.
        momenta: Momenta of NAG.

    Returns:
        One setting for each rate, and for NAG each momentum.

    Raises:
        ValueError: If the optimizer is unknown.
    """
    if optimizer not in _CLASSES:
        raise ValueError(f"unknown baseline {optimizer!r}; choose one of {', '.join(_CLASSES)}")
    return [Setting(optimizer, lr, momentum) for momentum in (momenta if optimizer == "NAG" else (0.0,)) for lr in grid]


QUADRATIC = [
    *settings("SGD", rates(0.562, 5.62, 8)),
    *settings("NAG", rates(0.316, 3.16, 8), (*MOMENTA, *HIGH_MOMENTA)),
    *settings("NAG", (1.4, 1.47, 1.54, 1.6), (0.9, 0.95, 0.97, 0.98)),
    *settings("RMSprop", rates(5.62e-3, 0.178, 8)),
    *settings("Adam", rates(0.0562, 1.78, 8)),
]
"""The sweep for quadratic problems whose loss is a mean over many functions: gradients are small, rates are large.

Eight rates a decade, and more for NAG where it is best, just below the rate at which it diverges.
"""

QUARTIC = [
    *settings("SGD", rates(1e-3, 1.0, 4)),
    *settings("NAG", rates(1e-3, 0.1, 4), (*MOMENTA, *HIGH_MOMENTA, 0.995, 0.998)),
    *settings("RMSprop", rates(3.16e-3, 3.16, 4)),
    *settings("Adam", rates(3.16e-2, 31.6, 4)),
]
"""The sweep for the quartic toy."""

CLASSIFICATION = [
    *settings("SGD", rates(3.16e-3, 31.6)),
    *settings("NAG", rates(1e-4, 3.16), (*MOMENTA, *HIGH_MOMENTA)),
    *settings("RMSprop", rates(1e-5, 1.0)),
    *settings("Adam", rates(1e-4, 1.0)),
    *settings("AdamW+cosine", rates(1e-4, 1.0)),
]
"""The sweep for small classifiers, in half-decades; the cosine decays to zero at the horizon."""

ANY = [
    *settings("SGD", rates(1e-3, 10.0)),
    *settings("NAG", rates(1e-3, 1.0), (0.9, 0.98)),
    *settings("RMSprop", rates(1e-4, 0.1)),
    *settings("Adam", rates(1e-4, 1.0)),
    *settings("AdamW+cosine", rates(1e-4, 1.0)),
]
"""The first sweep for a new task, in half-decades; a grid grows where the best rate is at its edge."""

MNIST = [
    *settings("SGD", rates(1e-3, 100.0)),
    *settings("NAG", rates(0.0316, 10.0), (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)),
    *settings("RMSprop", rates(3.16e-4, 0.316)),
    *settings("Adam", rates(1e-3, 1.0)),
]
"""The sweep for small dense nets on MNIST, in half-decades."""

CIFAR = [
    *settings("SGD", rates(0.0316, 3.16)),
    *settings("NAG", (3.16e-3, *rates(0.01, 1.0)), (0.9, 0.95, 0.98)),
    *settings("RMSprop", rates(1e-4, 0.1)),
    *settings("Adam", rates(1e-3, 0.1)),
]
"""The sweep for small convolutional nets on CIFAR-10, in half-decades."""

CIFAR_TWO = [
    *settings("SGD", rates(3.16e-3, 0.01)),
    *settings("NAG", (1e-3,), (0.9, 0.95, 0.98)),
    *settings("Adam", rates(1e-4, 3.16e-4)),
    *CIFAR,
]
"""The sweep for two classes of CIFAR-10, where some baselines need smaller rates at step 100."""

PICTURES = [
    *settings("SGD", rates(3.16e-3, 0.1)),
    *settings("NAG", (*rates(3.16e-3, 0.1), 0.0178, 0.0562), (0.9, 0.95, 0.98, 0.99)),
    *settings("RMSprop", rates(1e-3, 3.16e-2)),
    *settings("Adam", rates(1e-2, 0.316)),
]
"""The sweep for neural art, in half-decades, finer for NAG below the rate at which it diverges.

It serves every resolution, since the gradient of a pixel does not depend on it.
"""

LBFGS_STEPS = [Setting("L-BFGS", 1.0)]
"""One iteration and line search (strong Wolfe) in each step, for losses without noise; it evaluates several losses."""

FIXED = [Setting("SGD", 0.001), Setting("RMSprop", 0.01), Setting("Adam", 0.1)]
"""The untuned rates that a small PyTorch re-implementation of the paper compares with."""

UNTUNED = [Setting("Adam", 1e-3)]
"""The usual first choice: the row that an optimizer without a rate must beat first."""
