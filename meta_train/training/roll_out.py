"""Inner steps without a graph, and a record from which the meta-gradient is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.rules import Memory, UpdateRule
from meta_train.tasks.task import Optimizee
from meta_train.training.inner_steps import Lesson, TensorScales, inner_steps
from meta_train.training.matrices import Matrices
from meta_train.training.parts import Parts


@dataclass
class Carry:
    """Where an episode stands between two truncations; everything is detached.

    Args:
        params: Flat optimizee parameters ``(P, D)``.
        memory: The rule's memory for all P * D coordinates.
        step: Inner steps taken.
        loss: ``(P,)`` at ``params``.
        grad: ``(P, D)`` at ``params``; the next inner step uses it.
        initial_loss: ``(P,)`` at the start of the episode.
        teacher_memory: The teacher's memory, where a teacher takes the inner steps.
    """

    params: Tensor
    memory: Memory
    step: int
    loss: Tensor
    grad: Tensor
    initial_loss: Tensor
    teacher_memory: Memory | None = None


@dataclass
class RollOut:
    """What one truncation recorded, for ``M`` of the ``P * D`` coordinates.

    Args:
        losses: ``(K, P)``, after each inner step.
        grads: ``(K, M)``, after each inner step.
        inputs: ``(K, M, F)``, which the LSTM read.
        contexts: ``(K, M, C)``.
        active: ``(K, M)``.
        start: Hidden and cell before the first step, each ``(M, L * H)``.
        problem: ``(M,)``, the problem each coordinate belongs to.
        part: ``(M,)``, the position of the rule that moves it.
        share: How likely each coordinate was to be among the M, ``(M,)``.
        tensor: ``(M,)``, the number of the tensor of all problems that each coordinate belongs to.
        updates: ``(K, M)``, the updates of the rule, where a teacher took the inner steps.
        taught: ``(K, M)``, the updates of the teacher.
        chosen: ``(M,)``, the recorded coordinates.
        wholes: The updates that the matrix stage of the rule shaped, where it has one.
    """

    losses: Tensor
    grads: Tensor
    inputs: Tensor
    contexts: Tensor
    active: Tensor
    start: tuple[Tensor, Tensor]
    problem: Tensor
    part: Tensor
    share: Tensor
    tensor: Tensor
    updates: Tensor | None = None
    taught: Tensor | None = None
    chosen: Tensor | None = None
    wholes: Wholes | None = None


@dataclass
class Wholes:
    """Whole updates of a truncation that the matrix stage shaped: to pull back through it takes all coordinates of a matrix.

    Args:
        matrices: Where the matrices lie among the coordinates.
        updates: ``(K, P, D)``, as the LSTM made them.
        momenta: ``(K, P, D)``, or None where the rule keeps none.
        grads: ``(K, P, D)``, after each inner step.
    """

    matrices: Matrices
    updates: Tensor
    momenta: Tensor | None
    grads: Tensor


def start_episode(
    rule: Parts, optimizee: Optimizee, params: Tensor | None = None, teacher: UpdateRule | None = None
) -> Carry:
    """Return the carry of a fresh optimizee: memory at rest, first loss and gradient evaluated.

    Args:
        rule: Gives dtype, device and the shape of the memory.
        optimizee: Freshly sampled.
        params: Start here ``(P, D)`` instead of at the optimizee's initial parameters.
        teacher: The rule that will take the inner steps instead, if any.

    Returns:
        The carry at inner step 0.
    """
    one = rule.shared
    like = one.readout.weight.detach()
    params = (optimizee.flat_params() if params is None else params).to(like)
    loss, grad = loss_and_grad(optimizee, params)
    memory = one.initial_memory(params.numel(), like)
    teacher_memory = teacher.initial_memory(params.numel(), like) if teacher else None
    return Carry(params, memory, 0, loss, grad, loss, teacher_memory)


def loss_and_grad(optimizee: Optimizee, params: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate the next minibatch.

    Args:
        optimizee: Draws the minibatch.
        params: ``(P, D)``.

    Returns:
        Losses ``(P,)`` and the gradient ``(P, D)`` of their sum, both detached.
    """
    params = params.detach().requires_grad_()
    with torch.enable_grad():
        losses = optimizee.losses(optimizee.unflatten(params))
        (grad,) = torch.autograd.grad(losses.sum(), params)
    return losses.detach(), grad


class Sample(NamedTuple):
    """Some of the ``P * D`` coordinates of an episode.

    Args:
        chosen: ``(M,)``, indices into all of them, problem by problem.
        share: ``(M,)``, how likely each was to be chosen.
    """

    chosen: Tensor
    share: Tensor


def every_coordinate(carry: Carry) -> Sample:
    """Return all coordinates of an episode."""
    total = carry.params.numel()
    return Sample(torch.arange(total, device=carry.params.device), torch.ones(total, device=carry.params.device))


def no_coordinate() -> Sample:
    """Return the empty sample, for a roll-out that needs only the losses."""
    return Sample(torch.zeros(0, dtype=torch.long), torch.zeros(0))


def sample_coordinates(optimizee: Optimizee, wanted: int, generator: torch.Generator, *, by_tensor: bool = False) -> Sample:
    """Draw coordinates to backpropagate through, without replacement.

    Args:
        optimizee: Says which coordinates share a tensor.
        wanted: How many, M.
        generator: Draws them.
        by_tensor: Draw an equal number from each tensor, as far as it has them, not all with equal chances: the few weights
            of a last layer may matter no less than the many of a first.

    Returns:
        The coordinates; all of them where no more exist than wanted.

    Raises:
        ValueError: If a tensor would be left out, which would bias the meta-gradient.
    """
    member = optimizee.tensor_index.repeat(optimizee.num_problems)
    total = member.numel()
    if wanted >= total:
        return Sample(torch.arange(total), torch.ones(total))
    order = torch.randperm(total, generator=generator)
    if not by_tensor:
        return Sample(order[:wanted], torch.full((wanted,), wanted / total))
    sizes = member.bincount()
    if wanted < len(sizes):
        raise ValueError(
            f"{wanted} coordinates cannot hold one of each of {len(sizes)} tensors; ask for more, or uniform ones"
        )
    quota, left = torch.zeros_like(sizes), wanted
    for done, tensor in enumerate(sizes.argsort(stable=True)):
        quota[tensor] = sizes[tensor].clamp(max=left // (len(sizes) - done))
        left -= int(quota[tensor])
    index = torch.cat([order[member[order] == tensor][: quota[tensor]] for tensor in range(len(sizes))])
    return Sample(index, (quota / sizes)[member[index]])


@torch.no_grad()
def roll_out(
    rule: Parts,
    optimizee: Optimizee,
    carry: Carry,
    truncation: int,
    coordinates: Sample | None = None,
    teacher: UpdateRule | None = None,
) -> tuple[RollOut, Carry]:
    """Take K inner steps without a graph.

    Args:
        rule: The rule that is meta-trained.
        optimizee: Its minibatches advance.
        carry: Where to start.
        truncation: Inner steps, K.
        coordinates: Coordinates to record, among the ``P * D``; None records all.
        teacher: Takes the steps; the rule sees the same gradients and moves nothing.

    Returns:
        The record and the carry after the last step.

    Raises:
        ValueError: If the episode was started without the teacher, or the rule that imitates it has a matrix stage.
    """
    lesson = None
    if teacher is not None:
        if rule.shared.matrix_stage is not None:
            raise ValueError(
                "a rule with a matrix stage cannot imitate a teacher; set matrix_blend only in [use] or a start"
            )
        if carry.teacher_memory is None:
            raise ValueError("the episode was started without a teacher; give start_episode the same as roll_out")
        lesson = Lesson(rule, teacher, optimizee, carry.params, carry.memory, carry.teacher_memory)
    inner = lesson or inner_steps(rule, optimizee, carry.params, carry.memory)
    grad, loss = carry.grad, carry.loss
    size = carry.params.shape[1]
    chosen, share = every_coordinate(carry) if coordinates is None else coordinates
    problem, tensor = chosen // size, optimizee.tensor_index[chosen % size]
    shared, scales_at = rule.shared, TensorScales(rule, optimizee)
    # One piece of memory for all inner steps: small tensors kept by each step would lie between blocks of the size of
    # activations, which the allocator could then not join, and every step would lose megabytes.
    losses = loss.new_empty(truncation, *loss.shape)
    grads = grad.new_empty(truncation + 1, chosen.numel())
    scale = grads.new_empty(truncation, chosen.numel()) if scales_at else None
    memory = {
        name: values.new_empty(truncation, chosen.numel(), *values.shape[1:])
        for name, values in shared.read_by_encode(inner.memory).items()
    }
    grads[0] = grad.flatten()[chosen]
    noted: list[tuple[Tensor, Tensor | None, Tensor]] = []
    for k in range(truncation):
        for name, values in shared.read_by_encode(inner.memory).items():
            memory[name][k] = values[chosen]
        scales = scales_at(inner.params, inner.memory, carry.step + k)
        if scale is not None and scales is not None:
            scale[k] = scales[problem, tensor]
        inner.take(grad, carry.step + k + 1, scales)
        loss, grad = loss_and_grad(optimizee, inner.params)
        losses[k], grads[k + 1] = loss, grad.flatten()[chosen]
        if inner.raw is not None and len(chosen):
            noted.append((*inner.raw, grad))
    # What the rule saw, for all inner steps at once.
    steps = torch.arange(carry.step + 1, carry.step + truncation + 1).to(grad).repeat_interleave(chosen.numel())
    memory = {name: values.flatten(0, 1) for name, values in memory.items()}
    seen = shared.encode(grads[:-1].flatten(), memory, steps, None if scale is None else scale.flatten())
    record = RollOut(
        losses=losses,
        grads=grads[1:],
        inputs=seen.inputs.unflatten(0, (truncation, chosen.numel())),
        contexts=seen.context.unflatten(0, (truncation, chosen.numel())),
        active=seen.active.unflatten(0, (truncation, chosen.numel())),
        start=(carry.memory["hidden"][chosen], carry.memory["cell"][chosen]),
        problem=problem,
        part=rule.owners(optimizee.params)[tensor],
        share=share.to(grad),
        tensor=problem * len(optimizee.params) + tensor,
        updates=torch.stack([update.flatten()[chosen] for update in lesson.updates]) if lesson else None,
        taught=torch.stack([update.flatten()[chosen] for update in lesson.taught]) if lesson else None,
        chosen=chosen,
        wholes=_wholes(Matrices(rule, optimizee), noted) if noted else None,
    )
    end, teacher_memory = carry.step + truncation, lesson.teacher.memory if lesson else None
    return record, Carry(inner.params, inner.memory, end, loss, grad, carry.initial_loss, teacher_memory)


def _wholes(matrices: Matrices, noted: list[tuple[Tensor, Tensor | None, Tensor]]) -> Wholes:
    updates, momenta, grads = zip(*noted, strict=True)
    kept = [each for each in momenta if each is not None]
    return Wholes(matrices, torch.stack(updates), torch.stack(kept) if kept else None, torch.stack(grads))
