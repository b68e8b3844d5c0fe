"""The matrix stage over flat coordinates: which of an optimizee's tensors a rule shapes, and how a derivative goes back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from learned_optim.rules.orthogonal import matrix_shape
from meta_train.tasks.task import Optimizee
from meta_train.training.parts import Parts


class Matrices:
    """The tensors of an optimizee that a rule's matrix stage shapes.

    Args:
        rule: Its stage; all parts share one.
        optimizee: Its tensors.
    """

    def __init__(self, rule: Parts, optimizee: Optimizee) -> None:
        self.stage = rule.shared.matrix_stage
        self._places: dict[tuple[int, int], list[slice]] = defaultdict(list)
        start = 0
        for value in optimizee.params.values():
            shape = value.shape[1:]
            place = slice(start, start + shape.numel())
            if self.stage is not None and self.stage.applies_to(shape):
                self._places[matrix_shape(shape)].append(place)
            start = place.stop

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._places)

    def shape(self, updates: Tensor, momentum: Tensor | None) -> Tensor:
        """Return the updates of one step as they are applied.

        Args:
            updates: ``(..., D)``, as the LSTM made them.
            momentum: ``(..., D)``, the rule's raw momentum, or None.

        Returns:
            ``(..., D)``, differentiable by the updates.
        """
        assert self.stage is not None
        stage = self.stage
        return self._over_batches(lambda each: stage.shape(each[0], each[1]), updates, momentum)

    def pull_back(self, updates: Tensor, cotangents: Tensor, momentum: Tensor | None) -> Tensor:
        """Return derivatives by the updates, given those by the shaped ones.

        Args:
            updates: ``(..., D)``, as the LSTM made them.
            cotangents: ``(..., D)``.
            momentum: ``(..., D)`` or None.

        Returns:
            ``(..., D)``. Coordinates of no matrix keep their cotangents.
        """
        assert self.stage is not None
        stage = self.stage

        def back(each: list[Tensor | None]) -> Tensor:
            cotangent, update, momentum = each
            assert cotangent is not None
            assert update is not None
            return stage.pull_back(update, cotangent, momentum)

        return self._over_batches(back, cotangents, updates, momentum)

    def _over_batches(self, function: Callable[..., Tensor], *flat: Tensor | None) -> Tensor:
        """Apply a function to the matrices of each shape, ``(B, m, n)`` of every argument; leave the rest of the first."""
        base = flat[0]
        assert base is not None
        pieces: dict[int, tuple[slice, Tensor]] = {}
        for sides, places in self._places.items():
            batches = [
                None if each is None else torch.stack([each[..., place] for place in places]).reshape(-1, *sides)
                for each in flat
            ]
            results = function(batches).reshape(len(places), *base.shape[:-1], -1)
            pieces |= {place.start: (place, result) for place, result in zip(places, results.unbind(), strict=True)}
        parts, start = [], 0
        for at in sorted(pieces):
            place, result = pieces[at]
            parts += [base[..., start : place.start], result]
            start = place.stop
        return torch.cat((*parts, base[..., start:]), -1)
