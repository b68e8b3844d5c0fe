"""What a backend is given: one item for each parameter, and the options of the step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from learned_optim.rules import MatrixStage, UpdateRule


class PlannedGroup(NamedTuple):
    """A parameter group as a backend sees it that repeats whole steps.

    ``params`` are the group's parameters, those without a gradient too; ``rule`` steps them; ``options`` say how.
    """

    params: Sequence[Tensor]
    rule: UpdateRule
    options: StepOptions


PLAIN_TENSORS = {Tensor, nn.Parameter}
"""Types whose memory may be taken by its address."""


@dataclass(frozen=True)
class StepOptions:
    """How an update is applied: ``param = shrink * param + lr * update``.

    Args:
        lr: Factor on the update; a float or a 0-dim tensor.
        shrink: Factor on the parameter, of the same kind; 1 without weight decay.
        maximize: Whether to ascend instead of descend.
        matrix: Shapes the updates of items that are matrices; None where nothing does.
    """

    lr: Tensor | float
    shrink: Tensor | float = 1.0
    maximize: bool = False
    matrix: MatrixStage | None = None

    @classmethod
    def of(
        cls,
        lr: Tensor | float,
        weight_decay: float = 0.0,
        maximize: bool = False,
        matrix: MatrixStage | None = None,
    ) -> StepOptions:
        """Return the options of a parameter group.

        Args:
            lr: Factor on the update.
            weight_decay: Decoupled. It means what it means to AdamW at a rate of 1e-3, whatever ``lr`` is by default.
            maximize: Whether to ascend.
            matrix: Shapes the updates of matrices.

        Returns:
            The options.
        """
        return cls(lr, 1 - lr * 1e-3 * weight_decay, maximize, matrix)

    def as_tensors(self) -> tuple[Tensor, Tensor]:
        """Return ``lr`` and ``shrink`` as 0-dim tensors; floats become float64 on the CPU.

        A product with a constant, unlike ``torch.tensor``, lets ``torch.compile`` keep a float as an input of its graph.
        """
        one = torch.ones((), dtype=torch.float64, device="cpu")
        lr, shrink = (value if isinstance(value, Tensor) else one * value for value in (self.lr, self.shrink))
        return lr, shrink


@dataclass(frozen=True)
class StepItem:
    """One parameter and all that a step reads and writes of it.

    Args:
        param: Real, local tensor; written.
        grad: Same shape, any floating dtype; read only.
        memory: As :mod:`learned_optim.rules.storage` lays it out: moments of ``param``'s shape, ``hidden`` and ``cell`` with
            the memory width behind it; written.
        step: Inner steps including this one, 0-dim float32.
        scale: The rule's ``tensor_scale`` of the whole parameter, 0-dim, or None.
        matrix: The whole parameter, a DTensor where it is sharded, if its update is shaped as a matrix; else None.
    """

    param: Tensor
    grad: Tensor
    memory: dict[str, Tensor]
    step: Tensor
    scale: Tensor | None
    matrix: Tensor | None = None


def overlap(params: Sequence[Tensor]) -> bool:
    """Return whether any two plain tensors lie in the same memory, as after ``a.data = b.data``.

    Args:
        params: Of one device.

    Returns:
        True for interleaved ones too, which do no harm.
    """
    spans = sorted(map(_span, (param for param in params if type(param) in PLAIN_TENSORS and param.numel())))
    return any(end > start for (_, end), (start, _) in itertools.pairwise(spans))


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
