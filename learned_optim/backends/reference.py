"""One inner step over many parameters, in chunks of bounded size.

Coordinates of small tensors are packed together and large tensors are cut, so that time is paid per coordinate and
scratch memory does not grow with the model. This file knows nothing of parameter groups or of where state is kept.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learned_optim.backends.items import StepItem, StepOptions
from learned_optim.rules import Memory, UpdateRule
from learned_optim.rules.rule import Advance
from learned_optim.rules.storage import decode, encode, noise

CHUNK = 65_536
"""Coordinates processed at once."""


@dataclass(frozen=True)
class _Slice:
    """Coordinates ``start`` to ``stop`` of an item, whose parameter and gradient were flattened in logical order."""

    item: StepItem
    flat_param: Tensor
    flat_grad: Tensor
    start: int
    stop: int

    @property
    def param(self) -> Tensor:
        return self.flat_param[self.start : self.stop]

    @property
    def grad(self) -> Tensor:
        return self.flat_grad[self.start : self.stop]

    def memory(self, name: str) -> Tensor:
        """View the memory of these coordinates, ``(N,)`` or ``(N, width)``."""
        values = self.item.memory[name]
        return values.view(-1, *values.shape[self.item.param.dim() :])[self.start : self.stop]

    def write_back(self) -> None:
        """Copy a parameter that has no flat view back, once its last coordinates are done."""
        if not self.item.param.is_contiguous() and self.stop == self.flat_param.numel():
            self.item.param.copy_(self.flat_param.view(self.item.param.shape))


def apply_step(
    rule: UpdateRule,
    items: Sequence[StepItem],
    options: StepOptions,
    *,
    run: Callable[..., None] | None = None,
    sizes: Sequence[int] = (),
) -> None:
    """Apply one inner step in place.

    Args:
        rule: In the dtype to compute with, on the items' device.
        items: Parameters that share the rule, device and compute dtype.
        options: How updates are applied.
        run: A faster equivalent of :func:`step_chunk`.
        sizes: Coordinates that a chunk may have, the most first; :data:`CHUNK` by default.
    """
    alike: dict[Any, list[StepItem]] = defaultdict(list)
    for item in items:
        alike[tuple((name, values.dtype) for name, values in item.memory.items())].append(item)
    for chunk in (chunk for group in alike.values() for chunk in _pack(group, sizes or (CHUNK,))):
        _apply_chunk(rule, chunk, options, run or step_chunk)
        for piece in chunk:
            piece.write_back()


def _pack(items: Sequence[StepItem], sizes: Sequence[int]) -> Iterator[list[_Slice]]:
    """Cut the items, in order, into chunks of the largest size that can be filled; the last may be smaller than all."""
    chunk: list[_Slice] = []
    left = sum(item.param.numel() for item in items)
    room = _largest(sizes, left)
    for item in items:
        # `reshape` copies a strided tensor: once for the item, not once for each of its chunks.
        flat_param, flat_grad = item.param.detach().reshape(-1), item.grad.reshape(-1)
        start, total = 0, item.param.numel()
        while start < total:
            stop = min(total, start + room)
            chunk.append(_Slice(item, flat_param, flat_grad, start, stop))
            room -= stop - start
            left -= stop - start
            start = stop
            if room == 0:
                yield chunk
                chunk, room = [], _largest(sizes, left)
    if chunk:
        yield chunk


def _largest(sizes: Sequence[int], left: int) -> int:
    return next((size for size in sizes if size <= left), sizes[-1])


def step_chunk(
    rule: UpdateRule,
    param: Tensor,
    grad: Tensor,
    stored: Memory,
    step: Tensor,
    scale: Tensor | None,
    options: StepOptions,
    advance: Advance | None = None,
) -> None:
    """Take one inner step of a chunk, in place.

    Args:
        rule: In the dtype to compute with.
        param: ``(N,)``, in that dtype; written.
        grad: ``(N,)``, in that dtype.
        stored: Memory as it is kept, each ``(N, ...)``; written.
        step: Inner steps including this one, 0-dim or ``(N,)``.
        scale: Of each coordinate's tensor, 0-dim or ``(N,)``, or None.
        options: How the update is applied.
        advance: A faster equivalent of the rule's own.
    """
    memory = decode(rule, stored, param.dtype)
    update, new_memory, encoded = rule(-grad if options.maximize else grad, memory, step, scale, advance)
    new_stored = encode(rule, new_memory, stored, encoded.active, noise(grad, step))
    param.copy_(param * options.shrink + options.lr * update)
    for name, values in new_stored.items():
        stored[name].copy_(values)


def _apply_chunk(
    rule: UpdateRule,
    chunk: list[_Slice],
    options: StepOptions,
    run: Callable[..., None],
) -> None:
    dtype = rule.readout.weight.dtype
    sizes = [piece.stop - piece.start for piece in chunk]
    param = _join([piece.param.to(dtype) for piece in chunk])
    grad = _join([piece.grad.to(dtype) for piece in chunk])
    stored = {name: _join([piece.memory(name) for piece in chunk]) for name in chunk[0].item.memory}
    step = _spread([piece.item.step.to(grad.device, dtype) for piece in chunk], sizes)
    scales = [piece.item.scale for piece in chunk if piece.item.scale is not None]
    scale = _spread(scales, sizes) if scales else None

    run(rule, param, grad, stored, step, scale, options)

    # Part of one tensor was written where it lies; what was joined or cast is a copy.
    if len(chunk) > 1:
        for name, values in stored.items():
            for piece, new in zip(chunk, values.split(sizes), strict=True):
                piece.memory(name).copy_(new)
    if len(chunk) > 1 or chunk[0].param.dtype != dtype:
        for piece, new in zip(chunk, param.split(sizes), strict=True):
            piece.param.copy_(new)


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _spread(values: list[Tensor], sizes: list[int]) -> Tensor:
    """Give every coordinate its tensor's value; one tensor's value stays 0-dim."""
    if len(values) == 1:
        return values[0]
    return torch.cat([value.expand(size) for value, size in zip(values, sizes, strict=True)])
