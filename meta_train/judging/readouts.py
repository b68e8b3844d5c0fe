"""Results that a run would ship: losses of a case at its last and at its averaged weights, in evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from meta_train.judging.averages import AveragedWeights
from meta_train.tasks import derive_seed
from meta_train.tasks.case import Batch, Case

MINIBATCHES = 64
"""Fresh minibatches whose mean loss is the training loss at given weights."""


class Readout:
    """Measure a case while an optimizer trains it.

    Both training losses are means over the same :data:`MINIBATCHES` minibatches, which no step of the run has drawn. The
    module is in evaluation mode. Batch norm takes the running statistics of the run at the last weights, and statistics
    computed anew on those minibatches at the averaged weights.

    Args:
        case: The case that is trained.
        seed: Seed of the run; it decides the minibatches.
    """

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.seed = case, seed
        self.average = AveragedWeights(case.module.parameters())

    def after_step(self) -> None:
        """Move the average towards the weights."""
        self.average.update()

    def start(self) -> float:
        """Return the training loss at the initial weights."""
        return self._training_loss(_evaluating(self.case.module))

    def look(self, optimizer: Optimizer) -> dict[str, float]:
        """Measure the losses at the current weights.

        Args:
            optimizer: The optimizer of the case. A schedule-free one evaluates at other weights than it trains.

        Returns:
            ``final_loss`` and ``averaged_loss``, and with held-out examples also ``held_out`` and
            ``averaged_held_out``.
        """
        to_evaluation = getattr(optimizer, "eval", None)
        if to_evaluation:
            to_evaluation()
        last = _evaluating(self.case.module)
        if to_evaluation:
            optimizer.train()  # type: ignore[attr-defined]
        measured = self._losses(last, "final_loss", "held_out")
        return measured | self._losses(self._averaged(), "averaged_loss", "averaged_held_out")

    def _averaged(self) -> nn.Module:
        module = copy.deepcopy(self.case.module)
        with torch.no_grad():
            for param, value in zip(module.parameters(), self.average.values, strict=True):
                param.copy_(value)
        update_bn(self._fresh(), module)
        return module.eval()

    def _losses(self, module: nn.Module, training: str, held_out: str) -> dict[str, float]:
        losses = {training: self._training_loss(module)}
        if self.case.held_out:
            losses[held_out] = self._mean(module, iter(self.case.held_out))
        return losses

    def _training_loss(self, module: nn.Module) -> float:
        return self._mean(module, self._fresh())

    def _fresh(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "fresh minibatches"))
        return (self.case.next_batch(generator) for _ in range(MINIBATCHES))

    @torch.no_grad()
    def _mean(self, module: nn.Module, batches: Iterator[Batch]) -> float:
        losses = [float(self.case.loss(module, batch)) for batch in batches]
        return sum(losses) / len(losses)


def _evaluating(module: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, so that measuring leaves no trace in the trained module."""
    return copy.deepcopy(module).eval()
