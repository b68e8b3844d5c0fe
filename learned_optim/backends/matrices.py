"""The step of matrices: a backend hands out their updates, the matrix stage shapes them, and then they are applied.

A backend hands out an update by stepping zeros in the parameter's place with a rate of 1, so every backend can. Equal shapes
are shaped together, in batches of bounded memory, so many little matrices cost few calls. A sharded parameter is gathered
for its batch and for no longer; the stage keeps no state, so nothing else about sharding changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from learned_optim.backends.items import StepItem, StepOptions
from learned_optim.rules import MatrixStage, UpdateRule
from learned_optim.rules.orthogonal import SCRATCH_BYTES, buckets, matrix_shape, scratch_entries

Step = Callable[[UpdateRule, Sequence[StepItem], StepOptions], None]
"""What steps items coordinate by coordinate: the ``apply_step`` of a backend."""


class Kernel(Protocol):
    """What shapes and applies updates faster, with the numbers of the matrix stage; a backend's ``matrix`` module."""

    def takes_sides(self, rows: int, columns: int) -> bool:
        """Return whether it shapes matrices of these sides."""
        ...

    def takes_params(self, params: Sequence[Tensor]) -> bool:
        """Return whether it can apply updates to all of these parameters."""
        ...

    def shape(self, updates: Tensor, momentum: Tensor | None, stage: MatrixStage) -> Tensor:
        """Return shaped updates, ``(B, m, n)``."""
        ...

    def apply(self, params: Sequence[Tensor], updates: Tensor, options: StepOptions) -> None:
        """Apply shaped updates."""
        ...


def split(items: Iterable[StepItem], options: StepOptions) -> tuple[list[StepItem], list[StepItem]]:
    """Return the items that are stepped coordinate by coordinate, and those whose updates are shaped."""
    plain: list[StepItem] = []
    shaped: list[StepItem] = []
    for item in items:
        (plain if options.matrix is None or item.matrix is None else shaped).append(item)
    return plain, shaped


def step_matrices(
    step: Step, rule: UpdateRule, items: Sequence[StepItem], options: StepOptions, kernel: Kernel | None = None
) -> None:
    """Apply one inner step to matrices, in place.

    Args:
        step: Hands out the updates.
        rule: As the backend wants it.
        items: With ``matrix`` set.
        options: With ``matrix`` set.
        kernel: Shapes and applies what it takes; PyTorch does the rest.
    """
    dtype = rule.readout.weight.dtype
    for batches in loads(items, dtype.itemsize):
        updates = [
            torch.zeros(len(batch), *matrix_shape(batch[0].param.shape), dtype=dtype, device=batch[0].param.device)
            for batch in batches
        ]
        handed = [
            StepItem(update.view(item.param.shape), item.grad, item.memory, item.step, item.scale)
            for batch, batched in zip(batches, updates, strict=True)
            for item, update in zip(batch, batched.unbind(), strict=True)
        ]
        step(rule, handed, StepOptions(1.0, 1.0, options.maximize))
        for batch, batched in zip(batches, updates, strict=True):
            apply_updates(
                [item.param for item in batch], shaped_updates(rule, batch, batched, options, kernel), options, kernel
            )


def shaped_updates(
    rule: UpdateRule, items: Sequence[StepItem], updates: Tensor, options: StepOptions, kernel: Kernel | None = None
) -> Tensor:
    """Return the updates of a batch, shaped.

    Args:
        rule: Says which momentum the stage may follow.
        items: One batch: equal shapes, and sharded alike.
        updates: ``(B, m, n)``; of a sharded parameter this rank's part of the rows or columns.
        options: With ``matrix`` set.
        kernel: Shapes what it takes.

    Returns:
        In the same shape.
    """
    assert options.matrix is not None
    momentum = None
    if options.matrix.momentum and rule.momentum_names:
        together = {name: torch.stack([item.memory[name] for item in items]) for name in rule.momentum_names}
        momentum = rule.raw_momentum({name: values.to(updates.dtype) for name, values in together.items()})
        momentum = None if momentum is None else momentum.view(updates.shape)
    whole = items[0].matrix
    if not hasattr(whole, "placements"):
        return _shaped(updates, momentum, options.matrix, kernel)
    gathered = [None if each is None else _gathered(items, each) for each in (updates, momentum)]
    assert gathered[0] is not None
    return _own_parts(items, _shaped(gathered[0], gathered[1], options.matrix, kernel), updates)


def _shaped(updates: Tensor, momentum: Tensor | None, stage: MatrixStage, kernel: Kernel | None) -> Tensor:
    if kernel is None or not kernel.takes_sides(*updates.shape[1:]):
        return stage.shape(updates, momentum)
    return kernel.shape(updates, momentum if stage.momentum else None, stage)


def apply_updates(params: Sequence[Tensor], updates: Tensor, options: StepOptions, kernel: Kernel | None = None) -> None:
    """Apply shaped updates: ``param = shrink * param + lr * update``.

    Args:
        params: B tensors of one shape; written.
        updates: ``(B, m, n)``.
        options: How updates are applied.
        kernel: Applies what it takes.
    """
    if kernel is not None and updates.dtype == torch.float32 and kernel.takes_params(params):
        kernel.apply(params, updates, options)
        return
    moves = list((updates * options.lr).unbind())
    if params[0].dim() != 2 or params[0].shape != updates.shape[1:]:
        moves = [move.view(param.shape) for param, move in zip(params, moves, strict=True)]
    decays = isinstance(options.shrink, Tensor) or options.shrink != 1.0
    if params[0].dtype == updates.dtype:
        if decays:
            torch._foreach_mul_(list(params), options.shrink)
        torch._foreach_add_(list(params), moves)
        return
    for param, move in zip(params, moves, strict=True):
        wide = param.to(updates.dtype)
        param.copy_((wide * options.shrink if decays else wide) + move)


def loads(items: Sequence[StepItem], element_size: int) -> Iterator[list[list[StepItem]]]:
    """Yield batches of equal matrices, for one backend call each, as large as the bound on memory allows."""
    kinds: dict[Any, list[StepItem]] = {}
    for item in items:
        whole: Any = item.matrix
        shape = tuple(whole.shape), item.param.dtype
        kind = (*shape, tuple(whole.placements), whole.device_mesh) if hasattr(whole, "placements") else shape
        kinds.setdefault(kind, []).append(item)
    load: list[list[StepItem]] = []
    size = 0
    for alike in kinds.values():
        sides = [matrix_shape(item.matrix.shape) for item in alike if item.matrix is not None]
        for positions in buckets(sides, element_size):
            bytes_needed = len(positions) * scratch_entries(*sides[0]) * element_size
            if load and size + bytes_needed > SCRATCH_BYTES:
                yield load
                load, size = [], 0
            load.append([alike[position] for position in positions])
            size += bytes_needed
    if load:
        yield load


# ---- sharded parameters ------------------------------------------------------------------------------------------------


def _gathered(items: Sequence[StepItem], parts: Tensor) -> Tensor:
    """Return whole matrices ``(B, m, n)`` of this rank's parts of them."""
    from torch.distributed.tensor import DTensor

    wholes: list[Tensor] = []
    for item, part in zip(items, parts.unbind(), strict=True):
        like: Any = item.matrix
        local = part.reshape(item.param.shape).contiguous()
        stride = torch.empty(like.shape, device="meta").stride()
        sharded = DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride
        )
        wholes.append(sharded.full_tensor().reshape(matrix_shape(like.shape)))
    return torch.stack(wholes)


def _own_parts(items: Sequence[StepItem], wholes: Tensor, like: Tensor) -> Tensor:
    """Return this rank's parts of whole matrices; nothing is communicated."""
    from torch.distributed.tensor import DTensor, Replicate

    parts: list[Tensor] = []
    for item, whole in zip(items, wholes.unbind(), strict=True):
        matrix: Any = item.matrix
        replicated = [Replicate()] * matrix.device_mesh.ndim
        everywhere = DTensor.from_local(whole.reshape(matrix.shape), matrix.device_mesh, replicated, run_check=False)
        parts.append(everywhere.redistribute(placements=matrix.placements).to_local().reshape(like.shape[1:]))
    return torch.stack(parts)
