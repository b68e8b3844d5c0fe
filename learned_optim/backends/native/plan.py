"""A step like the last one, without collecting and checking every tensor anew.

To collect a model's tensors, check each and measure it costs some ten microseconds a tensor, as much as the kernel needs for
hundreds of coordinates. A :class:`Plan` remembers every parameter and its state: the objects, their types, shapes, strides
and dtypes, and where their memory lies. Before each step it compares all of these with what is there now and takes the new
gradients. If anything else has changed, it refuses; the optimizer then takes the step in full and plans anew. A plan
keeps no gradient alive between steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from learned_optim.backends.items import PlannedGroup, StepItem, StepOptions, overlap
from learned_optim.backends.matrices import apply_updates, loads, shaped_updates
from learned_optim.backends.native import matrix
from learned_optim.backends.native.library import AVAILABLE
from learned_optim.backends.native.matrix import MatrixTable, addresses_in
from learned_optim.backends.native.step import Table, packed, struct_of, supports, takes
from learned_optim.rules import MatrixStage, UpdateRule
from learned_optim.rules.orthogonal import matrix_shape
from learned_optim.rules.storage import names

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # No torch that we know lacks it; steps would be taken in full.
    TensorGuards = None  # type: ignore[assignment,misc]

POSSIBLE = AVAILABLE and TensorGuards is not None
"""Whether plans can be made at all: the kernel is there, and so is what compares tensors."""

BLOCK = 256
"""Tensors looked at together: few enough to stay in a cache."""

_grad = attrgetter("grad")


class Plan:
    """The next step of an optimizer, if nothing but gradients and options changes until then.

    Args:
        groups: The parameter groups.
        state: The optimizer's state: for each parameter a dict of tensors.
    """

    def __init__(self, groups: Sequence[PlannedGroup], state: dict[Tensor, Any]) -> None:
        self._holders, self._memories = list(state), list(state.values())
        self._names = list(chain.from_iterable(self._memories))
        self._values = _Forms(list(chain.from_iterable(map(dict.values, self._memories))))
        self._groups = [_Planned(group, state) for group in groups]

    def repeat(self, groups: Sequence[PlannedGroup], state: dict[Tensor, Any]) -> bool:
        """Take and count the step, if everything is as it was.

        Args:
            groups: The parameter groups as they are now.
            state: The optimizer's state as it is now.

        Returns:
            Whether the step was taken; if not, nothing has changed.
        """
        if len(groups) != len(self._groups) or not self._holds(state):
            return False
        grads = [planned.find(group) for planned, group in zip(self._groups, groups, strict=True)]
        if any(found is None for found in grads):
            return False
        for planned, group, found in zip(self._groups, groups, grads, strict=True):
            planned.run(group, found or [])
        return True

    def _holds(self, state: dict[Tensor, Any]) -> bool:
        """Return whether the state holds the same dicts in this order, and they the same names and tensors like before."""
        return (
            _same(list(state), self._holders)
            and _same(list(state.values()), self._memories)
            and list(chain.from_iterable(self._memories)) == self._names
            and self._values.fit(list(chain.from_iterable(map(dict.values, self._memories))))
        )


class _Planned:
    """One group of a plan.

    Args:
        group: As it is.
        state: The optimizer's.
    """

    def __init__(self, group: PlannedGroup, state: dict[Tensor, Any]) -> None:
        self._rule, self._everyone = group.rule, list(group.params)
        self._at_rest = [param.grad is None for param in self._everyone]
        self._params = [param for param in self._everyone if param.grad is not None]
        states = [state[param] for param in self._params]
        memory = [state[name] for name in (names(group.rule, states[0]) if states else ()) for state in states]
        steps = [state["step"] for state in states]
        scales = torch.empty(len(steps), dtype=torch.float32, device="cpu").unbind() if group.rule.uses_scale else ()
        self._table = Table(self._params, memory, steps, scales)
        self._stage = group.options.matrix
        batches = [batch for load in _loads(group, state) for batch in load]
        self._together = _Together(group.rule, [batch for batch in batches if _taken(batch)])
        self._batches = [batch for batch in batches if not _taken(batch)]
        position = {id(param): at for at, param in enumerate(self._params)}
        self._positions = [position[id(item.param)] for batch in self._together.batches + self._batches for item in batch]
        self._handed = array("Q", [0] * len(self._params) if self._stage is not None else [])
        self._places = _Forms(self._params)
        self._grads = _Forms([param.grad for param in self._params], anywhere=True)

    def find(self, group: PlannedGroup) -> list[Tensor] | None:
        """Return the gradients, if all else is as it was."""
        if (
            group.rule is not self._rule
            or group.options.matrix != self._stage
            or not _same(group.params, self._everyone)
            or not self._places.fit(self._params)
        ):
            return None
        found = list(map(_grad, self._everyone))
        grads = [grad for grad in found if grad is not None]
        if len(grads) < len(found) and [grad is None for grad in found] != self._at_rest:
            return None
        return grads if self._grads.fit(grads) else None

    def run(self, group: PlannedGroup, grads: Sequence[Tensor]) -> None:
        """Take and count the step; the gradients are held until the kernel is done."""
        if not grads:
            return
        increment_version(self._params)
        described, options = (struct_of(self._rule), packed(self._rule)), group.options
        sides = [(len(batch), *matrix_shape(batch[0].param.shape)) for batch in self._batches]
        updates = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in sides]
        room, moved = self._together.place()
        handed = self._handed
        if self._stage is not None and (moved or updates):
            addresses = chain(self._together.addresses, chain.from_iterable(map(addresses_in, updates)))
            for position, address in zip(self._positions, addresses, strict=True):
                handed[position] = address
        self._table.run_and_count(*described, grads, options, handed)
        if self._stage is None:
            return
        self._together.run(self._stage, options)
        del room
        with torch.autocast("cpu", enabled=False):
            for batch, batched in zip(self._batches, updates, strict=True):
                shaped = shaped_updates(self._rule, batch, batched, options, matrix)
                apply_updates([item.param for item in batch], shaped, options, matrix)


class _Together:
    """Matrices that one call of the matrix kernel shapes and applies.

    Args:
        rule: Names their momenta.
        batches: Plain, contiguous matrices.
    """

    def __init__(self, rule: UpdateRule, batches: list[list[StepItem]]) -> None:
        self.batches = batches
        items = [item for batch in batches for item in batch]
        sides = [matrix_shape(item.param.shape) for item in items]
        momenta = [[item.memory[name] for item in items] for name in rule.momentum_names]
        self._plain = MatrixTable(sides, [item.param for item in items])
        self._following = MatrixTable(sides, [item.param for item in items], momenta)
        self._offsets = list(accumulate((_aligned(4 * rows * columns) for rows, columns in sides), initial=0))
        self._placed, self.addresses = 0, array("Q", [0]) * len(items)

    def place(self) -> tuple[Tensor, bool]:
        """Return room for all updates, to be held until they are applied, and whether their addresses have changed."""
        room = torch.empty(self._offsets[-1], dtype=torch.uint8, device="cpu")
        moved = room.data_ptr() != self._placed
        if moved:
            self._placed = room.data_ptr()
            self.addresses = array("Q", [self._placed + offset for offset in self._offsets[:-1]])
        return room, moved

    def run(self, stage: MatrixStage, options: StepOptions) -> None:
        """Shape and apply the updates."""
        if self.batches:
            (self._following if stage.momentum else self._plain).run(self.addresses, stage, options)


def _aligned(size: int) -> int:
    return size + -size % 64


def _taken(batch: Sequence[StepItem]) -> bool:
    return matrix.takes_sides(*matrix_shape(batch[0].param.shape)) and matrix.takes_params([item.param for item in batch])


class _Forms:
    """What tensors must look like, and where they must lie.

    Args:
        tensors: As they are.
        anywhere: Whether they may lie elsewhere by now.
    """

    def __init__(self, tensors: Sequence[Any], *, anywhere: bool = False) -> None:
        self._count, self._blocks, self._guards, self._addresses = len(tensors), [], [], []
        for start in range(0, len(tensors), BLOCK):
            block = slice(start, start + BLOCK)
            self._blocks.append(block)
            self._guards.append(TensorGuards(*tensors[block], dynamic_dims_sizes=None, dynamic_dims_strides=None))
            self._addresses.append([] if anywhere else list(map(Tensor.data_ptr, tensors[block])))

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether types, dtypes, devices, shapes, strides, flags and addresses are the same."""
        if len(tensors) != self._count:
            return False
        for block, guard, addresses in zip(self._blocks, self._guards, self._addresses, strict=True):
            some = tensors[block]
            if not guard.check(*some) or (addresses and list(map(Tensor.data_ptr, some)) != addresses):
                return False
        return True


def _same(now: Sequence[object], before: Sequence[object]) -> bool:
    """Return whether two sequences hold the same objects."""
    return len(now) == len(before) and all(map(is_, now, before))


def make_plan(groups: Sequence[PlannedGroup], state: dict[Tensor, Any]) -> Plan | None:
    """Plan the next step, where the compiled kernel can take all of it without copies.

    Args:
        groups: The parameter groups, with rules that are frozen.
        state: The optimizer's state.

    Returns:
        None where it cannot.
    """
    if not POSSIBLE or not all(isinstance(memory, dict) for memory in state.values()):
        return None
    if not all(isinstance(value, Tensor) for memory in state.values() for value in memory.values()):
        return None
    for group in groups:
        params = [param for param in group.params if param.grad is not None]
        if not supports(group.rule) or not all(_fits(group.rule, param, state.get(param)) for param in params):
            return None
        if len({names(group.rule, state[param]) for param in params}) > 1 or overlap(params):
            return None
        if len(_loads(group, state)) > 1:  # All updates at once would not fit into the scratch memory.
            return None
    return Plan(groups, state)


def _loads(group: PlannedGroup, state: dict[Tensor, Any]) -> list[list[list[StepItem]]]:
    """Return the matrices of a group in batches, each as large as the bound on memory allows."""
    if group.options.matrix is None:
        return []
    items = []
    for param in group.params:
        if param.grad is not None and group.options.matrix.applies_to(param.shape):
            memory = {name: state[param][name] for name in names(group.rule, state[param])}
            # A plan holds no gradient: the parameter stands in for it.
            items.append(StepItem(param, param, memory, state[param]["step"], None, param))
    return list(loads(items, torch.float32.itemsize))


def _fits(rule: UpdateRule, param: Tensor, state: Any) -> bool:
    grad = param.grad
    if not state or grad is None:
        return False
    memory = {name: state[name] for name in names(rule, state) if name in state}
    return (
        takes(rule, StepItem(param, grad, memory, state["step"], None))
        and param.is_contiguous()
        and grad.is_contiguous()
        and not param.is_neg()
        and not grad.is_neg()
        and grad.dtype == param.dtype
    )
