"""The cases that rules are judged on: an ordinary module, its loss, its minibatches and its held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.tasks.task import derive_seed

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Case:
    """One training run waiting for an optimizer.

    Args:
        module: Freshly initialised.
        loss: Maps module and minibatch to a 0-dim loss.
        next_batch: Draws a minibatch from a generator.
        held_out: Examples that are never trained on; empty where there are none.
    """

    module: nn.Module
    loss: Loss
    next_batch: Callable[[torch.Generator], Batch]
    held_out: Sequence[Batch] = ()


@dataclass(frozen=True)
class JudgingTask:
    """A kind of case.

    Args:
        name: Name in tables.
        about: What is trained on what, in one line.
        make: Maps the seed of the data to a case; initial weights come from torch's global generator. Call :meth:`case`.
        horizons: Inner steps after which the losses are measured.
        data: Fingerprint of the data, where the seed does not make them.
        decay: Schedule that is attached to learned rules here: ``"cosine"``, ``"linear"`` or none.
        without: Baselines that are not worth running on it.
    """

    name: str
    about: str
    make: Callable[[int], Case]
    horizons: tuple[int, ...] = (200, 1000, 5000)
    data: str = ""
    decay: str = ""
    without: tuple[str, ...] = ()

    def decayed(self, decay: str) -> JudgingTask:
        """Return the task with a schedule on learned rules; all other contestants share the runs of this task."""
        return replace(self, name=f"{self.name}, {decay}", decay=decay)

    def case(self, seed: int) -> Case:
        """Make the case of a seed: its initial weights and its data come from streams of their own.

        Args:
            seed: Decides both.

        Returns:
            The case.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "initial weights"))
            return self.make(derive_seed(seed, "data"))


def classification_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross entropy, for one label or many labels in each example."""
    logits = module(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def regression_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error."""
    return F.mse_loss(module(batch[0]), batch[1])
