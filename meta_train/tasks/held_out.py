"""Kinds of models that the mixture does not hold, as a task: what default rules are validated on, never trained on."""

from __future__ import annotations

import random

import msgspec
import torch

from meta_train.judging.held_out_kinds import HELD_OUT_KINDS
from meta_train.tasks.task import Optimizee, module_optimizee


class HeldOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="held-out"):
    """A random kind out of :data:`~meta_train.judging.held_out_kinds.HELD_OUT_KINDS`, one problem of it."""

    def sample(self, seed: int) -> Optimizee:
        """Return one problem.

        Args:
            seed: Decides the kind, the initialisation, the data and the minibatches.

        Returns:
            The optimizee.
        """
        kind = HELD_OUT_KINDS[random.Random(seed).randrange(len(HELD_OUT_KINDS))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            case = kind.make(seed)
        return module_optimizee(
            lambda: case.module,
            lambda module, batch: case.loss(module, (batch[0], batch[1])),
            lambda generator: tuple(value.unsqueeze(0) for value in case.next_batch(generator)),
            seed,
        )
