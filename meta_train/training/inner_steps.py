"""Inner steps of many small problems at once, with no graph: by the compiled kernel where it works, else in PyTorch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from learned_optim.backends import StepOptions
from learned_optim.backends.native import step as native
from learned_optim.rules import Memory, UpdateRule
from learned_optim.rules.storage import names
from meta_train.tasks.task import Optimizee
from meta_train.training.matrices import Matrices
from meta_train.training.parts import Parts


class InnerSteps(Protocol):
    """Where P problems of D coordinates stand, and how they move on.

    ``params`` is ``(P, D)``; ``memory`` is the rule's, for all P * D coordinates. ``raw`` is the last update before the
    matrix stage and the momentum that it followed, each ``(P, D)``; None where the rule has no such stage.
    """

    params: Tensor
    memory: Memory
    raw: tuple[Tensor, Tensor | None] | None

    def take(self, grad: Tensor, step: int, scales: Tensor | None) -> None:
        """Take inner step number ``step`` with the gradient ``(P, D)`` and :class:`TensorScales` at ``params``."""
        ...


def inner_steps(rule: Parts, optimizee: Optimizee, params: Tensor, memory: Memory) -> InnerSteps:
    """Return inner steps from a start, which is not modified.

    Args:
        rule: As it is now; its weights must not change while steps are taken.
        optimizee: Says which coordinates share a tensor.
        params: ``(P, D)``.
        memory: For all P * D coordinates.

    Returns:
        The fastest way to take them.
    """
    return (CompiledSteps if native.supports(rule.shared) else PlainSteps)(rule, optimizee, params, memory)


class TensorScales:
    """The rule's ``tensor_scale`` of each tensor of each problem: constants of the meta-gradient.

    Args:
        rule: Parts share all that a scale depends on.
        optimizee: Says which coordinates share a tensor.
    """

    def __init__(self, rule: Parts, optimizee: Optimizee) -> None:
        self._rule, self._optimizee = rule.shared, optimizee
        bounds = [self._rule.scale_bounds(value[0].numel()) for value in optimizee.params.values()]
        self._floors, self._ceilings = self._rule.readout.weight.new_tensor(bounds).unbind(1)

    def __bool__(self) -> bool:
        """Return whether the rule takes a scale."""
        return self._rule.uses_scale

    def __call__(self, params: Tensor, memory: Memory, done: int) -> Tensor | None:
        """Return the scales before a step.

        Args:
            params: ``(P, D)``.
            memory: Before the step, for all P * D coordinates.
            done: Inner steps taken so far.

        Returns:
            ``(P, tensors)``, or None where the rule takes none.
        """
        if not self:
            return None
        scales = self._means(params.detach().square()).sqrt().clamp(self._floors, self._ceilings)
        if not self._rule.agreement_names:
            return scales
        momentum, second_moment = (memory[name].detach().view_as(params) for name in self._rule.agreement_names)
        squares, sizes = self._means(momentum.double().square()), self._means(second_moment.double())
        factor = self._rule.agreement_factor(squares, sizes, torch.tensor(float(done), device=params.device))
        return (scales * factor).to(scales.dtype)

    def _means(self, values: Tensor) -> Tensor:
        """Return the mean over each tensor."""
        return values @ self._optimizee.tensor_means.to(values)


def plain_step(
    rule: Parts, optimizee: Optimizee, grad: Tensor, memory: Memory, step: int, scales: Tensor | None
) -> tuple[Tensor, Memory]:
    """Take an inner step the readable way: :meth:`UpdateRule.forward` on all coordinates of each part.

    Args:
        rule: In any dtype, on any device.
        optimizee: Says which coordinates share a tensor.
        grad: ``(P, D)``.
        memory: For all P * D coordinates. Not modified.
        step: Inner steps including this one.
        scales: From :class:`TensorScales`.

    Returns:
        The update ``(P, D)`` and the new memory, with a graph where the rule's meta-parameters want one.
    """
    update, memory = coordinate_step(rule, optimizee, grad, memory, step, scales)
    matrices = Matrices(rule, optimizee)
    return matrices.shape(update, flat_momentum(rule, memory, update)) if matrices else update, memory


def flat_momentum(rule: Parts, memory: Memory, like: Tensor) -> Tensor | None:
    """Return the rule's raw momentum in the shape ``(P, D)`` of ``like``; it is a constant of the meta-gradient."""
    momentum = rule.shared.raw_momentum(memory)
    return None if momentum is None else momentum.detach().view_as(like)


def coordinate_step(
    rule: Parts, optimizee: Optimizee, grad: Tensor, memory: Memory, step: int, scales: Tensor | None
) -> tuple[Tensor, Memory]:
    """Take the part of an inner step that moves every coordinate by itself: :func:`plain_step` without the matrix stage.

    Args:
        rule: As given to :func:`plain_step`.
        optimizee: As given to :func:`plain_step`.
        grad: As given to :func:`plain_step`.
        memory: As given to :func:`plain_step`.
        step: As given to :func:`plain_step`.
        scales: As given to :func:`plain_step`.

    Returns:
        The update ``(P, D)`` and the new memory.
    """
    scale = None if scales is None else scales[:, optimizee.tensor_index].flatten()
    count, flat = grad.new_tensor(float(step)), grad.flatten()
    if len(rule) == 1:
        update, memory, _ = rule.shared(flat, memory, count, scale)
        return update.view_as(grad), memory
    owner = rule.owners(optimizee.params)[optimizee.tensor_index].repeat(len(grad))
    order = [(owner == part).nonzero().squeeze(1) for part in range(len(rule))]
    updates, memories = [], []
    for one, chosen in zip(rule, order, strict=True):
        of_part = {name: values[chosen] for name, values in memory.items()}
        update, of_part, _ = one(flat[chosen], of_part, count, None if scale is None else scale[chosen])
        updates.append(update)
        memories.append(of_part)
    back = torch.cat(order).argsort()
    joined = {name: torch.cat([of_part[name] for of_part in memories])[back] for name in memory}
    return torch.cat(updates)[back].view_as(grad), joined


class PlainSteps:
    """:func:`plain_step`, step by step.

    Args:
        rule: In any dtype, on any device.
        optimizee: Says which coordinates share a tensor.
        params: ``(P, D)``.
        memory: For all P * D coordinates.
    """

    def __init__(self, rule: Parts, optimizee: Optimizee, params: Tensor, memory: Memory) -> None:
        self.rule, self.optimizee, self.params, self.memory = rule, optimizee, params, memory
        self.matrices = Matrices(rule, optimizee)
        self.raw: tuple[Tensor, Tensor | None] | None = None

    def take(self, grad: Tensor, step: int, scales: Tensor | None) -> None:
        """Take an inner step."""
        update, self.memory = coordinate_step(self.rule, self.optimizee, grad, self.memory, step, scales)
        if self.matrices:
            self.raw = update, flat_momentum(self.rule, self.memory, update)
            update = self.matrices.shape(*self.raw)
        self.params = self.params + update


class CompiledSteps:
    """The fused kernel of the optimizer, on buffers that hold the tensors of all problems one after another.

    Args:
        rule: One that the native backend supports.
        optimizee: Says which coordinates share a tensor.
        params: ``(P, D)``.
        memory: For all P * D coordinates.
    """

    def __init__(self, rule: Parts, optimizee: Optimizee, params: Tensor, memory: Memory) -> None:
        self.params, self.memory = params.clone(), {name: values.clone() for name, values in memory.items()}
        self.rule, self.matrices = rule, Matrices(rule, optimizee)
        self.raw: tuple[Tensor, Tensor | None] | None = None
        # Updates that are still to be shaped are handed out: they are what a step makes of zeros.
        self._moved = torch.zeros_like(self.params) if self.matrices else self.params
        self._step, self._grad = torch.zeros(()), torch.empty_like(self.params)
        one = rule.shared
        lengths = [value[0].numel() for value in optimizee.params.values()] * len(params)
        owners = rule.owners(optimizee.params).tolist() * len(params)
        self._scales = torch.empty(len(lengths) if one.uses_scale else 0)
        if len(rule) == 1 and not one.uses_scale:
            # Whoever takes no statistic of a tensor need not know where one ends.
            lengths, owners = [params.numel()], [0]
        grads, flat = self._grad.view(-1).split(lengths), self._moved.view(-1).split(lengths)
        kept = [self.memory[name].split(lengths) for name in names(one, memory)]
        scales = self._scales.unbind()
        self._parts = []
        for part, member in enumerate(rule):
            own = [piece for piece, owner in enumerate(owners) if owner == part]
            if own:
                table = native.Table(
                    [flat[piece] for piece in own],
                    [pieces[piece] for pieces in kept for piece in own],
                    [self._step] * len(own),
                    [scales[piece] for piece in own] if one.uses_scale else [],
                )
                packed = native.struct_of(member), native.packed(member)
                self._parts.append((table, packed, [grads[piece] for piece in own]))

    def take(self, grad: Tensor, step: int, scales: Tensor | None) -> None:
        """Take an inner step."""
        if scales is not None:
            self._scales.copy_(scales.flatten())
        self._step.fill_(step)
        self._grad.copy_(grad)
        for table, packed, grads in self._parts:
            table.run(*packed, grads, StepOptions.of(1.0))
        if self.matrices:
            self.raw = self._moved.clone(), flat_momentum(self.rule, self.memory, self._moved)
            self.params.add_(self.matrices.shape(*self.raw))
            self._moved.zero_()


class Lesson:
    """Inner steps that a teacher takes while a rule, shown the same gradients, moves nothing and says what it would do.

    Args:
        rule: The pupil; ``memory`` is its own.
        teacher: ``params`` go where it takes them.
        optimizee: Says which coordinates share a tensor.
        params: ``(P, D)``.
        memory: The rule's.
        teacher_memory: The teacher's.
    """

    def __init__(
        self,
        rule: Parts,
        teacher: UpdateRule,
        optimizee: Optimizee,
        params: Tensor,
        memory: Memory,
        teacher_memory: Memory,
    ) -> None:
        self.pupil = inner_steps(rule, optimizee, params, memory)
        teaching = Parts.whole(teacher)
        self.teacher = inner_steps(teaching, optimizee, params, teacher_memory)
        self._scales = TensorScales(teaching, optimizee)
        self.updates: list[Tensor] = []
        self.taught: list[Tensor] = []

    @property
    def raw(self) -> None:
        """Nothing: no rule with a matrix stage is taught."""

    @property
    def params(self) -> Tensor:
        """Where the teacher stands."""
        return self.teacher.params

    @property
    def memory(self) -> Memory:
        """The rule's."""
        return self.pupil.memory

    def take(self, grad: Tensor, step: int, scales: Tensor | None) -> None:
        """Take an inner step, and note the update ``(P, D)`` of each."""
        of_teacher = self._scales(self.params, self.teacher.memory, step - 1)
        for steps, own_scales, noted in ((self.pupil, scales, self.updates), (self.teacher, of_teacher, self.taught)):
            before = steps.params.clone()
            steps.take(grad, step, own_scales)
            noted.append(steps.params - before)
