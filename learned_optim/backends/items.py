"""What a backend steps: one item a parameter, and whether two of them share memory."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

PLAIN_TENSORS = {Tensor, nn.Parameter}
"""Types whose memory may be taken by its address."""


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
    """

    param: Tensor
    grad: Tensor
    memory: dict[str, Tensor]
    step: Tensor
    scale: Tensor | None


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
