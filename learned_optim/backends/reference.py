"""The readable backend: eager PyTorch, in chunks of bounded size.

Coordinates of small tensors are packed together and large tensors are cut, so that time is paid per coordinate and scratch
memory does not grow with the model. This file knows nothing of parameter groups or of where state is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learned_optim.rules import UpdateRule

CHUNK = 65_536
"""Coordinates processed at once."""


@dataclass(frozen=True)
class StepItem:
    """One parameter and all that a step reads and writes of it.

    Args:
        param: Real, local tensor; written.
        grad: Same shape, any floating dtype; read only.
        memory: Moments of ``param``'s shape, ``hidden`` and ``cell`` with the memory width behind it; written.
        step: Inner steps including this one, 0-dim float32.
        scale: The rule's ``tensor_scale`` of the whole parameter, 0-dim, or None.
    """

    param: Tensor
    grad: Tensor
    memory: dict[str, Tensor]
    step: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class _Slice:
    item: StepItem
    flat_param: Tensor
    start: int
    stop: int

    def of(self, tensor: Tensor, trailing: int = 0) -> Tensor:
        """View the slice's coordinates of a contiguous ``tensor`` whose last ``trailing`` dimensions belong to each."""
        return tensor.view(-1, *tensor.shape[tensor.dim() - trailing :])[self.start : self.stop]


def apply_reference(
    rule: UpdateRule, items: Sequence[StepItem], *, lr: Tensor | float, weight_decay: float, maximize: bool
) -> None:
    """Apply one inner step in place.

    Args:
        rule: In the dtype to compute with, on the items' device.
        items: Parameters that share the rule, device and compute dtype.
        lr: Factor on the update.
        weight_decay: Decoupled; parameters shrink by ``1e-3 * lr * weight_decay``.
        maximize: Ascend instead of descend.
    """
    # A strided parameter has no flat view: work on a copy and write it back.
    flat = [item.param.view(-1) if item.param.is_contiguous() else item.param.reshape(-1) for item in items]
    for chunk in _pack(items, flat):
        _apply_chunk(rule, chunk, lr, weight_decay, maximize)
    for item, values in zip(items, flat, strict=True):
        if not item.param.is_contiguous():
            item.param.copy_(values.view(item.param.shape))


def _pack(items: Sequence[StepItem], flat: Sequence[Tensor]) -> Iterator[list[_Slice]]:
    chunk: list[_Slice] = []
    room = CHUNK
    for item, values in zip(items, flat, strict=True):
        start, total = 0, values.numel()
        while start < total:
            stop = min(total, start + room)
            chunk.append(_Slice(item, values, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield chunk
                chunk, room = [], CHUNK
    if chunk:
        yield chunk


def _apply_chunk(
    rule: UpdateRule, chunk: list[_Slice], lr: Tensor | float, weight_decay: float, maximize: bool
) -> None:
    dtype = rule.readout.weight.dtype
    sizes = [piece.stop - piece.start for piece in chunk]
    grad = _join([piece.of(piece.item.grad.reshape(-1)) for piece in chunk]).to(dtype)
    memory = {
        name: _join([piece.of(piece.item.memory[name], trailing) for piece in chunk]).to(dtype)
        for name, trailing in _memory_layout(rule)
    }
    step = _spread([piece.item.step.to(grad.device) for piece in chunk], sizes)
    scales = [piece.item.scale for piece in chunk]
    scale = None if scales[0] is None else _spread([s for s in scales if s is not None], sizes)

    update, new_memory, _ = rule(-grad if maximize else grad, memory, step, scale)

    for name, trailing in _memory_layout(rule):
        for piece, values in zip(chunk, new_memory[name].split(sizes), strict=True):
            piece.of(piece.item.memory[name], trailing).copy_(values)
    for piece, values in zip(chunk, update.split(sizes), strict=True):
        param = piece.flat_param[piece.start : piece.stop]
        decayed = param.to(dtype)
        if weight_decay != 0:
            decayed = decayed * (1 - lr * 1e-3 * weight_decay)
        param.copy_(decayed + lr * values)


def _memory_layout(rule: UpdateRule) -> list[tuple[str, int]]:
    return [*((name, 0) for name in rule.moment_names), ("hidden", 1), ("cell", 1)]


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _spread(values: list[Tensor], sizes: list[int]) -> Tensor:
    """Give every coordinate its tensor's value; one tensor's value stays 0-dim."""
    if len(values) == 1:
        return values[0]
    return torch.cat([value.expand(size) for value, size in zip(values, sizes, strict=True)])
