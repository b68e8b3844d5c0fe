r"""The meta-gradient: one sequence pass, and no graph through the optimizee.

The paper drops second derivatives: gradients enter the rule as constants. With updates u_s, meta-loss
``L = sum_t w_t f(theta_t)`` and ``theta_t = theta_0 + sum_{s<t} u_s`` that leaves::

    dL/dphi = sum_s < G_s , d u_s / dphi >,      G_s = sum_{t>s} w_t grad f(theta_t)

So :func:`roll_out` takes K inner steps without any graph and records what the rule saw and the gradients that the inner loop
computes anyway; :func:`backpropagate` forms G by a reverse cumulative sum and runs the recorded inputs through the LSTM as
one sequence. This is exact, and because coordinates are independent it may be done for a random part of them, unbiased
(:func:`sample_coordinates`).
:func:`unroll` is the plain way, step by step through autograd: the reference in tests, and the only way to keep second
derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.backends.native.sequence import native_sequence, native_supports
from learned_optim.rules import Memory, UpdateRule
from meta_train.tasks.task import Optimizee
from meta_train.training.inner_steps import Lesson, inner_steps, plain_step, scale_bounds, tensor_scales
from meta_train.training.parts import AnyRule, first, members, parts_of

Objective = Callable[[Tensor, Tensor], Tensor]
"""From losses ``(K, P)`` of a truncation and initial losses ``(P,)`` to weights w_t ``(K, P)``, constants."""


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
        teacher_memory: The teacher's memory, where one takes the inner steps.
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
        inputs: ``(K, M, F)`` that the LSTM read.
        contexts: ``(K, M, C)``.
        active: ``(K, M)``.
        start: Hidden and cell before the first step, each ``(M, L * H)``.
        problem: ``(M,)``, the problem each coordinate belongs to.
        part: ``(M,)``, the position of the rule that moves it.
        share: How likely each coordinate was to be among the M, ``(M,)``.
        tensor: ``(M,)``, the number of the tensor of all problems that each coordinate belongs to.
        updates: ``(K, M)``, what the rule would have done, where a teacher took the inner steps.
        taught: ``(K, M)``, what the teacher did.
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


def start_episode(
    rule: AnyRule, optimizee: Optimizee, params: Tensor | None = None, teacher: UpdateRule | None = None
) -> Carry:
    """Return the carry of a fresh optimizee: memory at rest, first loss and gradient evaluated.

    Args:
        rule: Gives dtype, device and the shape of the memory.
        optimizee: Freshly sampled.
        params: Start here ``(P, D)`` instead of at the optimizee's initial parameters.
        teacher: Will take the inner steps in the rule's place.

    Returns:
        The carry at inner step 0.
    """
    one = first(rule)
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
    """Return none: for who wants to see the losses of a roll-out alone."""
    return Sample(torch.zeros(0, dtype=torch.long), torch.zeros(0))


def sample_coordinates(optimizee: Optimizee, wanted: int, generator: torch.Generator, *, by_tensor: bool = False) -> Sample:
    """Draw coordinates to backpropagate through, without replacement.

    Args:
        optimizee: Says which coordinates share a tensor.
        wanted: How many, M.
        generator: Draws them.
        by_tensor: As many of each tensor, as far as it has them, instead of any alike: the few weights of a last layer may
            decide as much as the many of a first.

    Returns:
        The coordinates; all of them where there are no more than wanted.

    Raises:
        ValueError: If some tensor would be left out, which would bias the meta-gradient.
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
    rule: AnyRule,
    optimizee: Optimizee,
    carry: Carry,
    truncation: int,
    coordinates: Sample | None = None,
    teacher: UpdateRule | None = None,
) -> tuple[RollOut, Carry]:
    """Take K inner steps without a graph.

    Args:
        rule: What is meta-trained: a rule, or several that share the model.
        optimizee: Its minibatches advance.
        carry: Where to start.
        truncation: Inner steps, K.
        coordinates: Of the ``P * D`` coordinates, those to record; None records all.
        teacher: Takes the steps; the rule sees the same gradients and moves nothing.

    Returns:
        The record and the carry after the last step.

    Raises:
        ValueError: If the episode was started without the teacher.
    """
    lesson = None
    if teacher is not None:
        if carry.teacher_memory is None:
            raise ValueError("the episode was started without a teacher; give start_episode the same as roll_out")
        lesson = Lesson(rule, teacher, optimizee, carry.params, carry.memory, carry.teacher_memory)
    inner = lesson or inner_steps(rule, optimizee, carry.params, carry.memory)
    grad, loss = carry.grad, carry.loss
    size = carry.params.shape[1]
    chosen, share = every_coordinate(carry) if coordinates is None else coordinates
    problem, tensor = chosen // size, optimizee.tensor_index[chosen % size]
    shared, bounds = first(rule), scale_bounds(rule, optimizee)
    # One piece of memory for all inner steps: what each of them kept would lie between blocks of the size of activations,
    # which the allocator could not join again, and megabytes would be lost in every step.
    losses = loss.new_empty(truncation, *loss.shape)
    grads = grad.new_empty(truncation + 1, chosen.numel())
    scale = None if bounds is None else grads.new_empty(truncation, chosen.numel())
    memory = {
        name: values.new_empty(truncation, chosen.numel(), *values.shape[1:])
        for name, values in shared.read_by_encode(inner.memory).items()
    }
    grads[0] = grad.flatten()[chosen]
    for k in range(truncation):
        for name, values in shared.read_by_encode(inner.memory).items():
            memory[name][k] = values[chosen]
        scales = tensor_scales(bounds, optimizee, inner.params)
        if scale is not None and scales is not None:
            scale[k] = scales[problem, tensor]
        inner.take(grad, carry.step + k + 1, scales)
        loss, grad = loss_and_grad(optimizee, inner.params)
        losses[k], grads[k + 1] = loss, grad.flatten()[chosen]
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
        part=parts_of(rule, optimizee.params)[tensor],
        share=share.to(grad),
        tensor=problem * len(optimizee.params) + tensor,
        updates=torch.stack([update.flatten()[chosen] for update in lesson.updates]) if lesson else None,
        taught=torch.stack([update.flatten()[chosen] for update in lesson.taught]) if lesson else None,
    )
    end, teacher_memory = carry.step + truncation, lesson.teacher.memory if lesson else None
    return record, Carry(inner.params, inner.memory, end, loss, grad, carry.initial_loss, teacher_memory)


def backpropagate(rule: AnyRule, record: RollOut, weights: Tensor, discount: float = 1.0) -> None:
    """Add the meta-gradient of a recorded truncation to the ``.grad`` of the rule's meta-parameters.

    Args:
        rule: The rule that made the record.
        record: From :func:`roll_out`.
        weights: w_t of the meta-loss, ``(K, P)``.
        discount: Factor per step between an update and the gradients it is held responsible for; 1 is exact.
    """
    weighted = record.grads * weights[:, record.problem]
    _backpropagate_updates(rule, record, _suffix_sum(weighted, discount) / record.share)


def imitate(rule: AnyRule, record: RollOut) -> float:
    """Add the gradient of how far a rule was from its teacher to the ``.grad`` of its meta-parameters.

    That is half the mean of ``(u - u*)^2 / mean(u*^2)``, with u the rule's updates, u* the teacher's, and the mean below the
    line over the recorded coordinates and steps of each tensor: its own measure for each, as updates of different tensors
    differ by orders of magnitude.

    Args:
        rule: The rule that made the record.
        record: From :func:`roll_out` with a teacher.

    Returns:
        The mean, without the half: 1 for a rule that moves nothing, 0 for the teacher.

    Raises:
        ValueError: If no teacher took the steps of the record.
    """
    if record.updates is None or record.taught is None:
        raise ValueError("a record without a teacher's updates leaves nothing to imitate; give roll_out a teacher")
    squares, count = torch.zeros(2, int(record.tensor.max()) + 1, dtype=record.taught.dtype).unbind()
    squares.index_add_(0, record.tensor, record.taught.square().mean(0))
    count.index_add_(0, record.tensor, torch.ones_like(record.taught[0]))
    level = (squares / count)[record.tensor].clamp(min=torch.finfo(squares.dtype).tiny)
    error = record.updates - record.taught
    _backpropagate_updates(rule, record, error / (level * error.numel()))
    return float((error.square() / level).mean())


def _backpropagate_updates(rule: AnyRule, record: RollOut, future: Tensor) -> None:
    """Backpropagate the derivative of anything by the updates, ``(K, M)``."""
    rules = members(rule)
    for part, one in enumerate(rules.values()):
        if len(rules) == 1:
            _replay(one, record.inputs, record.contexts, record.active, record.start, future)
        elif (own := record.part == part).any():
            start = (record.start[0][own], record.start[1][own])
            _replay(one, record.inputs[:, own], record.contexts[:, own], record.active[:, own], start, future[:, own])


def _replay(
    rule: UpdateRule, inputs: Tensor, contexts: Tensor, active: Tensor, start: tuple[Tensor, Tensor], future: Tensor
) -> None:
    """Run recorded inputs through one rule's LSTM and backpropagate G, ``future``, through its updates."""
    if native_supports(rule.lstm):
        hiddens = native_sequence(rule.lstm, inputs, start, active)
        (future * rule.decode(hiddens, contexts)).sum().backward()
        return
    whole = active.all(0)
    # The fused LSTM cannot hold a coordinate's memory, so those that wake or are skipped on the way go step by step.
    for chosen, replay in ((whole, _replay_fused), (active.any(0) & ~whole, _replay_holding)):
        if chosen.any():
            hiddens = replay(rule, inputs[:, chosen], (start[0][chosen], start[1][chosen]), active[:, chosen])
            (future[:, chosen] * rule.decode(hiddens, contexts[:, chosen])).sum().backward()


def _suffix_sum(values: Tensor, discount: float) -> Tensor:
    """Return ``sum_{t>=s} discount^(t-s) values_t`` along the first dimension; entry s is gradient s+1 of the docstring."""
    if discount == 1.0:
        return values.flip(0).cumsum(0).flip(0)
    total = torch.zeros_like(values[0])
    sums = []
    for value in values.flip(0):
        total = discount * total + value
        sums.append(total)
    return torch.stack(sums[::-1])


def _replay_fused(rule: UpdateRule, inputs: Tensor, carry: tuple[Tensor, Tensor], active: Tensor) -> Tensor:
    return rule.recur(inputs, carry, fused=True)[0]


def _replay_holding(rule: UpdateRule, inputs: Tensor, carry: tuple[Tensor, Tensor], active: Tensor) -> Tensor:
    hiddens = []
    for step_inputs, step_active in zip(inputs, active, strict=True):
        hidden, carry = rule.advance(step_inputs, carry, step_active)
        hiddens.append(hidden)
    return torch.stack(hiddens)


def unroll(
    rule: AnyRule,
    optimizee: Optimizee,
    carry: Carry,
    truncation: int,
    objective: Objective,
    *,
    second_derivatives: bool = False,
) -> tuple[Tensor, Carry]:
    """Add the meta-gradient of K inner steps by plain autograd, step by step.

    The reference that :func:`backpropagate` is tested against, and the way to keep second derivatives, which the one-pass
    form cannot.

    Args:
        rule: The rule being meta-trained; its ``.grad`` is added to.
        optimizee: Its minibatches advance. Its losses must be twice differentiable for second derivatives.
        carry: Where to start.
        truncation: Inner steps, K.
        objective: Gives the weights w_t, which are constants.
        second_derivatives: Differentiate through the optimizee's gradients too.

    Returns:
        Losses ``(K, P)`` and the carry after the last step.
    """
    params, memory = carry.params.detach(), carry.memory
    grad, losses, bounds = carry.grad, [], scale_bounds(rule, optimizee)
    for step in range(carry.step + 1, carry.step + truncation + 1):
        scales = tensor_scales(bounds, optimizee, params)
        update, memory = plain_step(rule, optimizee, grad, memory, step, scales)
        params = params + update
        loss = optimizee.losses(optimizee.unflatten(params))
        losses.append(loss)
        (grad,) = torch.autograd.grad(loss.sum(), params, retain_graph=True, create_graph=second_derivatives)
        if not second_derivatives:
            grad = grad.detach()
    stacked = torch.stack(losses)
    (objective(stacked.detach(), carry.initial_loss) * stacked).sum().backward()
    memory = {name: value.detach() for name, value in memory.items()}
    last = losses[-1].detach()
    return stacked.detach(), Carry(params.detach(), memory, carry.step + truncation, last, grad.detach(), carry.initial_loss)
