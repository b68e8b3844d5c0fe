"""Arenas: the tasks that judge optimizers, and the baselines that are tuned on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from meta_train.judging.baselines import (
    CIFAR,
    CIFAR_TWO,
    CLASSIFICATION,
    FIXED,
    LBFGS_STEPS,
    MNIST,
    PICTURES,
    QUADRATIC,
    QUARTIC,
    UNTUNED,
    Setting,
)
from meta_train.tasks import Cifar, Mixture, Mnist, NeuralArt, Quadratic, Quartic, Task, with_data

HORIZONS = (100, 200)
CRITERIA = ("sum", "final")


@dataclass(frozen=True)
class Arena:
    """A task that judges optimizers, with its baselines and horizons.

    Args:
        task: Where optimizees come from.
        sweep: Every setting of every baseline.
        untuned: Settings that are reported without tuning.
        tuning: Optimizees to tune baselines on.
        fresh: Optimizees to report on.
        last: Losses averaged into the final one; 1 where the loss has no noise.
        horizons: Inner steps to report at; curves show baselines as tuned for the first.
        tuning_task: Where the optimizees to tune on come from; the default is the same task.
        criteria: Criteria to report, out of :data:`CRITERIA`.
        grids_grow: Whether a best rate at the edge of its grid extends the grid; it is an error otherwise.
    """

    task: Task
    sweep: Sequence[Setting]
    untuned: Sequence[Setting] = ()
    tuning: int = 10
    fresh: int = 20
    last: int = 1
    horizons: Sequence[int] = HORIZONS
    tuning_task: Task | None = None
    criteria: Sequence[str] = CRITERIA
    grids_grow: bool = False

    def on(self, data: Path | None) -> Arena:
        """Return the arena with the real data of a directory, where its tasks need any."""
        tuning_task = with_data(self.tuning_task, data) if self.tuning_task else None
        return replace(self, task=with_data(self.task, data), tuning_task=tuning_task)


def _neural_art(**changes: Any) -> Arena:
    """Judge pictures of new contents; baselines are tuned on other contents, but the same style and resolution."""
    task = NeuralArt(split="test", **changes)
    tuning_task = NeuralArt(split="tuning", **changes)
    return Arena(task, PICTURES, LBFGS_STEPS, tuning=5, horizons=(128,), tuning_task=tuning_task)


def _mnist(*hidden: int, activation: Literal["sigmoid", "relu"] = "sigmoid") -> Arena:
    """Judge on the half of MNIST that no rule was meta-trained on."""
    return Arena(Mnist(hidden, activation, half="second"), MNIST, UNTUNED, tuning=5, last=10)


ANIMALS = (2, 3, 4, 5, 7)
"""Classes of CIFAR-5, and the first two of CIFAR-2; the others can be meta-trained on alone."""


def _cifar(*labels: int, sweep: Sequence[Setting] = CIFAR) -> Arena:
    """Judge on the half of CIFAR-10 that no rule was meta-trained on, with some or all classes; a run takes minutes."""
    task = Cifar("second", labels or tuple(range(10)))
    return Arena(task, sweep, tuning=1, last=20, horizons=(1000, 100), criteria=("final",))


ARENAS = {
    "quadratic": Arena(Quadratic(), QUADRATIC, FIXED),
    "quartic": Arena(Quartic(functions=1), QUARTIC, UNTUNED, tuning=20, fresh=50),
    "digits": Arena(Mixture(problems=1, kinds=("digit-mlp",)), CLASSIFICATION, UNTUNED, last=10),
    "mnist": _mnist(20),
    "mnist-relu": _mnist(20, activation="relu"),
    **{f"mnist-{size}x{depth}": _mnist(*[size] * depth) for size in (5, 10, 20, 40, 80) for depth in (1, 2)},
    "cifar": _cifar(),
    "cifar-5": _cifar(*ANIMALS),
    "cifar-2": _cifar(*ANIMALS[:2], sweep=CIFAR_TWO),
    "neural-art": _neural_art(),
    "neural-art-style": _neural_art(style="the_scream"),
    "neural-art-double": _neural_art(size=128),
}
"""Arenas by name: the paper's quadratics, the quartic toy, small dense classifiers of 8x8 digits, MNIST with nets of many
sizes, CIFAR-10 and five and two of its classes, and neural art with new contents, with a new style too, and at double
resolution."""
