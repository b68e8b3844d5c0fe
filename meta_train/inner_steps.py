"""Inner steps of many small problems at once, with no graph: by the compiled kernel where it works, else in PyTorch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from learned_optim.backends import native
from learned_optim.rules import Memory, UpdateRule
from learned_optim.rules.storage import names
from meta_train.tasks.task import Optimizee


class InnerSteps(Protocol):
    """Where P problems of D coordinates stand, and how they move on.

    ``params`` is ``(P, D)``; ``memory`` is the rule's, for all P * D coordinates.
    """

    params: Tensor
    memory: Memory

    def take(self, grad: Tensor, step: int, scales: Tensor | None) -> None:
        """Take inner step number ``step`` with the gradient ``(P, D)`` and :func:`tensor_scales` at ``params``."""
        ...


def inner_steps(rule: UpdateRule, optimizee: Optimizee, params: Tensor, memory: Memory) -> InnerSteps:
    """Return inner steps from a start, which is not modified.

    Args:
        rule: As it is now; its weights must not change while steps are taken.
        optimizee: Says which coordinates share a tensor.
        params: ``(P, D)``.
        memory: For all P * D coordinates.

    Returns:
        The fastest way to take them.
    """
    return (CompiledSteps if native.supports(rule) else PlainSteps)(rule, optimizee, params, memory)


def scale_bounds(rule: UpdateRule, optimizee: Optimizee) -> tuple[Tensor, Tensor] | None:
    """Return the rule's bounds of each tensor of a problem, two of ``(tensors,)``, or None where it takes no scale."""
    if not rule.uses_scale:
        return None
    bounds = [rule.scale_bounds(value[0].numel()) for value in optimizee.params.values()]
    floors, ceilings = rule.readout.weight.new_tensor(bounds).unbind(1)
    return floors, ceilings


def tensor_scales(bounds: tuple[Tensor, Tensor] | None, optimizee: Optimizee, params: Tensor) -> Tensor | None:
    """Return the rule's ``tensor_scale`` of each tensor of each problem, ``(P, tensors)``, within :func:`scale_bounds`."""
    if bounds is None:
        return None
    return (params.detach().square() @ optimizee.tensor_means.to(params)).sqrt().clamp(*bounds)


class PlainSteps:
    """The readable way: :meth:`UpdateRule.forward` on all coordinates.

    Args:
        rule: In any dtype, on any device.
        optimizee: Says which coordinates share a tensor.
        params: ``(P, D)``.
        memory: For all P * D coordinates.
    """

    def __init__(self, rule: UpdateRule, optimizee: Optimizee, params: Tensor, memory: Memory) -> None:
        self.rule, self.optimizee, self.params, self.memory = rule, optimizee, params, memory

    def take(self, grad: Tensor, step: int, scales: Tensor | None) -> None:
        """Take an inner step."""
        scale = None if scales is None else scales[:, self.optimizee.tensor_index].flatten()
        update, self.memory, _ = self.rule(grad.flatten(), self.memory, self.params.new_tensor(float(step)), scale)
        self.params = self.params + update.view_as(self.params)


class CompiledSteps:
    """The fused kernel of the optimizer, on buffers that hold the tensors of all problems one after another.

    Args:
        rule: One that the native backend supports.
        optimizee: Says which coordinates share a tensor.
        params: ``(P, D)``.
        memory: For all P * D coordinates.
    """

    def __init__(self, rule: UpdateRule, optimizee: Optimizee, params: Tensor, memory: Memory) -> None:
        self.params, self.memory = params.clone(), {name: values.clone() for name, values in memory.items()}
        # Whoever takes no statistic of a tensor need not know where one ends.
        lengths = [value[0].numel() for value in optimizee.params.values()] * len(params)
        lengths = lengths if rule.uses_scale else [params.numel()]
        self._step, self._scales = torch.zeros(()), torch.empty(len(lengths) if rule.uses_scale else 0)
        self._grad = torch.empty_like(self.params)
        self._grads = self._grad.view(-1).split(lengths)
        kept = [piece for name in names(rule, memory) for piece in self.memory[name].split(lengths)]
        steps = [self._step] * len(lengths)
        self._table = native.Table(self.params.view(-1).split(lengths), kept, steps, self._scales.unbind())
        self._rule, self._weights = native.struct(native.describe(rule)), native.packed(rule)

    def take(self, grad: Tensor, step: int, scales: Tensor | None) -> None:
        """Take an inner step."""
        if scales is not None:
            self._scales.copy_(scales.flatten())
        self._step.fill_(step)
        self._grad.copy_(grad)
        self._table.run(self._rule, self._weights, self._grads, lr=1.0, weight_decay=0.0, maximize=False)
